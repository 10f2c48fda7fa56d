"""``python -m tests.chaos``: a run of some minutes. Exit code 1: a promise was broken."""

from __future__ import annotations

import argparse
import functools
import logging
import random
import sys
import tempfile
import traceback
from pathlib import Path

import anyio

from tests.chaos.load import Scale
from tests.chaos.mutants import MUTANTS
from tests.chaos.play import play
from tests.chaos.stage import Setup


def main() -> int:
    """Run as told, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Break everything; see what holds.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="default: a new one, which is printed")
    parser.add_argument("--broker", choices=("nats", "valkey"), default="nats")
    parser.add_argument("--cluster", action="store_true", help="of NATS: three servers, three replicas")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--sessions", type=int, default=40, help="at once")
    parser.add_argument("--lease", type=float, default=3.0, help="seconds")
    parser.add_argument("--pace", type=float, default=2.0, help="seconds between two faults, on average")
    parser.add_argument("--fault", action="append", default=[], help="only these; see tests/chaos/faults.py")
    parser.add_argument("--mutant", choices=MUTANTS, help="break a promise, and see it found out")
    parser.add_argument("--folder", type=Path, help="for the notes; default: a new one")
    given = parser.parse_args()
    if given.broker != "nats" and (given.cluster or given.mutant):
        parser.error("--cluster and --mutant are for --broker nats")
    seed = given.seed if given.seed is not None else random.randrange(1_000_000)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="agentrun-chaos-"))
    setup = Setup(
        folder=folder,
        seed=seed,
        broker=f"{given.broker} cluster" if given.cluster else given.broker,
        workers=given.workers,
        lease=given.lease,
        mutant=given.mutant,
    )
    print(f"seed {seed}, notes in {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=folder / "load.log", level="WARNING", format="%(asctime)s %(levelname)s %(message)s")
    run = functools.partial(
        play, setup, Scale(sessions=given.sessions), seconds=given.minutes * 60, pace=given.pace, kinds=given.fault
    )
    report, failure = anyio.run(run)
    print(report.table)
    (folder / "figures.json").write_bytes(report.json)
    if failure is not None:
        print("\nand the load was ended by what no client or reader may be told:")
        traceback.print_exception(failure)
    bad = failure is not None or report.violations
    if bad:
        print(f"\nagain, with the same faults: python -m tests.chaos {' '.join(sys.argv[1:])} --seed {seed}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
