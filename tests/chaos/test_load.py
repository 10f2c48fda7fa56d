"""The load against one worker and one gateway that nothing befalls: what it notes is what is stored."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import agentrun
from agentrun.brokers.server import NatsServer
from agentrun.wire import TERMINAL, TurnCancelled, TurnRequested
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

pytestmark = pytest.mark.timeout(180)

SORTS = ("count", "silent", "tool", "flaky", "approve", "steer", "stubborn", "retry", "fail", "hello,")
ROUNDS, SECONDS = 12, 8
SCALE = Scale(sessions=12, readers=4, think=0.3, life=6, longest=3)


@pytest.fixture
def place(nats_server: NatsServer, tmp_path: Path) -> Iterator[Place]:
    """A worker and a gateway."""
    cli = new_cli(nats_server.url)
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
        for _ in range(ROUNDS):
            await load.drive(until=time.monotonic() + SECONDS)
            if not _lacks(list(read_notes(place.folder))):
                break
        await load.drain(patience=60)
    book.close()
    notes = list(read_notes(place.folder))
    assert not _lacks(notes)
    stored = await _stored(place, notes)
    _check_turns(notes, stored)
    _check_readers(notes, stored)


def _lacks(notes: list[AnyNote]) -> list[str]:
    """What of a load did not happen yet."""
    sent = [note for note in notes if isinstance(note, Sent)]
    joined = [note for note in notes if isinstance(note, Joined)]
    stops = [note for note in notes if isinstance(note, Stopped)]
    happened = {
        "all policies": {note.on_busy for note in sent} == {"enqueue", "reject", "interrupt", "rollback", "steer"},
        "all sorts of turns": {note.text.split()[0] for note in sent} >= set(SORTS),
        "a turn sent twice": len(sent) > len({note.turn for note in sent}),
        "a deadline": any(note.deadline for note in sent),
        "all receipts": {note.status for note in stops} >= {"cancelled", "already_ended", "not_found"},
        "a stop of a session, and of a made-up turn": {note.turn.partition("-")[0] for note in stops} >= {"", "never"},
        "steering taken and not": len({note.consumed_by is None for note in notes if isinstance(note, Steered)}) == 2,
        "all transports": {note.transport for note in joined} | {"ai"} == {reader.transport for reader in READERS},
        "a reader that began in the middle": any(note.after for note in joined),
        "a reader that resumed": len(joined) > len({note.reader for note in joined}),
        "a reader that left early": any(isinstance(note, Left) and not note.whole for note in notes),
        "an answer by the AI SDK": any(isinstance(note, Said) for note in notes),
    }
    return [what for what, has in happened.items() if not has]


async def _stored(place: Place, notes: list[AnyNote]) -> dict[str, list[agentrun.Event]]:
    """All events of all sessions that were not deleted."""
    names = {note.session for note in notes if isinstance(note, Sent)}
    names -= {note.session for note in notes if isinstance(note, Deleted)}
    async with agentrun.connect(place.broker, namespace=place.namespace) as client:
        return {name: [event async for event in client.session(name).events(follow=False)] for name in names}


def _check_turns(notes: list[AnyNote], stored: dict[str, list[agentrun.Event]]) -> None:
    sent = [note for note in notes if isinstance(note, Sent) and note.session in stored]
    assert not [note for note in notes if isinstance(note, Unended)]
    for note in sent:
        request = stored[note.session][note.offset - 1]
        assert isinstance(request.data, TurnRequested)
        assert (request.offset, request.data.turn, request.data.input) == (note.offset, note.turn, note.text)
        assert request.data.on_busy == note.on_busy
    requests = {e.turn for events in stored.values() for e in events if isinstance(e.data, TurnRequested)}
    assert requests == {note.turn for note in sent}, "a turn was accepted, and not noted"
    for note in notes:
        if isinstance(note, Stopped) and note.status == "cancelled" and note.session in stored:
            assert isinstance(stored[note.session][note.offset - 1].data, TurnCancelled)


def _check_readers(notes: list[AnyNote], stored: dict[str, list[agentrun.Event]]) -> None:
    began = {note.reader: note for note in reversed(notes) if isinstance(note, Joined)}
    got: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for note in notes:
        if isinstance(note, Got):
            got[note.reader].append((note.offset, note.hash))
    hashes = {name: [(event.offset, digest(event.raw)) for event in events] for name, events in stored.items()}
    left = [note for note in notes if isinstance(note, Left) and began[note.reader].session in stored]
    assert any(note.whole for note in left)
    for note in left:
        reader = began[note.reader]
        events = hashes[reader.session][reader.after :]
        if note.whole:
            assert note.upto == len(stored[reader.session])
            assert got[note.reader] == events, note
        else:
            assert got[note.reader] == events[: len(got[note.reader])], note
    for note in notes:
        if isinstance(note, Said) and note.session in stored:
            ends = [e.data for e in stored[note.session] if isinstance(e.data, TERMINAL) and e.data.turn == note.turn]
            assert [end.message.text for end in ends] == [note.text]
