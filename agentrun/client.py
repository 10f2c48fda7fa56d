"""What a backend touches: `Client`, `Session` and `Turn`.

::

    async with agentrun.connect("nats://localhost:4222") as client:
        session = client.session("s-42", agent="support")
        turn = await session.send("hello", id=request_id)
        async for event in turn.events():
            print(event.offset, event.data)
        receipt = await turn.cancel()

Sessions and turns are names with methods: making one costs nothing and asks nobody.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from typing import Any

import anyio
from msgspec import Struct

from agentrun import dead as dead_turns
from agentrun import inputs, reading, wire
from agentrun.broker import Broker, Tail
from agentrun.dead import DeadTurn
from agentrun.errors import Duplicate, InvalidInput, QueueFull, SessionBusy, TurnFailed, TurnNotFound
from agentrun.history import History, TurnView
from agentrun.inputs import Receipt
from agentrun.reading import Event
from agentrun.settings import ClientSettings
from agentrun.telemetry import Telemetry, default
from agentrun.telemetry.names import Attr
from agentrun.telemetry.sending import answering, sending, stopping
from agentrun.wire import Message, OnBusy, Usage, check_id

__all__ = ["Client", "DeadTurn", "Event", "Receipt", "Result", "Session", "Steer", "Turn", "connect"]


class Result(Struct, frozen=True):
    """The answer of a turn that completed. ``offset`` is that of its last event."""

    turn: str
    offset: int
    attempt: int
    message: Message
    usage: Usage | None
    finish_reason: str

    @property
    def text(self) -> str:
        """The text of the answer."""
        return self.message.text


@asynccontextmanager
async def connect(
    url: str,
    *,
    namespace: str = "default",
    agent: str | None = None,
    settings: ClientSettings | None = None,
    telemetry: Telemetry | None = None,
) -> AsyncGenerator[Client]:
    """Connect to a broker (``nats://host:4222``, ``memory://name``, ``sqlite:///dev.db``) and give a `Client`.

    Args:
        url: The broker.
        namespace: Which of the broker's agentrun installations; sessions of two namespaces never meet.
        agent: To whom turns go whose sender names no agent.
        settings: Times and limits.
        telemetry: Where it is told what this client does; default is what is set for the process.

    Raises:
        InvalidInput: The URL names no broker known here.
        Unavailable: The broker cannot be reached.
        Misconfigured: What it holds is not what is needed; the message names the command that mends it.
    """
    from agentrun import brokers  # what a broker needs is imported only by those who connect to it

    async with brokers.connect(url, namespace=namespace) as broker:
        yield Client(broker, agent=agent, settings=settings, telemetry=telemetry)


class Client:
    """Sessions of one broker.

    Args:
        broker: A connected broker; closing it is up to whoever opened it.
        agent: To whom turns go whose sender names no agent.
        settings: Times and limits.
        telemetry: Where it is told what this client does; default is what is set for the process.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        agent: str | None = None,
        settings: ClientSettings | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.broker = broker
        self.telemetry = telemetry or default()
        self.settings = settings or ClientSettings()
        self._agent = agent
        if agent is not None:
            self.telemetry.instruments.expect("sends", {Attr.AGENT: agent})

    def session(self, id: str, *, agent: str | None = None) -> Session:
        """Return the session of this name; it begins with the first turn sent.

        Args:
            id: 1 to 128 of ``A-Z a-z 0-9 _ -``.
            agent: To whom its turns go when their sender names no agent; default is the client's.

        Raises:
            InvalidInput: The id cannot be one.
        """
        return Session(self, check_id("a session's id", id), agent or self._agent)

    def turn(self, session: str, turn: str) -> Turn:
        """Return a turn that was sent before, by the ids of its session and its own. Whether it exists is not asked.

        Raises:
            InvalidInput: An id cannot be one.
        """
        return self.session(session).turn(turn)

    async def dead(
        self, *, session: str | None = None, turn: str | None = None, agent: str | None = None
    ) -> AsyncGenerator[DeadTurn]:
        """The turns that gave up, the oldest first: after their last attempt, or because they could not be run at all.

        Not among them are turns their agent failed on purpose (`Fail`): that is an answer. A turn leaves the list by
        `retry_dead` or `drop_dead`, when another is sent in its place, and with its session.

        Args:
            session: Only those of this session.
            turn: Only the turn of this id.
            agent: Only those for this agent.

        Raises:
            Unavailable: The broker is away.
        """
        async with aclosing(dead_turns.find(self.broker.log, session=session, turn=turn, agent=agent)) as found:
            async for dead in found:
                yield dead

    async def retry_dead(self, *dead: DeadTurn) -> list[Turn]:
        """Send dead turns again, one after the other, take them off the list, and return the new turns.

        The new turn has the input, agent, user and metadata of the dead one, no deadline, and an id made of the dead
        one's, so that doing it twice sends it once. It takes the dead one's place in the conversation, as with
        ``replaces``; where the conversation has gone on since, it is added to its end.

        Raises:
            InvalidInput: One cannot be sent again: what was rejected is no turn, its request is gone, or it is not
                dead. Those before it were sent.
            QueueFull, TooLarge, Unavailable: See `Session.send`. Doing it again is safe.
        """
        turns: list[Turn] = []
        try:
            for entry in dead:
                again = await dead_turns.send_again(self.broker.log, entry)
                session = self.session(entry.session)
                offset = again.offset or await session._append(again.request, minted=False)  # pyright: ignore[reportPrivateUsage]
                turns.append(Turn(session, again.request.turn, offset))
        finally:
            await self.drop_dead(*dead[: len(turns)])
        return turns

    async def drop_dead(self, *dead: DeadTurn) -> None:
        """Take dead turns off the list. Dropping again changes nothing.

        Raises:
            Unavailable: No outcome within ``settings.send_timeout``.
        """
        keys = [entry.key for entry in dead]
        await dead_turns.settle(self.broker.log, keys, timeout=self.settings.send_timeout)


class Session:
    """One conversation: a log of events at the offsets 1, 2, 3 and so on.

    Attributes:
        id: Its id.
        agent: To whom its turns go when their sender names no agent.
    """

    def __init__(self, client: Client, id: str, agent: str | None) -> None:
        self.id = id
        self.agent = agent
        self._settings = client.settings
        self._broker = client.broker
        self._telemetry = client.telemetry

    def __repr__(self) -> str:
        return f"Session({self.id!r})"

    def turn(self, id: str) -> Turn:
        """Return a turn of this session that was sent before. Whether it exists is not asked."""
        return Turn(self, check_id("a turn's id", id))

    async def send(
        self,
        input: Any,
        *,
        agent: str | None = None,
        id: str | None = None,
        on_busy: OnBusy = "enqueue",
        deadline: float | datetime | None = None,
        user: str | None = None,
        device: str | None = None,
        parent: str | None = None,
        replaces: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        trace: Mapping[str, str] | None = None,
    ) -> Turn:
        """Send a turn: one append shows it to every reader and queues it for its agent.

        Sending again under the same ``id`` changes nothing and returns the same turn, for as long as the broker
        remembers ids (``capabilities.dedupe_window``, at least an hour) and whatever became of the turn.

        Args:
            input: Text, a chat message, a list of either, or any JSON the agent understands.
            agent: Who is to answer.
            id: The turn's id, of the same characters as a session's; default is a random one.
            on_busy: What if the session has work. ``enqueue``: wait in line. ``reject``: raise `SessionBusy`.
                ``interrupt``: stop what was sent before, then run. ``rollback``: as well, and take the stopped
                exchange out of the history. ``steer``: offer it to the running agent; if that does not take it, it
                waits in line.
            deadline: When the turn expires if it has not ended: seconds from now, or a time with a timezone.
            user: Who sends it, as readers see it.
            device: From where.
            parent: The turn that caused this one.
            replaces: A turn of this session in whose place this one is sent, to regenerate an answer or to edit an
                input: its exchange, and that of all turns sent after it, leaves the history, whatever becomes of this
                one. An id the session does not know replaces nothing. What still runs goes on unless ``on_busy`` is
                ``interrupt``; not with ``steer``.
            metadata: Anything the agent or a reader may want to know; JSON.
            trace: Trace context (``traceparent``, ``baggage``) of who sends it; default is that of the current span.

        Raises:
            InvalidInput: An argument cannot be used.
            IdTaken: ``id`` was used before for another input or agent.
            SessionBusy: ``on_busy="reject"`` met a session that has work.
            QueueFull: The session has ``settings.max_queued`` inputs waiting.
            TooLarge: The input is over the broker's limit.
            Unavailable: No outcome within ``settings.send_timeout``. Sending again with the same id is safe.
        """
        request = self._request(input, agent, id, on_busy, replaces)
        request.deadline = inputs.deadline_of(deadline, self._broker.now())
        request.user, request.device, request.parent = user, device, parent
        request.metadata = dict(metadata or {})
        with sending(self._telemetry, self._system, self.id, request, trace or {}) as span:
            offset = await self._append(request, minted=id is None)
            span.set({Attr.OFFSET: offset})
        return Turn(self, request.turn, offset)

    @property
    def _system(self) -> str:
        return self._broker.capabilities.name

    def _request(
        self, input: Any, agent: str | None, id: str | None, on_busy: OnBusy, replaces: str | None
    ) -> wire.TurnRequested:
        inputs.check_on_busy(on_busy)
        if replaces is not None:
            check_id("the id of the turn to replace", replaces)
            if on_busy == "steer":
                raise InvalidInput("a turn that becomes part of the running one replaces none: use another on_busy")
        name = agent or self.agent
        if name is None:
            raise InvalidInput(
                "to which agent? Give send(…, agent=…), client.session(id, agent=…) or connect(url, agent=…)"
            )
        turn = uuid.uuid4().hex if id is None else check_id("a turn's id", id)
        agent = check_id("an agent's name", name)
        return wire.TurnRequested(turn=turn, agent=agent, input=input, on_busy=on_busy, replaces=replaces)

    async def _append(self, request: wire.TurnRequested, *, minted: bool) -> int:
        log = self._broker.log
        body = inputs.encode_input(request)

        async def plan(tail: Tail) -> inputs.Input:
            full = len(tail.pending) >= self._settings.max_queued
            if tail.pending and (full or request.on_busy == "reject"):
                # What was sent before is neither refused now nor sent again. An id of our own making can only be
                # that of a try just now.
                after = min(entry.offset for entry in tail.pending) - 1 if minted else 0
                known = await inputs.sent_before(log, self.id, request.turn, after=after)
                if known is not None:
                    raise Duplicate(request.turn, known)
                waiting = f"session {self.id} has {len(tail.pending)} inputs that have not ended"
                raise QueueFull(f"{waiting}: send later") if full else SessionBusy(waiting)
            return inputs.Input(body, request.agent, wakes=request.on_busy in ("interrupt", "rollback"))

        try:
            tail = await inputs.append_input(
                log, self.id, plan, timeout=self._settings.send_timeout, dedupe=request.turn
            )
        except Duplicate as duplicate:
            await inputs.check_same(log, self.id, duplicate.offset, request)
            return duplicate.offset
        assert tail is not None
        return tail.offset

    async def events(self, after: int = 0, *, follow: bool = True) -> AsyncGenerator[Event]:
        """The session's events behind offset ``after``, in order, without loss or duplicate.

        Where records have expired or were trimmed a `Snapshot` or a `Gap` stands for them. Leaving the loop is safe;
        what it holds is freed when the iterator is closed or collected. For freeing it at once use `follow`, or
        ``contextlib.aclosing``.

        Args:
            after: The offset of the last event seen; 0 for none.
            follow: Whether to go on with events to come, for ever; else the end is the session's end as of now.

        Raises:
            InvalidInput: ``after`` is negative.
            SessionGone: ``after`` lies beyond the session's end, or the session is deleted while it is followed.
        """
        if not follow:
            async for event in reading.read_to_end(self._broker.log, self.id, after=after):
                yield event
            return
        async with self.follow(after) as events:
            async for event in events:
                yield event

    @asynccontextmanager
    async def follow(self, after: int = 0, *, cursor: int = 0) -> AsyncGenerator[AsyncGenerator[Event]]:
        """`events` to be followed, as a context that frees all it holds at its end.

        ``cursor`` may be that of the event at ``after``, which spares the broker a search.
        """
        async with reading.follow(self._broker.log, self.id, after=after, cursor=cursor) as events:
            yield events

    async def history(self) -> History:
        """Return the session folded to its end: its turns, what they said, how they ended.

        ``events(after=history.offset)`` goes on exactly where it ends. Costs a read of all that lasts of the session.
        """
        return await reading.load_history(self._broker.log, self.id)

    async def cancel(self, *, by: str | None = None, reason: str | None = None) -> Receipt:
        """Stop all turns sent before, running or waiting; see `Turn.cancel`. ``cancelled`` if it stopped any."""
        return await self._stop(wire.TurnCancel(all=True, by=by, reason=reason))

    async def _stop(self, event: wire.TurnCancel) -> Receipt:
        with stopping(self._telemetry, self._system, self.id, event) as watch:
            live, wait = self._settings.cancel_live, self._settings.cancel_wait
            receipt = await inputs.Stopping(self._broker, self.id, event, live=live, wait=wait).run()
            watch.receipt(receipt.status, receipt.offset, receipt.took)
        return receipt

    async def _answer(self, event: wire.TurnAnswer) -> int:
        with answering(self._telemetry, self._system, self.id, event) as span:
            offset = await inputs.answer(self._broker.log, self.id, event, timeout=self._settings.send_timeout)
            span.set({Attr.OFFSET: offset})
        return offset

    async def delete(self) -> None:
        """Remove every record of the session. A turn that runs is stopped as soon as its worker notices."""
        await self._broker.log.delete(self.id)


class Turn:
    """One turn of a session.

    Attributes:
        session: Its session.
        id: Its id.
        offset: Where its request stands in the log, if that is known.
    """

    def __init__(self, session: Session, id: str, offset: int | None = None) -> None:
        self.session = session
        self.id = id
        self.offset = offset
        self._broker = session._broker  # pyright: ignore[reportPrivateUsage]
        self._settings = session._settings  # pyright: ignore[reportPrivateUsage]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.session.id!r}, {self.id!r})"

    async def events(self) -> AsyncGenerator[Event]:
        """This turn's events over all attempts, from its request to the one that ends it, which is the last.

        Stops of the whole session and holes are among them. A turn that was consumed by another ends with that
        ``steer.consumed``; one that could not be used with ``input.rejected``.

        Raises:
            TurnNotFound: The session holds no such turn, or no longer.
            SessionGone: The session was deleted since it was sent, or its records were lost.
        """
        async with aclosing(self._read(deltas=True)) as events:
            async for event in events:
                yield event

    async def result(self, timeout: float | None = None) -> Result:
        """Wait for the turn's end and return its answer. Reads none of the tokens.

        Raises:
            TurnFailed: It ended in another way; ``state`` says which. Of a turn that was ``consumed`` as steering the
                message says by which turn, and the answer is that one's.
            TurnNotFound: The session holds no such turn, or no longer.
            SessionGone: The session was deleted since it was sent, or its records were lost.
            TimeoutError: It has not ended within ``timeout`` seconds. It goes on.
        """
        last: Event | None = None
        with anyio.fail_after(timeout):
            async with aclosing(self._read(deltas=False)) as events:
                async for event in events:
                    last = event
        assert last is not None
        return self._result(last)

    async def cancel(self, *, by: str | None = None, reason: str | None = None) -> Receipt:
        """Stop the turn wherever it is, and say what became of it.

        A running worker is told directly, and answers when the end is stored. Where none answers at once the stop is
        stored, and obeyed by whoever runs the turn next; its outcome is waited for, up to ``settings.cancel_wait``
        seconds. Stopping again changes nothing.

        Args:
            by: Who stops it, as readers see it.
            reason: Why.

        Raises:
            Unavailable: The broker is away: the stop was neither heard nor stored.
        """
        return await self.session._stop(  # pyright: ignore[reportPrivateUsage]
            wire.TurnCancel(turn=self.id, by=by, reason=reason)
        )

    async def steer(self, input: Any, *, id: str | None = None, user: str | None = None) -> Steer:
        """Offer more input to the running turn; it becomes a turn of its own if the agent does not take it.

        Raises:
            TurnNotFound: The session holds no such turn.
            InvalidInput, QueueFull, TooLarge, Unavailable: See `Session.send`.
        """
        turn = await self.session.send(input, agent=await self._agent(), id=id, on_busy="steer", user=user)
        return Steer(self.session, turn.id, turn.offset)

    async def answer(self, request: str, value: Any, *, user: str | None = None) -> int:
        """Answer a question the turn asked (`InputRequired`) and return the answer's offset. The first answer counts.

        Giving the same answer again, as the same user, changes nothing.

        Args:
            request: The question's id.
            value: For a question of kind ``approval`` a bool or ``{"approved": bool, "reason": text}``, for
                ``choice`` one of its choices, for ``text`` text, for ``tool`` any JSON: the tool's result.
            user: Who answers.

        Raises:
            NotWaiting: The question is not open: unknown, answered by another first, or its turn has ended.
            InvalidInput: The value does not fit the question.
            TurnNotFound: The session holds no such turn.
            Unavailable: No outcome within ``settings.send_timeout``. Answering again is safe.
        """
        return await self.session._answer(  # pyright: ignore[reportPrivateUsage]
            wire.TurnAnswer(turn=self.id, request=request, value=value, user=user)
        )

    async def view(self) -> TurnView:
        """Return the turn as the log tells it, without what the tokens in flight add.

        Costs a read of all that lasts of the session.

        Raises:
            TurnNotFound: The session holds no such turn.
        """
        log = self._broker.log
        fold = reading.Fold(log, self.session.id)
        view = (await fold.update(await log.last(self.session.id))).turns.get(self.id)
        if view is None:
            view = (await fold.update(await log.last(self.session.id, fresh=True))).turns.get(self.id)
        if view is None:
            raise TurnNotFound(f"session {self.session.id} has no turn {self.id}")
        self.offset = view.offset
        return view

    def concerns(self, event: Event) -> bool:
        """Whether an event behind this turn's request is one of `events`: its own, a stop of the session, a hole."""
        if event.turn == self.id or isinstance(event.data, wire.Gap):
            return True
        if isinstance(event.data, wire.TurnCancel):
            return event.data.all
        return self.ended_by(event)

    def ended_by(self, event: Event) -> bool:
        """Whether nothing comes of the turn after this event. ``offset`` must be known for turns that steer."""
        match event.data:
            case wire.SteerConsumed() | wire.InputRejected() as data:
                return data.offset == self.offset
            case data:
                return isinstance(data, wire.TERMINAL) and data.turn == self.id

    async def _agent(self) -> str | None:
        return (await self.view()).agent or None

    async def _read(self, *, deltas: bool) -> AsyncGenerator[Event]:
        offset = self.offset if self.offset is not None else (await self.view()).offset
        if offset == 0:
            raise self._not_found("is no longer in the log: its beginning was trimmed")
        # Behind the end nothing would come of a turn that is gone.
        async with reading.follow(
            self._broker.log, self.session.id, after=offset - 1, deltas=deltas, stored=offset
        ) as events:
            first = await anext(events)
            if not isinstance(first.data, wire.TurnRequested) or first.turn != self.id:
                raise self._not_found(f"is not at offset {self.offset}: the log was trimmed or deleted since")
            yield first
            async for event in events:
                if self.concerns(event):
                    yield event
                if self.ended_by(event):
                    return

    def _not_found(self, why: str) -> TurnNotFound:
        return TurnNotFound(f"turn {self.id} of session {self.session.id} {why}")

    def _result(self, last: Event) -> Result:
        match last.data:
            case wire.TurnCompleted() as end:
                return Result(self.id, last.offset, end.attempt, end.message, end.usage, end.finish_reason)
            case wire.TurnCancelled() as end:
                why = f"stopped by {end.by}" if end.by else "stopped"
                raise TurnFailed(self.id, "cancelled", "cancelled", f"{why}: {end.reason}" if end.reason else why)
            case wire.TurnFailed() as end:
                error = end.error
                raise TurnFailed(self.id, "failed", error.code, error.message, retryable=error.retryable)
            case wire.TurnExpired() as end:
                raise TurnFailed(self.id, "expired", "expired", end.reason or "its deadline passed")
            case wire.SteerConsumed() as end:
                raise TurnFailed(self.id, "consumed", "consumed", f"it became part of turn {end.turn}")
            case wire.InputRejected() as end:
                raise TurnFailed(self.id, "rejected", end.code, end.reason)
            case _:
                raise AssertionError(f"the events of a turn do not end in {last.type}")


class Steer(Turn):
    """A turn sent to be taken in by a running one."""

    async def consumed_by(self, timeout: float | None = None) -> str | None:
        """Wait until it is decided, and return the id of the turn that took it in; None if it is one of its own.

        Raises:
            TurnNotFound: The log was trimmed or deleted since.
            TimeoutError: It is not decided within ``timeout`` seconds.
        """
        with anyio.fail_after(timeout):
            async with aclosing(self._read(deltas=False)) as events:
                async for event in events:
                    match event.data:
                        case wire.SteerConsumed() as data if data.offset == self.offset:
                            return data.turn
                        case wire.TurnStarted() as data if data.turn == self.id:
                            return None
                        case _:
                            pass
        return None
