"""``agentrun export`` and ``import``: sessions on their way to another broker."""

from __future__ import annotations

import sys
from contextlib import aclosing

import click
import msgspec

from agentrun.cli import stdin, stdout
from agentrun.cli.common import App, Fatal, command, json_option, option
from agentrun.errors import AgentrunError, SessionBusy, SessionGone
from agentrun.moving import all_sessions, export_session, import_sessions


@command("export")
@click.argument("sessions", nargs=-1, metavar="[SESSION]...")
@option("--all", "everything", is_flag=True, help="All sessions of the namespace, and agentrun's own.")
@option("--force", is_flag=True, help="Also what a worker runs that is dead: its turn is handed over.")
async def export(app: App, sessions: tuple[str, ...], everything: bool, force: bool) -> int:
    """Write the SESSIONs to stdout, a line of JSON for each record, to be read by `agentrun import`.

    A session of which a turn is being run is left out, and told on stderr; the exit code is 1 then. Drain the workers
    first, and let nobody send.
    """
    if everything == bool(sessions):
        raise Fatal("which sessions? Name them, or give --all", 2)
    records = left_out = 0
    async with app.client() as client:
        names = await all_sessions(client.broker) if everything else list(dict.fromkeys(sessions))
        for name in names:
            lines = 0
            try:
                async with aclosing(export_session(client.broker, name, force=force)) as exported:
                    async for line in exported:
                        await stdout.write(line)
                        lines += 1
            except (SessionBusy, SessionGone) as error:
                if lines:
                    raise
                left_out += 1
                _say(error)
            records += max(lines - 1, 0)
    click.echo(f"{len(names) - left_out} sessions, {records} records exported", err=True)
    return 1 if left_out else 0


@command("import")
@json_option
async def import_(app: App, as_json: bool) -> int:
    """Store the sessions that `agentrun export` wrote, from stdin, each record at the offset it had.

    Done again it stores what is missing. A session that has other records here is left as it is, and told on stderr;
    the exit code is 1 then.
    """
    if sys.stdin.isatty():
        raise Fatal("what is to be imported comes from stdin: agentrun import < FILE", 2)
    sessions = records = known = refused = 0
    async with app.client() as client, aclosing(import_sessions(client.broker, stdin.lines())) as moves:
        async for moved in moves:
            records += moved.records
            known += moved.known
            if moved.refused is None:
                sessions += 1
            else:
                refused += 1
                _say(moved.refused)
    if as_json:
        click.echo(msgspec.json.encode({"sessions": sessions, "records": records, "known": known, "refused": refused}))
    else:
        click.echo(f"{sessions} sessions, {records} records imported, {known} were there")
    return 1 if refused else 0


def _say(error: AgentrunError) -> None:
    click.echo(f"agentrun: {' '.join(str(error).split())}", err=True)
