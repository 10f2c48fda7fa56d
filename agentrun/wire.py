"""The events: one JSON object per record, snake_case, told apart by ``type``.

The rules of evolution: a new field has a default; a new type may appear at any time and is passed on as
`UnknownEvent`; nothing is ever renamed. Fields a reader does not know are skipped when decoding, but readers get
the stored bytes too, so that nothing is lost in passing.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from agentrun.errors import InvalidInput

OnBusy = Literal["enqueue", "reject", "interrupt", "rollback", "steer"]
AskKind = Literal["approval", "choice", "text", "tool"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")


def check_id(what: str, value: str) -> str:
    """Return ``value`` if it can name a session, turn, agent or request.

    Raises:
        InvalidInput: It is not 1 to 128 of ``A-Z a-z 0-9 _ -``. Ids become parts of broker subjects and headers.
    """
    if not _ID.match(value):
        raise InvalidInput(f"{what} must be 1 to 128 characters of A-Z a-z 0-9 _ -, not {value[:140]!r}")
    return value


# ---------------------------------------------------------------------------------------------------- messages
# The part types are a closed set: a reader that met one it does not know could not read the message at all. What is
# new goes into `DataPart`.


class TextPart(Struct, tag_field="type", tag="text", omit_defaults=True):
    """Text of the answer."""

    text: str


class ReasoningPart(Struct, tag_field="type", tag="reasoning", omit_defaults=True):
    """What the model thought aloud, if it shows that."""

    text: str


class ToolPart(Struct, tag_field="type", tag="tool", omit_defaults=True):
    """A tool call, with its result once there is one.

    ``input_text`` holds the input as far as it was streamed while the call itself (``input``) is not in yet.
    """

    call: str
    name: str = ""
    input: Any = UNSET
    output: Any = UNSET
    error: str | None = None
    input_text: str = ""

    @property
    def settled(self) -> bool:
        """Whether the call has its result or its error."""
        return self.output is not UNSET or self.error is not None


class DataPart(Struct, tag_field="type", tag="data", omit_defaults=True):
    """Data of the application's own kind; the same ``name`` and ``id`` again replaces it."""

    name: str
    data: Any
    id: str | None = None


class SourcePart(Struct, tag_field="type", tag="source", omit_defaults=True):
    """A source the answer rests on."""

    url: str
    title: str | None = None
    id: str | None = None


class FilePart(Struct, tag_field="type", tag="file", omit_defaults=True):
    """A file, by reference."""

    url: str
    media_type: str
    name: str | None = None


Part = TextPart | ReasoningPart | ToolPart | DataPart | SourcePart | FilePart


class Message(Struct, omit_defaults=True):
    """What one turn's agent said, in the order it was said."""

    parts: list[Part] = field(default_factory=list[Part])
    role: str = "assistant"

    @property
    def text(self) -> str:
        """All text parts joined."""
        return "".join(p.text for p in self.parts if isinstance(p, TextPart))


class Usage(Struct, omit_defaults=True):
    """Tokens as the provider counted them, over all model calls of the turn."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class ErrorInfo(Struct, omit_defaults=True):
    """Why a turn, or an attempt at it, failed."""

    code: str
    message: str
    retryable: bool = False


# ------------------------------------------------------------------------------------------------- input events


class _Event(Struct, tag_field="type", omit_defaults=True, kw_only=True):
    @property
    def type(self) -> str:
        """The event's type as it stands on the wire, such as ``text.delta``."""
        tag = self.__struct_config__.tag
        assert isinstance(tag, str)
        return tag


class TurnRequested(_Event, tag="turn.requested", kw_only=True):
    """A turn, as its sender queued it. ``deadline`` is in seconds since the epoch.

    ``replaces`` names a turn of the session: its exchange, and that of every turn sent after it and before this one,
    leaves the history as soon as this request is stored.
    """

    turn: str
    agent: str
    input: Any
    user: str | None = None
    device: str | None = None
    on_busy: OnBusy = "enqueue"
    deadline: float | None = None
    parent: str | None = None
    replaces: str | None = None
    metadata: dict[str, Any] = {}
    trace: dict[str, str] = {}


class TurnAnswer(_Event, tag="turn.answer", kw_only=True):
    """The answer to an `InputRequired` of a turn."""

    turn: str
    request: str
    value: Any
    user: str | None = None
    trace: dict[str, str] = {}


class TurnCancel(_Event, tag="turn.cancel", kw_only=True):
    """A stop: for one turn, or (``all``) for every turn sent before it that has not ended."""

    turn: str | None = None
    all: bool = False
    by: str | None = None
    reason: str | None = None
    trace: dict[str, str] = {}


# ------------------------------------------------------------------------------------------------ output events


class _Out(_Event, kw_only=True):
    # An author leaves these two out; the worker fills them in before the event is stored.
    turn: str = ""
    attempt: int = 0


