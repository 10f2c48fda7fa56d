"""The acts of the demonstration. Whatever they claim is counted from what readers got."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from typing import Any

import anyio
import msgspec
from msgspec import Struct, field

from agentrun import wire
from agentrun.cli._bench_watch import Words
from agentrun.cli._demo_page import read_events
from agentrun.cli._demo_stage import Pane, Stage
from agentrun.cli._fleet import Fleet, command
from agentrun.cli._place import Place
from agentrun.cli.common import Fatal
from agentrun.client import Client, Event, Receipt, Session, Turn, connect
from agentrun.history import History, TurnView

_PATIENCE = 60.0
_PAUSE = 0.8


class Script(Struct, frozen=True, kw_only=True):
    """Who plays, and what is asked. ``words``: how many the answers have, where that is known."""

    spec: str
    agent: str
    stream: str
    stop: str
    takeover: str
    approval: str | None
    words: int | None
    some: int
    """Pieces of text after which something is done to an answer that streams."""


def echo_script(speed: float) -> Script:
    """The agent without a model: its words are numbered, so that each can be accounted for."""
    ms = f"{50 / speed:g}"
    return Script(
        spec="workers.echo:echo",
        agent="echo",
        stream=f"count 80 {ms}",
        stop=f"count 100000 {ms}",
        takeover=f"count 80 {ms}",
        approval=f"approve 80 {float(ms) / 4:g}",
        words=80,
        some=30,
    )


def model_script() -> Script:
    """A real model."""
    return Script(
        spec="workers.chat:chat",
        agent="chat",
        stream="Tell me in about 150 words how a river makes a valley, for a child who likes to count stones.",
        stop="Write a story of 1000 words about a very long train: each of its many wagons, and who sits there.",
        takeover="Explain in about 300 words how ships find their way at sea, by stars, lighthouses and satellites.",
        approval=None,
        words=None,
        some=6,
    )


class Reader:
    """Follows the session and keeps all it got."""

    def __init__(self, session: Session) -> None:
        self.got: list[tuple[int, bytes]] = []
        self.history = History()
        self.pieces: dict[str, list[str]] = {}
        self.pane: Pane | None = None
        self._session = session
        self._moved = anyio.Event()

    async def run(self) -> None:
        """Follow from the beginning, for ever."""
        async with self._session.follow() as events:
            async for event in events:
                self._take(event)

    def _take(self, event: Event) -> None:
        self.got.append((event.offset, event.raw))
        data = event.data
        self.history.apply(event.offset, data, time=event.time)
        if isinstance(data, wire.TextDelta):
            self.pieces.setdefault(data.turn, []).append(data.text)
            if self.pane is not None:
                self.pane.write(data.text)
        moved, self._moved = self._moved, anyio.Event()
        moved.set()

    def turn(self, turn: Turn) -> TurnView | None:
        """The turn, as far as it was read."""
        return self.history.turns.get(turn.id)

    def said(self, turn: Turn) -> list[str]:
        """The pieces of the turn's text, as they came."""
        return self.pieces.get(turn.id, [])

    async def until(self, what: Callable[[], Any]) -> None:
        """Wait until it is so.

        Raises:
            TimeoutError: It was not so within a minute.
        """
        with anyio.fail_after(_PATIENCE):
            while not what():
                await self._moved.wait()

    async def until_said(self, turn: Turn, pieces: int) -> None:
        """Wait for so much text, or the turn's end."""
        await self.until(lambda: len(self.said(turn)) >= pieces or self._ended(turn))

    async def until_ended(self, turn: Turn) -> TurnView:
        """Wait for the turn's end."""
        await self.until(lambda: self._ended(turn))
        return self.history.turns[turn.id]

    def _ended(self, turn: Turn) -> bool:
        view = self.turn(turn)
        return view is not None and view.ended


