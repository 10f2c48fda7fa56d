"""What a client of the AI SDK posts, and what is to be done for it. The log is the truth: of the messages that are
posted, only the last one counts.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import msgspec
from msgspec import Struct

from agentrun import wire
from agentrun.chat import input_to_chat
from agentrun.gateway.ai_chunks import message_id
from agentrun.gateway.problems import Problem
from agentrun.history import History, Question, TurnView

__all__ = [
    "Answers",
    "Post",
    "Run",
    "Send",
    "answers_of",
    "chat_of",
    "parse_post",
    "run_id",
    "run_of",
    "send_of",
    "session_of",
    "user_message",
]

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
_RUN = re.compile(r"([A-Za-z0-9_-]{1,128})~([A-Za-z0-9_-]{1,128})(?:~([0-9]{1,15}))?\Z")
_MAPPED, _NAMELESS, _MESSAGE = "c_", "w_", "m_"
_ASSISTANT = message_id("")
_ASKED = "ask:"

Trigger = Literal["submit-message", "regenerate-message"]


class Message(Struct, kw_only=True):
    """A UI message as posted."""

    role: str
    id: str = ""
    parts: list[dict[str, Any]] = []
    metadata: Any = None


class Post(Struct, kw_only=True):
    """A POST of a chat. Fields that are not known are the application's own."""

    id: str | None = None
    messages: list[Message] | None = None
    message: Message | None = None
    trigger: Trigger = "submit-message"
    message_id: str | None = msgspec.field(default=None, name="messageId")
    agent: str | None = None
    on_busy: wire.OnBusy | None = None
    deadline: float | None = None
    device: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def last(self) -> Message:
        """The message that counts."""
        return self.message or (self.messages or [])[-1]


def parse_post(body: bytes) -> Post:
    """Return what was posted.

    Raises:
        Problem: It cannot be used; ``detail`` says why.
    """
    try:
        post = msgspec.json.decode(body, type=Post)
    except msgspec.ValidationError as error:
        raise _invalid(f"{error}; expected {{id, messages: UIMessage[]}} as useChat posts it") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "not_json", f"the body must be a JSON object: {error}") from error
    if post.message is None and not post.messages:
        raise _invalid("messages is empty, and there is no message: there is nothing to answer")
    if post.last.role not in ("user", "assistant"):
        raise _invalid(f"the last message is of role {post.last.role[:40]!r}; it must be the user's or the assistant's")
    if post.last.role == "user" and not post.last.id:
        raise _invalid("the user's message has no id: it is what makes sending it again safe")
    return post


def _invalid(detail: str) -> Problem:
    return Problem(422, "invalid_body", detail)


# ---------------------------------------------------------------------------------------------------------------- ids


def session_of(chat: str) -> str:
    """Return the session of a chat id: the id itself if it can be one, else ``c_`` and its base64url.

    Raises:
        Problem: It is empty, or too long.
    """
    if _ID.match(chat):
        return chat
    encoded = _MAPPED + base64.urlsafe_b64encode(chat.encode("utf-8", "surrogatepass")).decode().rstrip("=")
    if not chat or len(encoded) > 128:
        raise Problem(
            422, "invalid_id", "a chat id has 1 to 128 characters of A-Z a-z 0-9 _ -, or up to 94 bytes of any"
        )
    return encoded


def chat_of(post: Post) -> str:
    """Return the session of a POST; without a chat id (`WorkflowChatTransport`) it is named for the first message.

    Raises:
        Problem: There is nothing it could be named for.
    """
    if post.id is not None:
        return session_of(post.id)
    if not post.messages or not post.messages[0].id:
        raise _invalid("there is no id: send the chat's id, or all its messages")
    first = post.messages[0].id
    return _NAMELESS + first if _ID.match(_NAMELESS + first) else _NAMELESS + _hash(first)


def _hash(*what: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(what)).hexdigest()[:40]


