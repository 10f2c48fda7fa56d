"""``agentrun dead``: turns that gave up."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import aclosing

import anyio
import click
import msgspec

from agentrun.cli.common import App, Fatal, command, json_option, option
from agentrun.cli.lines import clean, columns, short
from agentrun.client import Client, DeadTurn
from agentrun.errors import AgentrunError

_AT_ONCE = 16
"""Sessions whose turns are sent again side by side."""
_SETTLED_AT_ONCE = 100

agent_filter = option("--agent", metavar="NAME", help="Only turns for this agent.")
all_option = option("--all", "everything", is_flag=True, help="All that are on the list.")


@click.group("dead")
def dead() -> None:
    """List the turns that gave up; send them again, or take them off the list."""


@command("list")
@option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many to show.")
@agent_filter
@json_option
async def list_dead(app: App, limit: int, agent: str | None, as_json: bool) -> None:
    """List the turns that gave up, the oldest first, and why.

    Turns that their agent failed on purpose are not among them: that is an answer.
    """
    found: list[DeadTurn] = []
    more = False
    async with app.client() as client, aclosing(client.dead(agent=agent)) as turns:
        async for turn in turns:
            if more := len(found) == limit:
                break
            found.append(turn)
    if more:
        click.echo(f"there are more than {limit}: --limit shows them", err=True)
    if as_json:
        click.echo(msgspec.json.encode({"namespace": app.namespace, "dead": [_body(turn) for turn in found]}))
        return
    header = ("session", "turn", "agent", "gave up", "attempts", "code", "message")
    rows = [(t.session, t.turn, t.agent, _when(t.time), t.attempts, t.code, clean(short(t.message))) for t in found]
    for line in columns(header, rows) if rows else ["none"]:
        click.echo(line)


def _body(turn: DeadTurn) -> dict[str, object]:
    names = ("session", "turn", "agent", "offset", "code", "message", "attempts", "time")
    return {name: getattr(turn, name) for name in names}


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@command("retry")
@click.argument("session", required=False)
@click.argument("turn", required=False)
@all_option
@agent_filter
async def retry(app: App, session: str | None, turn: str | None, everything: bool, agent: str | None) -> int:
    """Send TURN of SESSION again, or --all: with the same input, in the place of the turn that gave up.

    Where the conversation has gone on since, it is added to its end. Done again it sends nothing twice.
    """
    _check(session, turn, everything, agent)
    async with app.client() as client:
        found = await _find(client, session, turn, agent)
        failed = await _retry(client, found)
    return 1 if failed else 0


async def _retry(client: Client, found: list[DeadTurn]) -> int:
    """Send them again, the sessions side by side; each prints its outcome. Return how many could not be sent."""
    by_session: dict[str, list[DeadTurn]] = {}
    for entry in found:
        by_session.setdefault(entry.session, []).append(entry)
    left = iter(by_session.values())
    failed = 0

    async def work() -> None:
        nonlocal failed
        for entries in left:
            for entry in entries:
                try:
                    (turn,) = await client.retry_dead(entry)
                    click.echo(f"turn {entry.turn} of session {entry.session} is sent again as {turn.id}")
                except AgentrunError as error:
                    failed += 1
                    click.echo(f"agentrun: {' '.join(str(error).split())}", err=True)

    async with anyio.create_task_group() as group:
        for _ in range(_AT_ONCE):
            group.start_soon(work)
    return failed


@command("drop")
@click.argument("session", required=False)
@click.argument("turn", required=False)
@all_option
@agent_filter
async def drop(app: App, session: str | None, turn: str | None, everything: bool, agent: str | None) -> None:
    """Take TURN of SESSION off the list, or --all. The session itself stays as it is."""
    _check(session, turn, everything, agent)
    async with app.client() as client:
        found = await _find(client, session, turn, agent)
        for begin in range(0, len(found), _SETTLED_AT_ONCE):
            await client.drop_dead(*found[begin : begin + _SETTLED_AT_ONCE])
    click.echo(f"{len(found)} dropped")


def _check(session: str | None, turn: str | None, everything: bool, agent: str | None) -> None:
    if everything == (turn is not None) or (everything and session is not None):
        raise Fatal("which turns? Give SESSION and TURN, or --all", 2)
    if agent is not None and not everything:
        raise Fatal("--agent goes with --all", 2)


async def _find(client: Client, session: str | None, turn: str | None, agent: str | None) -> list[DeadTurn]:
    async with aclosing(client.dead(session=session, turn=turn, agent=agent)) as turns:
        found = [entry async for entry in turns]
    if turn is not None and not found:
        raise Fatal(f"turn {turn} of session {session} is not among those that gave up (agentrun dead list)")
    return found


_commands: Iterable[click.Command] = (list_dead, retry, drop)
for _command in _commands:
    dead.add_command(_command)