class Show(Struct):
    """The demonstration under way. ``rows`` are what was counted: what, the count, whether it is right."""

    script: Script
    stage: Stage
    place: Place
    client: Client
    fleet: Fleet
    session: Session
    reader: Reader
    page: str | None = None
    """The gateway's address."""
    rows: list[tuple[str, str, bool]] = field(default_factory=list[tuple[str, str, bool]])

    def count(self, what: str, seen: str, good: bool) -> None:
        """Note what was counted."""
        self.rows.append((what, seen, good))

    async def breathe(self) -> None:
        """A pause for whoever reads along."""
        if self.stage.watched:
            await anyio.sleep(_PAUSE)

    def count_words(self, what: str, turn: Turn) -> None:
        """Account for every word of an answer; without numbers on them: is the stored answer the streamed one?

        An attempt that started over says so to readers: they drop what came before it.
        """
        view = self.reader.history.turns[turn.id]
        pieces = "".join(self.reader.said(turn))
        if self.script.words is None:
            started = _last_started(self.reader, turn)
            whole = pieces == view.message.text or (started.attempt > 1 and started.resumes_from is None)
            self.count(
                what, f"{len(view.message.text.split())} words, {view.state}", view.state == "completed" and whole
            )
            return
        words = Words()
        for word in pieces.split():
            if word[1:].isdigit():
                words.word(word)
        words.end(self.script.words)
        numbers = (words.seen, words.doubled, words.lost)
        self.count(
            f"{what}: words received / doubled / missing",
            f"{numbers[0]} of {self.script.words} / {numbers[1]} / {numbers[2]}",
            numbers == (self.script.words, 0, 0),
        )


async def play_stream(show: Show) -> None:
    """A turn streams; a second reader joins in the middle."""
    show.stage.act("A turn streams. A second reader joins in the middle")
    one = show.reader
    async with connect(show.place.url, namespace=show.place.namespace) as device:
        two = Reader(device.session(show.session.id))
        turn = await _read_by_two(show, one, two)
    view = one.history.turns[turn.id]
    if view.error is not None:
        raise Fatal(f"the agent failed, so there is nothing to show: {view.error.message} ({view.error.code})")
    same = sum(a == b for a, b in zip(one.got, two.got, strict=False))
    show.stage.say(f"Both have {same} events, the same bytes at the same offsets.")
    show.count(
        "events read by reader 1 / reader 2 / identical",
        f"{len(one.got)} / {len(two.got)} / {same}",
        same == len(one.got) == len(two.got) > 0,
    )
    show.count_words("the stream", turn)
    await show.breathe()


async def _read_by_two(show: Show, one: Reader, two: Reader) -> Turn:
    turn = await show.session.send(show.script.stream)
    async with anyio.create_task_group() as group:
        with show.stage.panes("reader 1", "reader 2, another connection") as (one.pane, two.pane):
            await one.until_said(turn, show.script.some)
            two.pane.mark(f"joins at offset {len(one.got)}, reads from 1", "magenta")
            group.start_soon(two.run)
            await one.until_ended(turn)
            await two.until_ended(turn)
        group.cancel_scope.cancel()
    return turn


async def play_stop(show: Show) -> None:
    """A stop from another process."""
    show.stage.act("A stop, from another process")
    reader = show.reader
    with show.stage.panes("reader 1") as (pane,):
        reader.pane = pane
        turn = await show.session.send(show.script.stop)
        await reader.until_said(turn, show.script.some)
        done = await anyio.run_process(
            command("cancel", show.session.id, turn.id, "--by", "you", "--json"),
            env={**os.environ, **show.place.environment},
            check=False,
        )
        view = await reader.until_ended(turn)
        pane.mark(view.state, "red")
    receipt = msgspec.json.decode(done.stdout, type=Receipt)
    show.stage.command(f"agentrun cancel {show.session.id} {turn.id[:8]}… --by you")
    show.stage.say(f"{receipt.status} at offset {receipt.offset}, {receipt.took * 1000:.1f} ms")
    after = sum(wire.decode(raw).type == "text.delta" for offset, raw in reader.got if offset > receipt.offset)
    good = receipt.status == view.state == "cancelled" and receipt.offset == view.ended_at and after == 0
    show.count("stop: receipt / ms / words after it", f"{receipt.status} / {receipt.took * 1000:.1f} / {after}", good)
    await show.breathe()