class Run(NamedTuple):
    """One response: a turn's chunks, or those behind the question at ``after``."""

    session: str
    turn: str
    after: int = 0


def run_id(run: Run) -> str:
    """Return the id by which a response is asked for again."""
    return f"{run.session}~{run.turn}" + (f"~{run.after}" if run.after else "")


def run_of(text: str) -> Run | None:
    """Return the run of this id; None if it is none."""
    found = _RUN.match(text)
    return Run(found[1], found[2], int(found[3] or 0)) if found else None


# --------------------------------------------------------------------------------------------------------------- turns


class Send(Struct, kw_only=True):
    """A turn to be sent.

    Attributes:
        input: What the agent gets.
        turn: The turn's id, the same each time this is posted.
        replaces: The turn whose exchange, with all after it, leaves the history.
        agent: Whom it is for, as the POST or the turn that is replaced has it.
    """

    input: Any
    turn: str
    replaces: str | None = None
    agent: str | None = None


def send_of(post: Post, session: str, history: History | None) -> Send:
    """Return the turn that a user's message asks for.

    ``history`` is needed where one is to be replaced (`replaces`): None means that the caller knows it is not.

    Raises:
        Problem: The message has nothing an agent could read.
    """
    message = post.last
    input = input_of(message)
    turn = message.id if _ID.match(message.id) else _MESSAGE + _hash(session, message.id)
    known = _turn_of(history, message, post) if history is not None and replaces(post) else None
    if known is None:
        return Send(input=input, turn=turn, agent=post.agent)
    request = known.request
    if post.trigger == "regenerate-message":
        name = _hash(session, "regenerate", message.id, known.id)
    else:
        again = request is not None and request.replaces is not None and not known.ended
        if again and request is not None and known.id == _hash(session, "edit", message.id, input, request.replaces):
            return Send(input=input, turn=known.id, replaces=request.replaces, agent=known.agent)
        name = _hash(session, "edit", message.id, input, known.id)
    return Send(input=input, turn=name, replaces=known.id, agent=post.agent or known.agent or None)


def replaces(post: Post) -> bool:
    """Whether the POST may replace a turn: it regenerates an answer, or edits a message."""
    if post.last.role != "user":
        return False
    return post.trigger == "regenerate-message" or post.message_id == post.last.id


def _turn_of(history: History, message: Message, post: Post) -> TurnView | None:
    """The turn that answered this message last."""
    if post.message_id is not None and post.message_id.startswith(_ASSISTANT):
        named = history.turns.get(post.message_id.removeprefix(_ASSISTANT))
        if named is not None and user_id(named) == message.id:
            return named
    found = [view for view in history.turns.values() if view.replaced_by is None and user_id(view) == message.id]
    return found[-1] if found else None


def user_id(view: TurnView) -> str:
    """Return the id of the user's message that asked for a turn."""
    given = view.request.metadata.get("message_id") if view.request is not None else None
    return given if isinstance(given, str) else view.id


def metadata_of(post: Post) -> dict[str, Any]:
    """Return what goes into the turn's metadata: the application's, and what makes the message whole again."""
    known: dict[str, Any] = {**(post.metadata or {}), "message_id": post.last.id}
    if post.last.metadata is not None:
        known["ui"] = post.last.metadata
    return known


def input_of(message: Message) -> Any:
    """Return a user's message as a turn's input: its text, or, with files, content parts as chat models take them.

    Raises:
        Problem: There is neither.
    """
    texts = [part["text"] for part in message.parts if part.get("type") == "text" and isinstance(part.get("text"), str)]
    files = [_file_of(part) for part in message.parts if part.get("type") == "file"]
    if not files:
        if not texts:
            raise _invalid("the user's message has no text and no file")
        return "\n".join(texts)
    return [*({"type": "text", "text": text} for text in texts), *files]


