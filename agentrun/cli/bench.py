"""``agentrun bench``: what this machine and broker do, through separate processes."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any

import click
import msgspec
from rich.console import Console

from agentrun.cli._bench_faults import bench_resume, bench_takeover
from agentrun.cli._bench_gateway import bench_gateway
from agentrun.cli._bench_load import Options, Run, bench_cancel, bench_tokens, bench_turns, open_run
from agentrun.cli._bench_report import Report, machine, show_machine, show_rows
from agentrun.cli._bench_scale import bench_scale
from agentrun.cli._bench_telemetry import bench_telemetry
from agentrun.cli._place import Place, broker_option, chosen_url, open_place, shown, version
from agentrun.cli.common import App, Fatal, command, duration, json_option, option

_BENCHES: dict[str, Callable[[Run], Awaitable[None]]] = {
    "turns": bench_turns,
    "tokens": bench_tokens,
    "cancel": bench_cancel,
    "resume": bench_resume,
    "takeover": bench_takeover,
    "gateway": bench_gateway,
    "telemetry": bench_telemetry,
    "scale": bench_scale,
}


_INSIDE = ("turns", "tokens", "cancel", "resume")
"""What needs no worker that is a process."""


class _Counts(click.ParamType[tuple[int, ...]]):
    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            counts = tuple(int(item) for item in str(value).split(","))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1:
            self.fail(f"{value!r} is no list of numbers such as 1,20,50", param, ctx)
        return counts


@command("bench", uvloop=True)
@click.argument("what", type=click.Choice([*_BENCHES, "all"]))
@option("--sessions", type=_Counts(), help="Sessions side by side, a row for each number.  [default: the bench's own]")
@broker_option
@option(
    "--workers", type=click.IntRange(0), default=1, show_default=True,
    help="Worker processes (takeover: 2); 0: one worker within the process of the bench.",
)  # fmt: skip
@option("--seconds", type=duration, default=10.0, show_default="10s", help="Length of a measured turn of tokens.")
@option("--rate", type=click.IntRange(1), default=50, show_default=True, help="Tokens a second of each session.")
@option(
    "--rounds",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Turns, stops or reads per session; telemetry: of four, one pair.",
)
@option("--lease", type=duration, default=3.0, show_default="3s", help="takeover: the workers' lease time.")
@option("--kills", type=click.IntRange(1), default=5, show_default=True, help="takeover: workers that are killed.")
@option("--events", type=click.IntRange(200), default=10_000, show_default=True, help="resume, gateway: events stored.")
@option("--readers", type=click.IntRange(1), help="resume: readers that join late [100]; gateway: of one stream [500].")
@option("--clients", type=_Counts(), default="1000,5000", show_default=True, help="gateway: clients that wait.")
@option("--small", is_flag=True, help="scale: a hundredth of everything, to try it.")
@json_option
async def bench(
    app: App,
    what: str,
    kind: str | None,
    sessions: tuple[int, ...] | None,
    workers: int,
    seconds: float,
    rate: int,
    rounds: int,
    lease: float,
    kills: int,
    events: int,
    readers: int | None,
    clients: tuple[int, ...],
    small: bool,
    as_json: bool,
) -> int:
    """Measure WHAT, and count what is lost or double.

    turns: send to first token. tokens: yield to reader. cancel: call to receipt. resume: a reader that comes back or
    joins late. takeover: a worker killed in mid-answer. gateway: the same over HTTP, and many clients. telemetry: what
    traces and metrics cost a worker. scale: many sessions, long ones, a long queue.
    docs/performance.md says what each figure is.

    A broker of its own is started (--broker), unless --url is given on the command line: then namespaces bench-… are
    made there, and stay. With --workers 0 also memory:// can be measured. Exit codes: 0 whatever the figures are, 1 if
    anything was lost, double, or not as promised.
    """
    app.log("warning")
    options = Options(
        sessions=sessions, workers=workers, seconds=seconds, rate=rate, rounds=rounds, lease=lease, kills=kills,
        events=events, readers=readers, clients=clients, small=small,
    )  # fmt: skip
    # Not from the environment: a bench must not find its way to a broker that others work with.
    url = chosen_url(app, environment=False)
    if not workers and what not in _INSIDE:
        raise Fatal(f"{what} needs worker processes; with --workers 0 there are {', '.join(_INSIDE)}", 2)
    report = Report(machine(version(kind or "nats") if url is None else shown(url)))
    console = Console()
    if not as_json:
        show_machine(console, report.machine)
    try:
        async with open_place(url, "bench", kind, inside=not workers) as place:
            for name in _BENCHES if what == "all" else (what,):
                before = len(report.rows)
                await _measure(name, options, report, place)
                if not as_json:
                    show_rows(console, report.rows[before:])
    finally:
        if report.worker_log:
            click.echo(f"the workers said:\n{report.worker_log}", err=True)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2))
    for violation in sorted(set(report.violations)):
        click.echo(f"agentrun: promise broken: {violation} ({report.violations.count(violation)}x)", err=True)
    return 1 if report.violations else 0


async def _measure(name: str, options: Options, report: Report, place: Place) -> None:
    console = Console(stderr=True)
    with console.status(name) if sys.stderr.isatty() else nullcontext() as status:

        def say(text: str) -> None:
            if status is not None:
                status.update(text)

        takeover = name == "takeover"
        async with open_run(
            options,
            report,
            place,
            say,
            lease=options.lease if takeover else 30.0,
            workers=max(2, options.workers) if takeover else options.workers,
        ) as run:
            await _BENCHES[name](run)