class TurnStarted(_Out, tag="turn.started", kw_only=True):
    """An attempt begins; from this record on, every earlier owner is fenced off.

    ``message`` is what earlier attempts left. With ``resumes_from`` (the offset of the last record of theirs) this
    attempt goes on from it; without, its first output supersedes it. ``lease`` is unique for each taking of a lease.
    ``trace`` is the attempt's own trace context, for those to come that refer to it.
    """

    worker: str
    lease: str
    resumes_from: int | None = None
    message: Message | None = None
    trace: dict[str, str] = {}


class TextDelta(_Out, tag="text.delta", kw_only=True):
    """Text: ``count`` tokens merged into one record, ``index`` tokens of this attempt before it."""

    text: str
    index: int = 0
    count: int = 1


class ReasoningDelta(_Out, tag="reasoning.delta", kw_only=True):
    """Reasoning text, counted as in `TextDelta` (one count over both)."""

    text: str
    index: int = 0
    count: int = 1


class ToolInputDelta(_Out, tag="tool.input.delta", kw_only=True):
    """A piece of a tool call's input, as the model writes it."""

    call: str
    text: str
    name: str = ""


class ToolCall(_Out, tag="tool.call", kw_only=True):
    """A complete tool call."""

    call: str
    name: str
    input: Any


class ToolProgress(_Out, tag="tool.progress", kw_only=True):
    """Progress of a running tool; expires like a delta."""

    call: str
    data: Any


class ToolResult(_Out, tag="tool.result", kw_only=True):
    """A tool's result, or the error it ended with."""

    call: str
    output: Any = None
    error: str | None = None


class Data(_Out, tag="data", kw_only=True):
    """Data of the application's own kind. ``transient`` data expires like a delta and is no part of the message."""

    name: str
    data: Any
    id: str | None = None
    transient: bool = False


class Source(_Out, tag="source", kw_only=True):
    """A source the answer rests on."""

    url: str
    title: str | None = None
    id: str | None = None


class File(_Out, tag="file", kw_only=True):
    """A file, by reference."""

    url: str
    media_type: str
    name: str | None = None


class InputRequired(_Out, tag="input.required", kw_only=True):
    """The agent asks a person or a client. ``deadline`` is in seconds since the epoch.

    ``call`` names the tool call it is about, if any; ``tool`` and ``input`` what a client-side tool is to do.
    """

    request: str
    kind: AskKind
    prompt: str = ""
    choices: list[str] | None = None
    call: str | None = None
    tool: str | None = None
    input: Any = UNSET
    deadline: float | None = None


class TurnSuspended(_Out, tag="turn.suspended", kw_only=True):
    """The turn waits for an answer without a worker; slot and lease are given back."""

    requests: list[str]
    message: Message
    usage: Usage | None = None
    until: float | None = None


class TurnResumed(_Out, tag="turn.resumed", kw_only=True):
    """The answer at offset ``answer`` was taken to ``request``; the turn is running."""

    request: str
    answer: int


class TurnRetrying(_Out, tag="turn.retrying", kw_only=True):
    """The attempt failed and another will follow, ``after`` seconds from now at the earliest."""

    error: ErrorInfo
    after: float = 0.0
    usage: Usage | None = None


class TurnReleased(_Out, tag="turn.released", kw_only=True):
    """The worker hands the turn back unfinished (it drains); this attempt is not charged."""

    reason: str = "drain"
    usage: Usage | None = None


class TurnLost(_Out, tag="turn.lost", kw_only=True):
    """The worker that ran this attempt was found dead by another one, ``by``: the turn is to be taken over now.

    Should it be alive after all, it is fenced off from this record on.
    """

    worker: str
    by: str


class TurnCheckpoint(_Out, tag="turn.checkpoint", kw_only=True):
    """The message so far, kept because the deltas before it may expire before the turn ends."""

    message: Message


class SteerConsumed(_Out, tag="steer.consumed", kw_only=True):
    """The running agent took in the turn ``steer`` (at ``offset``); that turn has ended by it."""

    steer: str
    offset: int


class InputRejected(_Out, tag="input.rejected", kw_only=True):
    """The input at ``offset`` cannot be used and is dropped, with the reason. ``turn`` is empty if unknown."""

    offset: int
    code: str
    reason: str


class Chunk(_Out, tag="chunk", kw_only=True):
    """One of ``total`` pieces of an event too large for one record; joined, the pieces' ``data`` is its JSON."""

    index: int
    total: int
    data: str


class _Terminal(_Out, kw_only=True):
    turn_offset: int
    message: Message = field(default_factory=Message)
    usage: Usage | None = None


class TurnCompleted(_Terminal, tag="turn.completed", kw_only=True):
    """The turn ended as its agent meant it to."""

    finish_reason: str = "stop"


class TurnCancelled(_Terminal, tag="turn.cancelled", kw_only=True):
    """The turn was stopped. With ``rolled_back`` the exchange is no part of the history."""

    by: str | None = None
    reason: str | None = None
    rolled_back: bool = False


class TurnFailed(_Terminal, tag="turn.failed", kw_only=True):
    """The turn gave up."""

    error: ErrorInfo


class TurnExpired(_Terminal, tag="turn.expired", kw_only=True):
    """The turn's deadline, or that of the question it waited for, passed."""

    reason: str | None = None


# ------------------------------------------------------------------------------------- to readers only, not stored