async def play_takeover(show: Show, lease: float) -> None:
    """A worker dies in mid-answer, another one ends the answer."""
    show.stage.act(f"The worker is killed in mid-answer (SIGKILL). Its lease is {lease:g} s")
    reader = show.reader
    workers = await show.fleet.workers(show.client)
    with show.stage.panes("reader 1") as (pane,):
        reader.pane = pane
        turn = await show.session.send(show.script.takeover)
        await reader.until_said(turn, show.script.some)
        started = _last_started(reader, turn)
        victim = next(worker for worker in workers if worker.worker == started.worker)
        show.fleet.kill(victim.pid)
        killed = time.monotonic()
        pane.mark(f"worker {victim.pid} is dead", "red")
        pane.style = "green"
        await reader.until(lambda: _last_started(reader, turn).attempt > 1 or _ended(reader, turn))
        before = len(reader.said(turn))
        await reader.until_said(turn, before + 1)
        took = time.monotonic() - killed
        view = await reader.until_ended(turn)
    last = _last_started(reader, turn)
    survivor = next((worker.pid for worker in workers if worker.worker == last.worker), 0)
    how = "went on from what was stored" if last.resumes_from is not None else "started over"
    show.stage.say(f"Worker {survivor} {how}, {took:.1f} s after the kill.")
    good = last.attempt == 2 and survivor not in (0, victim.pid) and view.state == "completed"
    show.count("takeover: kill to next word", f"{took:.1f} s", good)
    show.count_words("the answer of two workers", turn)
    await show.breathe()


def _last_started(reader: Reader, turn: Turn) -> wire.TurnStarted:
    events = (wire.decode(raw) for _, raw in reversed(reader.got))
    return next(event for event in events if isinstance(event, wire.TurnStarted) and event.turn == turn.id)


def _ended(reader: Reader, turn: Turn) -> bool:
    view = reader.turn(turn)
    return view is not None and view.ended


async def play_approval(show: Show) -> None:
    """The agent asks, somebody answers."""
    assert show.script.approval is not None
    show.stage.act("The agent asks for approval")
    reader = show.reader
    with show.stage.panes("reader 1") as (pane,):
        reader.pane = pane
        turn = await show.session.send(show.script.approval)
        await reader.until(lambda: (view := reader.turn(turn)) is not None and view.questions)
        question = next(iter(reader.history.turns[turn.id].questions.values()))
        pane.mark(f"asks: {question.event.prompt}", "yellow")
        await show.breathe()
        await turn.answer(question.event.request, True, user="you")
        pane.mark("you: yes", "green")
        view = await reader.until_ended(turn)
    answered = [q for q in view.questions.values() if q.answer is not None]
    good = view.state == "completed" and len(answered) == len(view.questions) == 1
    show.count("approval: asked / answered", f"{len(view.questions)} / {len(answered)}", good)
    show.count_words("the approved answer", turn)
    await show.breathe()


async def read_again(show: Show) -> None:
    """Whoever reads all of it afterwards has what was seen live."""
    again = [(event.offset, event.raw) async for event in show.session.events(follow=False)]
    same = sum(a == b for a, b in zip(show.reader.got, again, strict=False))
    show.count(
        "all events, live / read again / identical",
        f"{len(show.reader.got)} / {len(again)} / {same}",
        same == len(again) == len(show.reader.got),
    )


async def read_over_http(show: Show) -> None:
    """Whoever reads it over HTTP has it too."""
    if show.page is None:
        return
    read = await read_events(show.page, show.session.id)
    same = sum(a == b for a, b in zip(show.reader.got, read, strict=False))
    show.count(
        "all events, live / read over HTTP / identical",
        f"{len(show.reader.got)} / {len(read)} / {same}",
        same == len(read) == len(show.reader.got),
    )


def new_session(client: Client, agent: str) -> Session:
    """A session of the demonstration's own."""
    return client.session(f"demo-{uuid.uuid4().hex[:6]}", agent=agent)
