"""A whole run: the stage, the load, the faults, and the judgement."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import anyio
import anyio.to_thread

from tests.chaos.checker import Report, check
from tests.chaos.evidence import Began, Notebook, read_notes
from tests.chaos.faults import Faults
from tests.chaos.load import Scale, open_load
from tests.chaos.mutants import break_promise
from tests.chaos.stage import Setup, open_stage

DRAIN = 60.0
"""Seconds sessions get to come to rest once nothing is broken any more, beside two turns of the longest."""


class Outcome(NamedTuple):
    """How a run went."""

    report: Report
    failure: Exception | None
    """What ended the load before its time: a client or reader was told what it never may be told."""


async def play(
    setup: Setup,
    scale: Scale,
    *,
    seconds: float,
    pace: float = 2.0,
    kinds: Sequence[str] = (),
    surely: Sequence[str] = (),
) -> Outcome:
    """Run, and judge what was noted. The notes, and what the processes logged, stay in the setup's folder.

    Args:
        setup: What is put on the stage.
        scale: How much load.
        seconds: How long things are broken for.
        pace: Seconds between two faults, on average.
        kinds: Of faults; default: all.
        surely: Kinds that happen in any case, one after the other, before others do.
    """
    if setup.mutant:
        break_promise(setup.mutant)  # in the load's readers
    setup.folder.mkdir(parents=True, exist_ok=True)
    book = Notebook(setup.folder, "stage")
    failure: Exception | None = None
    try:
        async with open_stage(setup, book) as stage:
            book.note(Began(seed=setup.seed))
            until = time.monotonic() + seconds
            faults = Faults(stage, book, random.Random(f"{setup.seed} faults"), pace=pace, kinds=kinds, surely=surely)
            try:
                async with open_load(stage.place, book, random.Random(f"{setup.seed} load"), scale) as load:
                    async with anyio.create_task_group() as group:

                        async def break_things() -> None:
                            await faults.run(until)
                            await stage.heal()

                        group.start_soon(break_things)
                        await load.drive(until=until)
                    await load.drain(patience=DRAIN + 2 * scale.longest)
            except Exception as error:
                failure = error
                await stage.heal()
            await stage.dump()
    finally:
        book.close()
    return Outcome(await anyio.to_thread.run_sync(lambda: check(read_notes(setup.folder))), failure)
