"""``agentrun setup``, ``sessions`` and ``status``: what an operator does."""

from __future__ import annotations

import time
from typing import Any

import click
import msgspec

from agentrun import brokers
from agentrun import dead as dead_turns
from agentrun.broker import BrokerAdmin, QueueStats
from agentrun.brokers.streams import Streams
from agentrun.cli._workers import UNREADABLE, ask_workers
from agentrun.cli.common import App, Fatal, command, duration, json_option, option
from agentrun.cli.lines import columns
from agentrun.errors import InvalidInput
from agentrun.reading import ends_of
from agentrun.worker import WorkerInfo

LOOKED_AT = 10_000
"""Sessions whose ends ``agentrun sessions`` looks up to find the newest."""


@command("setup")
@option("--partitions", type=click.IntRange(1, 64), help="Streams the sessions are spread over; final. Default 1.")
@option("--replicas", type=click.Choice(["1", "3", "5"]), help="NATS: servers each stream is stored on. Default 1.")
@option("--delta-ttl", type=duration, help="How long tokens stay beside the messages they add up to. Default 1h.")
@option("--max-age", type=duration, help="NATS: after what time every record is removed; 0: never. Default 0.")
@option("--dedupe-window", type=duration, help="For how long the id of an input is remembered. Default 2h.")
@option("--dry-run", is_flag=True, help="Only say what would be done.")
@json_option
async def setup(
    app: App,
    partitions: int | None,
    replicas: str | None,
    delta_ttl: float | None,
    max_age: float | None,
    dedupe_window: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Create or update what the namespace needs at the broker. Done again it changes nothing.

    What is not given stays as it is, or gets the default where there is nothing yet.
    """
    app.log("error")
    streams = Streams(
        partitions=partitions,
        replicas=None if replicas is None else int(replicas),
        max_age=max_age,
        dedupe_window=dedupe_window,
        delta_ttl=delta_ttl,
    )
    done = await set_up(app.url, app.namespace, streams, dry_run=dry_run)
    if as_json:
        click.echo(msgspec.json.encode({"dry_run": dry_run, "done": done}))
        return
    for line in done:
        click.echo(f"would {line}" if dry_run else line)
    if not done:
        click.echo(f"namespace {app.namespace} is set up as asked, nothing to do")


async def set_up(url: str, namespace: str, streams: Streams, *, dry_run: bool = False) -> list[str]:
    """Connect to where nothing may be yet, and make what is needed.

    Raises:
        Fatal: This kind of broker has no such setting.
    """
    if url.startswith("memory:"):
        raise Fatal("a broker in memory needs no setup", 2)
    made: dict[str, Any] = {"streams": streams}
    if url.startswith("sqlite:"):
        if streams != Streams():
            raise Fatal("what a file keeps, and for how long, is fixed: give no options", 2)
        made = {}
    try:
        unset = brokers.connect(url, namespace=namespace, check=False, **made)
    except InvalidInput as error:
        raise Fatal(str(error), 2) from error
    async with unset as broker:
        assert isinstance(broker, BrokerAdmin)
        return await broker.setup(dry_run=dry_run)


@command("sessions")
@option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many to show.")
@json_option
async def sessions(app: App, limit: int, as_json: bool) -> None:
    """List the sessions, newest first: the offset and the time of the last record, and whether there is work left.

    The broker lists all sessions it has, and each one's end is looked up: for operators, not for programs that do it
    often.
    """
    async with app.client() as client:
        if not isinstance(client.broker, BrokerAdmin):
            raise Fatal("this broker cannot list its sessions")
        names = await client.broker.sessions(limit=LOOKED_AT)
        ends = await ends_of(client.broker.log, names)
    newest = sorted(ends, key=lambda name: ends[name].time, reverse=True)[:limit]
    cut = len(names) >= LOOKED_AT
    if cut:
        click.echo(f"{LOOKED_AT} sessions were looked at, there may be more", err=True)
    if as_json:
        body = [
            {"session": name, "offset": ends[name].offset, "time": ends[name].time, "busy": bool(ends[name].pending)}
            for name in newest
        ]
        click.echo(msgspec.json.encode({"namespace": app.namespace, "sessions": body, "cut": cut}))
        return
    rows = [(name, ends[name].offset, _when(ends[name].time), "busy" if ends[name].pending else "") for name in newest]
    for line in columns(("session", "offset", "last record", ""), rows) if rows else ["none"]:
        click.echo(line)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@command("status")
@option("--wait", type=duration, default=0.5, show_default="500ms", help="How long workers get to answer.")
@json_option
async def status(app: App, wait: float, as_json: bool) -> None:
    """Show the agents' queues, the workers that answer, the turns they run, and how many gave up."""
    async with app.client() as client:
        broker = client.broker
        queues = list(await broker.stats()) if isinstance(broker, BrokerAdmin) else []
        answers = await ask_workers(broker.signals, wait=wait)
        dead = await dead_turns.count(broker.log)
    if answers.unreadable:
        click.echo(UNREADABLE.format(answers.unreadable), err=True)
    if as_json:
        body = {"namespace": app.namespace, "agents": queues, "workers": answers.workers, "dead": dead}
        click.echo(msgspec.json.encode(body))
        return
    for title, lines in _tables(queues, answers.workers):
        click.echo(click.style(title, bold=True))
        for line in lines:
            click.echo(f"  {line}")
    if dead:
        click.echo(f"{dead} gave up, see agentrun dead list")


def _tables(queues: list[QueueStats], workers: list[WorkerInfo]) -> list[tuple[str, list[str]]]:
    running: list[tuple[Any, ...]] = [
        (turn.session, turn.turn, turn.agent, turn.attempt, f"{turn.seconds:.1f}s", worker.worker)
        for worker in workers
        for turn in worker.running
    ]
    tables = (
        (
            "agents",
            ("agent", "waiting", "leased", "lease"),
            [(q.agent, q.waiting, q.leased, f"{q.lease_ttl:g}s") for q in queues],
        ),
        (
            "workers",
            ("worker", "host", "pid", "agents", "busy", "state"),
            [(w.worker, w.host, w.pid, ",".join(w.agents), f"{len(w.running)}/{w.slots}", _state(w)) for w in workers],
        ),
        ("running turns", ("session", "turn", "agent", "attempt", "age", "worker"), running),
    )
    return [(title, columns(header, rows) if rows else ["none"]) for title, header, rows in tables]


def _state(worker: WorkerInfo) -> str:
    return "draining" if worker.draining else "up"
