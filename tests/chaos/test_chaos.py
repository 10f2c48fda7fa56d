"""The short form of ``make chaos``: everything breaks and every promise holds; one promise is broken and it shows."""

from __future__ import annotations

import random
from pathlib import Path

import anyio
import pytest

from agentrun import Turn
from tests.chaos.checker import Rule, check
from tests.chaos.evidence import Acked, read_notes
from tests.chaos.load import Scale
from tests.chaos.play import Outcome, play
from tests.chaos.readers import EventStream
from tests.chaos.scene import Scene, open_scene
from tests.chaos.stage import Setup

pytestmark = pytest.mark.timeout(240)

SCALE = Scale(sessions=10, think=0.5, life=10, longest=5)


async def test_promises_hold_while_processes_and_connections_break(tmp_path: Path) -> None:
    setup = Setup(folder=tmp_path, seed=7)
    surely = ("kill", "server crash", "suspend", "cable silent")
    _assert_kept(await play(setup, SCALE, seconds=20, pace=1.5, surely=surely), surely)


async def test_promises_hold_while_a_cluster_loses_its_leader(tmp_path: Path) -> None:
    setup = Setup(folder=tmp_path, seed=8, broker="nats cluster")
    surely = ("kill", "leader crash", "leader steps down", "leader parted")
    _assert_kept(await play(setup, SCALE, seconds=30, pace=2.0, surely=surely), surely)


async def test_promises_hold_on_valkey_while_it_breaks_and_fails_over(tmp_path: Path) -> None:
    setup = Setup(folder=tmp_path, seed=9, broker="valkey")
    surely = ("kill", "server crash", "failover", "clients killed", "scripts flushed", "server suspend")
    _assert_kept(await play(setup, SCALE, seconds=25, pace=1.5, surely=surely), surely)


def _assert_kept(outcome: Outcome, happened: tuple[str, ...]) -> None:
    if outcome.failure is not None:
        raise outcome.failure
    report = outcome.report
    figures = report.figures
    assert not report.violations, report.table
    assert set(happened) <= figures.faults.keys()
    assert sum(figures.turns.values()) > 20
    assert figures.events > 200
    assert figures.takeovers.count > 0


def rules(folder: Path) -> set[Rule]:
    """What was found to be broken."""
    return {violation.rule for violation in check(read_notes(folder)).violations}


async def _all_have(scene: Scene, turns: list[Turn], attempt: int) -> dict[str, int]:
    """Wait for an attempt at each turn; return the offset in each session at which it began."""
    begun: dict[str, int] = {}

    async def wait(turn: Turn) -> None:
        begun[turn.session.id] = await scene.attempt(turn, attempt)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for turn in turns:
                group.start_soon(wait, turn)
    return begun


def _has_stored_behind(folder: Path, life: str, offsets: dict[str, int]) -> bool:
    """Whether a worker was told of a record behind one of these offsets that it is stored."""
    acks = (note for note in read_notes(folder) if isinstance(note, Acked) and note.worker == life)
    return any(ack.offset > offsets.get(ack.session, ack.offset) for ack in acks)


async def test_an_owner_that_is_not_fenced_is_found_out(tmp_path: Path) -> None:
    async with open_scene(tmp_path, mutant="fence", workers=2) as scene:
        first, second = scene.stage.workers
        second.freeze()
        turns = [await scene.send(f"s{n}", "t", "count 300 20") for n in range(6)]
        await _all_have(scene, turns, 1)
        second.thaw()
        first.freeze()
        claims = await _all_have(scene, turns, 2)
        first.thaw()
        with anyio.fail_after(30):
            # What it had sent before it was frozen may be acknowledged only now, and is right.
            while not _has_stored_behind(tmp_path, first.life, claims):  # noqa: ASYNC110 - files ring no bell
                await anyio.sleep(0.02)
    assert rules(tmp_path) & {Rule.OWNER, Rule.DENSE}


async def test_turns_that_overtake_each_other_are_found_out(tmp_path: Path) -> None:
    async with open_scene(tmp_path, mutant="order", workers=2) as scene:
        turns = [await scene.send("s", f"t{n}", "count 500 20") for n in range(3)]
        await _all_have(scene, turns, 1)
    assert rules(tmp_path) & {Rule.ORDER, Rule.OWNER}


async def test_a_reader_that_misses_events_is_found_out(tmp_path: Path) -> None:
    async with open_scene(tmp_path, mutant="join", workers=1) as scene:
        turn = await scene.send("s", "t", "count 150 20")
        place = scene.stage.place
        reader = EventStream(place, scene.client, scene.book, random.Random(3), name="r", session="s")
        async with anyio.create_task_group() as group:
            group.start_soon(reader.run)
            with anyio.fail_after(30):
                while reader.offset < 20:  # noqa: ASYNC110 - it rings no bell
                    await anyio.sleep(0.02)
            for cable in scene.stage.cables["g0"]:
                cable.cut()
            await anyio.sleep(0.5)
            for cable in scene.stage.cables["g0"]:
                cable.restore()
            result = await turn.result(30)
            reader.finish(result.offset)
            with anyio.move_on_after(2):
                await reader.ended.wait()
            reader.leave()
    assert Rule.READER in rules(tmp_path)


async def test_a_stop_that_nobody_looks_for_is_found_out(tmp_path: Path) -> None:
    async with open_scene(tmp_path, mutant="cancel", workers=2) as scene:
        for worker in scene.stage.workers:
            worker.freeze()
        turn = await scene.send("s", "t", "count 5 20")
        receipt = await turn.cancel()
        assert receipt.status == "pending"
        for worker in scene.stage.workers:
            worker.thaw()
        await _all_have(scene, [turn], 1)
    assert Rule.STOP in rules(tmp_path)


async def test_nothing_outlives_a_run_that_fails(tmp_path: Path) -> None:
    left: list[Scene] = []

    async def fail() -> None:
        async with open_scene(tmp_path, mutant="cancel", workers=1) as scene:
            left.append(scene)
            scene.stage.workers[0].freeze()
            raise ValueError("as a fault of the harness would")

    with pytest.raises(ExceptionGroup):
        await fail()
    stage = left[0].stage
    assert len(stage.processes) == 2
    assert not any(process.alive for process in stage.processes)
    assert all(server.pid is None for server in stage.servers.all)