def _file_of(part: dict[str, Any]) -> dict[str, Any]:
    url, kind = part.get("url"), part.get("mediaType")
    if not isinstance(url, str) or not isinstance(kind, str):
        raise _invalid("a file part needs url and mediaType")
    if kind.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url, "format": kind}}
    file = {"file_data" if url.startswith("data:") else "file_id": url, "format": kind}
    if isinstance(name := part.get("filename"), str):
        file["filename"] = name
    return {"type": "file", "file": file}


def user_message(view: TurnView) -> dict[str, Any] | None:
    """Return the user's message that asked for a turn, as the client keeps it; None if it was trimmed."""
    if view.request is None:
        return None
    parts: list[dict[str, Any]] = []
    for message in input_to_chat(view.request.input):
        content = message.get("content")
        if isinstance(content, str):
            parts.append({"type": "text", "text": content})
        elif isinstance(content, list):
            parts += [_part_of(item) for item in cast("list[Any]", content)]
    shown: dict[str, Any] = {"id": user_id(view), "role": "user", "parts": parts}
    if (metadata := view.request.metadata.get("ui")) is not None:
        shown["metadata"] = metadata
    return shown


def _part_of(item: Any) -> dict[str, Any]:
    match item:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str(url), **more}}:
            return {"type": "file", "url": url, "mediaType": more.get("format", "image/*")}
        case {"type": "file", "file": {"file_data": str(url), **more} | {"file_id": str(url), **more}}:
            part = {"type": "file", "url": url, "mediaType": more.get("format", "application/octet-stream")}
            return part | ({"filename": more["filename"]} if "filename" in more else {})
        case _:
            return {"type": "text", "text": msgspec.json.encode(item).decode()}


# ------------------------------------------------------------------------------------------------------------- answers


class Answers(NamedTuple):
    """What an assistant's message answers: values by question, and the offset of the newest question it knows of."""

    turn: TurnView
    values: list[tuple[str, Any]]
    after: int


def answers_of(post: Post, history: History) -> Answers | None:
    """Return what the client has added to the assistant's message; None if its turn is not known, or nothing is asked.

    A client that knows of a question has everything before it: its response went up to there.
    """
    view = _asking(post.last, history)
    if view is None:
        return None
    values: list[tuple[str, Any]] = []
    after = 0
    for part in post.last.parts:
        question = _question_of(part, view.questions.values())
        if question is None:
            continue
        after = max(after, question.offset)
        value = _value_of(part, question)
        if question.answer is None and value is not wire.UNSET:
            values.append((question.event.request, value))
    return Answers(view, values, after) if after else None


def _asking(message: Message, history: History) -> TurnView | None:
    if message.id.startswith(_ASSISTANT) and (view := history.turns.get(message.id.removeprefix(_ASSISTANT))):
        return view
    # An application that names messages itself.
    return next((view for view in history.turns.values() if not view.ended and view.questions), None)


def _question_of(part: dict[str, Any], questions: Sequence[Question] | Any) -> Question | None:
    call, approval = part.get("toolCallId"), part.get("approval")
    if not isinstance(call, str):
        return None
    asked = cast("dict[str, Any]", approval).get("id") if isinstance(approval, dict) else None
    newest: Question | None = None
    for question in cast("Sequence[Question]", questions):
        event = question.event
        if event.kind == "approval" and asked is not None:
            found = event.request == asked
        else:
            own = call.removeprefix(_ASKED) == event.request
            found = own or (event.kind in ("tool", "approval") and call == event.call)
        if found:
            newest = question
    return newest


def _value_of(part: dict[str, Any], question: Question) -> Any:
    state = part.get("state")
    if question.event.kind == "approval" and state == "approval-responded":
        approval = cast("dict[str, Any]", part.get("approval") or {})
        value: dict[str, Any] = {"approved": approval.get("approved") is True}
        if isinstance(reason := approval.get("reason"), str) and reason:
            value["reason"] = reason
        return value
    if state == "output-available":
        return part.get("output")
    if state == "output-error" and question.event.kind == "tool":
        return {"error": str(part.get("errorText") or "the tool failed")}
    return wire.UNSET
