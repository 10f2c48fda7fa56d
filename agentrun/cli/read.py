"""``agentrun tail``, ``history`` and ``delete``: a session's log."""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import Any

import anyio
import click
import msgspec

from agentrun.cli.common import App, Fatal, command, json_option, option, session_argument, until_nobody_reads
from agentrun.cli.lines import clean, event_line, said
from agentrun.cli.render import Renderer, Screen
from agentrun.client import Event
from agentrun.history import TurnView


@command("tail")
@session_argument
@option("--after", type=click.IntRange(min=0), default=0, show_default=True, help="The last offset seen.")
@option("--follow/--no-follow", default=True, show_default=True, help="Go on with events to come.")
@json_option
async def tail(app: App, session: str, after: int, follow: bool, as_json: bool) -> None:
    """Print the events of SESSION behind an offset: a line each, in order, none missing without a line that says so.

    With --json: {"offset": …, "time": …, "event": the event's JSON as it was stored}.
    """
    async with (
        app.client() as client,
        anyio.create_task_group() as group,
        aclosing(client.session(session).events(after, follow=follow)) as events,
    ):
        group.start_soon(until_nobody_reads)
        async for event in events:
            if as_json:
                sys.stdout.buffer.write(event_line(event))
                sys.stdout.buffer.flush()
            else:
                click.echo(_line(event))
        group.cancel_scope.cancel()


def _line(event: Event) -> str:
    data = event.data
    attempt = getattr(data, "attempt", 0)
    line = f"{event.offset:>6}  {event.type:<16} {f'#{attempt}' if attempt else '':<3} {said(event)}"
    return clean(line).rstrip()


@command("history")
@session_argument
@json_option
async def history(app: App, session: str, as_json: bool) -> None:
    """Print the conversation of SESSION: what was said, turn by turn, and how each turn ended.

    Turns that were replaced are there as well, and marked.

    With --json also the state of each turn, and the chat messages that a model gets.
    """
    async with app.client() as client:
        folded = await client.session(session).history()
    if not folded.turns:
        raise Fatal(f"session {session} has no turns")
    if as_json:
        turns = [_turn(view) for view in folded.turns.values()]
        body = {"session": session, "offset": folded.offset, "turns": turns, "messages": folded.messages()}
        click.echo(msgspec.json.encode(body))
        return
    Renderer(Screen(sys.stdout, sys.stdout), history=folded, own=()).recap(limit=len(folded.turns))


def _turn(view: TurnView) -> dict[str, Any]:
    request = view.request
    questions = [q.event for q in view.questions.values() if q.answer is None and not view.ended]
    return {
        "turn": view.id,
        "offset": view.offset,
        "agent": view.agent,
        "state": view.state,
        "attempt": view.attempt,
        "worker": view.worker,
        "input": request.input if request is not None else None,
        "message": view.message,
        "usage": view.usage,
        "error": view.error,
        "finish_reason": view.finish_reason,
        "by": view.by,
        "reason": view.reason,
        "ended_at": view.ended_at,
        "consumed_by": view.consumed_by,
        "replaced_by": view.replaced_by,
        "questions": questions,
    }


@command("delete")
@session_argument
@option("--yes", is_flag=True, help="Do not ask.")
async def delete(app: App, session: str, yes: bool) -> None:
    """Remove every record of SESSION. A turn that runs is stopped as soon as its worker notices."""
    async with app.client() as client:
        target = client.session(session)
        if not yes:
            if not sys.stdin.isatty():
                raise Fatal(f"this removes session {session} for good: give --yes", 2)
            click.confirm(f"Remove session {session} for good?", abort=True)
        await target.delete()
    click.echo(f"session {session} is removed")