class Snapshot(_Out, tag="snapshot", kw_only=True):
    """Stands for the offsets ``from`` to ``to``, whose records have expired.

    ``message`` is the message of ``turn`` as it stood after offset ``to``; it replaces what the reader has of it.
    """

    from_: int = field(name="from")
    to: int
    message: Message


class Gap(_Event, tag="gap", kw_only=True):
    """The offsets ``from`` to ``to`` are gone and nothing stored says what they held."""

    from_: int = field(name="from")
    to: int
    reason: Literal["expired", "trimmed"] = "expired"


class UnknownEvent(Struct):
    """An event of a type this version does not know. ``raw`` is its JSON."""

    type: str
    raw: bytes


InputEvent = TurnRequested | TurnAnswer | TurnCancel
Terminal = TurnCompleted | TurnCancelled | TurnFailed | TurnExpired
OutputEvent = (
    TurnStarted
    | TextDelta
    | ReasoningDelta
    | ToolInputDelta
    | ToolCall
    | ToolProgress
    | ToolResult
    | Data
    | Source
    | File
    | InputRequired
    | TurnSuspended
    | TurnResumed
    | TurnRetrying
    | TurnReleased
    | TurnLost
    | TurnCheckpoint
    | SteerConsumed
    | InputRejected
    | Chunk
    | TurnCompleted
    | TurnCancelled
    | TurnFailed
    | TurnExpired
)
ReaderEvent = Snapshot | Gap
KnownEvent = InputEvent | OutputEvent | ReaderEvent
AnyEvent = KnownEvent | UnknownEvent

TERMINAL = (TurnCompleted, TurnCancelled, TurnFailed, TurnExpired)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[KnownEvent] = msgspec.json.Decoder(KnownEvent)


class _Tag(Struct):
    type: str


_tag_decoder = msgspec.json.Decoder(_Tag)
_tags = frozenset(
    str(cls.__struct_config__.tag) for cls in (*InputEvent.__args__, *OutputEvent.__args__, *ReaderEvent.__args__)
)


def encode(event: KnownEvent) -> bytes:
    """Return the event's JSON, as it is stored. Fields at their default are left out.

    Raises:
        InvalidInput: A field holds what JSON cannot, a lone surrogate included.
    """
    try:
        return _encoder.encode(event)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidInput(f"this {event.type} cannot be JSON: {error}") from error


def mend(event: OutputEvent) -> bytes:
    """`encode`, but a lone surrogate, which a model may well produce and which is no text, becomes a question mark."""
    try:
        return _encoder.encode(event)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(event), ensure_ascii=False).encode("utf-8", "replace")
    except (TypeError, ValueError, OverflowError, RecursionError):
        return encode(event)


def decode(body: bytes) -> AnyEvent:
    """Return the event a record holds; a type not known here comes as `UnknownEvent`.

    Raises:
        InvalidInput: The bytes are not JSON, have no ``type``, or a known type's fields are wrong.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        try:
            tag = _tag_decoder.decode(body).type
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise InvalidInput(f"not an event (a JSON object with a type): {error}") from error
        if tag in _tags:
            raise InvalidInput(f"not a valid {tag} event: {error}") from error
        return UnknownEvent(tag, body)


def split(event: OutputEvent, limit: int) -> list[bytes]:
    """Return the event's records: its JSON, or `Chunk` records of at most ``limit`` bytes where it is larger."""
    body = mend(event)
    if len(body) <= limit:
        return [body]
    # A chunk's data is a JSON string inside JSON: an escape can cost six bytes for one, so slices are measured.
    text = body.decode()
    room = max(limit - 512, 512)
    pieces: list[str] = []
    start = 0
    while start < len(text):
        end = min(len(text), start + room)
        while len(_encoder.encode(text[start:end])) > room:
            end = start + (end - start) // 2
        pieces.append(text[start:end])
        start = end
    return [
        encode(Chunk(turn=event.turn, attempt=event.attempt, index=i, total=len(pieces), data=piece))
        for i, piece in enumerate(pieces)
    ]


class Joiner:
    """Puts `Chunk` records together again; feed it one session's events in order."""

    def __init__(self) -> None:
        self._pieces: list[Chunk] = []

    def feed(self, event: AnyEvent) -> AnyEvent | None:
        """Return the event, the joined event at the last of its chunks, or None inside a run of chunks."""
        if not isinstance(event, Chunk):
            return event
        if event.index == 0:
            self._pieces = []
        self._pieces.append(event)
        if event.index != event.total - 1:
            return None
        pieces, self._pieces = self._pieces, []
        if [p.index for p in pieces] != list(range(event.total)):
            # The run began before the first record this reader saw; what can be said of it is only that it is there.
            return event
        return decode("".join(p.data for p in pieces).encode())


def is_unset(value: Any) -> bool:
    """Whether an optional JSON field was absent (as opposed to null)."""
    return isinstance(value, UnsetType)


class CancelReply(Struct):
    """The reply of a running worker to a live stop: the receipt, and the offset of the record that ended the turn."""

    receipt: Literal["cancelled", "already_ended"]
    offset: int
