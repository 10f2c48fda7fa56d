"""The load against one worker and one gateway that nothing befalls: what it notes is what is stored."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import agentrun
from agentrun.brokers.server import NatsServer
from agentrun.wire import TERMINAL, TurnRequested
from tests.chaos.evidence import (
    AnyNote,
    Deleted,
    Got,
    Joined,
    Left,
    Notebook,
    Said,
    Sent,
    Steered,
    Stopped,
    Unended,
    digest,
    read_notes,
)  # fmt: skip
from tests.chaos.load import Scale, open_load
from tests.chaos.place import Place
from tests.chaos.readers import READERS
from tests.e2e.processes import new_cli

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.timeout(180)]

SCALE = Scale(sessions=12, readers=4, think=0.3, life=6, longest=3)


@pytest.fixture
def place(nats_server: NatsServer, tmp_path: Path) -> Iterator[Place]:
    """A worker and a gateway."""
    cli = new_cli(nats_server)
    try:
        agents = ("chaos", "fresh")
        worker = cli.start("worker", *(f"tests.chaos.agents:{agent}" for agent in agents), "--name", "w")
        gateway = cli.start("gateway", "--insecure", "--port", 0)
        worker.until("worker w runs", err=True)
        url = gateway.until(r"gateway on (http://[\w.:]+)")[1]
        yield Place(brokers=(cli.url,), namespace=cli.namespace, gateways=(url,), agents=agents, folder=tmp_path)
    finally:
        cli.end()


async def test_what_a_load_notes_is_what_is_stored(place: Place) -> None:
    book = Notebook(place.folder, "load")
    async with open_load(place, book, random.Random(7), SCALE) as load:
        await load.drive(until=time.monotonic() + 15)
        await load.drain(patience=60)
    book.close()
    notes = list(read_notes(place.folder))
    stored = await _stored(place, notes)
    _check_turns(notes, stored)
    _check_readers(notes, stored)


async def _stored(place: Place, notes: list[AnyNote]) -> dict[str, list[agentrun.Event]]:
    """All events of all sessions that were not deleted."""
    names = {note.session for note in notes if isinstance(note, Sent)}
    names -= {note.session for note in notes if isinstance(note, Deleted)}
    async with agentrun.connect(place.broker, namespace=place.namespace) as client:
        return {name: [event async for event in client.session(name).events(follow=False)] for name in names}


def _check_turns(notes: list[AnyNote], stored: dict[str, list[agentrun.Event]]) -> None:
    sent = [note for note in notes if isinstance(note, Sent) and note.session in stored]
    assert len({note.turn for note in sent}) > 50
    assert {note.on_busy for note in sent} == {"enqueue", "reject", "interrupt", "rollback", "steer"}
    assert max(Counter(note.turn for note in sent).values()) > 1, "no turn was sent twice"
    assert len({note.text.split()[0] for note in sent}) > 8, "not all sorts of turns were sent"
    assert not [note for note in notes if isinstance(note, Unended)]
    for note in sent:
        request = stored[note.session][note.offset - 1]
        assert isinstance(request.data, TurnRequested)
        assert (request.offset, request.data.turn, request.data.input) == (note.offset, note.turn, note.text)
        assert request.data.on_busy == note.on_busy
    requests = {e.turn for events in stored.values() for e in events if isinstance(e.data, TurnRequested)}
    assert requests == {note.turn for note in sent}, "a turn was accepted, and not noted"
    stops = [note for note in notes if isinstance(note, Stopped)]
    assert {"cancelled", "already_ended", "not_found"} <= {note.status for note in stops}
    assert {"", "never"} <= {note.turn.partition("-")[0] for note in stops}, (
        "no session was stopped, or no made-up turn"
    )
    for note in stops:
        if note.status == "cancelled" and note.session in stored:
            assert isinstance(stored[note.session][note.offset - 1].data, TERMINAL)
    steered = {note.consumed_by is not None for note in notes if isinstance(note, Steered)}
    assert steered == {True, False}


def _check_readers(notes: list[AnyNote], stored: dict[str, list[agentrun.Event]]) -> None:
    joined = {note.reader: note for note in notes if isinstance(note, Joined)}
    got: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for note in notes:
        if isinstance(note, Got):
            got[note.reader].append((note.offset, note.hash))
    assert {note.transport for note in joined.values()} | {"ai"} == {reader.transport for reader in READERS}
    assert any(note.after for note in joined.values()), "no reader began in the middle"
    hashes = {name: [(event.offset, digest(event.raw)) for event in events] for name, events in stored.items()}
    left = [note for note in notes if isinstance(note, Left)]
    assert {note.reader for note in left} == joined.keys()
    for note in left:
        reader = joined[note.reader]
        if reader.session not in stored:
            continue
        events = hashes[reader.session][reader.after :]
        if note.whole:
            assert note.upto == len(stored[reader.session])
            assert got[note.reader] == events, note
        else:
            assert got[note.reader] == events[: len(got[note.reader])], note
    assert sum(note.whole for note in left) > 10
    said = [note for note in notes if isinstance(note, Said) and note.session in stored]
    assert said
    for note in said:
        ends = [e.data for e in stored[note.session] if isinstance(e.data, TERMINAL) and e.data.turn == note.turn]
        assert [end.message.text for end in ends] == [note.text]
