"""``agentrun send``, ``cancel`` and ``answer``: what a client does to a session."""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import Any, get_args

import anyio
import click
import msgspec

from agentrun import wire
from agentrun.cli.common import (
    App,
    Fatal,
    agent_option,
    command,
    duration,
    json_option,
    option,
    pick_agent,
    session_argument,
    until_nobody_reads,
)
from agentrun.cli.lines import event_line
from agentrun.cli.render import Renderer, Screen
from agentrun.client import Session, Turn
from agentrun.errors import InvalidInput, TurnNotFound
from agentrun.history import Question
from agentrun.settings import ClientSettings

EXIT_CODES = {"cancelled": 0, "already_ended": 0, "not_found": 1, "pending": 3}
"""Of ``agentrun cancel``, by receipt."""

_SETTINGS = ClientSettings()

PATIENCE = 3.0
"""Seconds after which somebody who waits is told that no worker has taken the turn."""


@command("send")
@session_argument
@click.argument("text")
@agent_option
@option("--id", "turn_id", metavar="ID", help="The turn's id: sent again under it, nothing happens twice.")
@option(
    "--on-busy", type=click.Choice(get_args(wire.OnBusy)), default="enqueue", show_default=True,
    help="What if the session has work.",
)  # fmt: skip
@option("--replaces", metavar="TURN", help="Send it in place of TURN: that and all after it leave the history.")
@option("--deadline", type=duration, help="Time after which the turn expires if it has not ended.")
@option("--user", help="Who sends it, as readers see it.")
@option("--metadata", multiple=True, metavar="KEY=VALUE", help="For the agent or readers; may be repeated.")
@option("--json-input", is_flag=True, help="TEXT is JSON.")
@option("--follow/--no-follow", default=True, show_default=True, help="Print the answer as it streams.")
@json_option
async def send(
    app: App,
    session: str,
    text: str,
    agent: str | None,
    turn_id: str | None,
    on_busy: wire.OnBusy,
    replaces: str | None,
    deadline: float | None,
    user: str | None,
    metadata: tuple[str, ...],
    json_input: bool,
    follow: bool,
    as_json: bool,
) -> int:
    """Send TEXT (- reads stdin) to SESSION as a turn, and print the answer as it streams.

    The answer goes to stdout, everything else to stderr. Leaving with Ctrl-C does not stop the turn. Exit codes: 0 it
    completed (or was sent, with --no-follow), 1 it ended in another way.
    """
    value = _input_of(text, json_input)
    pairs = dict(_pair(item) for item in metadata)
    async with app.client() as client:
        target = client.session(session)
        turn = await target.send(
            value,
            agent=await pick_agent(client, agent),
            id=turn_id,
            on_busy=on_busy,
            replaces=replaces,
            deadline=deadline,
            user=user,
            metadata=pairs,
        )
        if follow:
            return await _follow(turn, as_json)
    if as_json:
        click.echo(msgspec.json.encode({"session": session, "turn": turn.id, "offset": turn.offset}))
    else:
        click.echo(f"turn {turn.id} at offset {turn.offset}")
    return 0


def _input_of(text: str, json_input: bool) -> Any:
    if text == "-":
        text = sys.stdin.read()
    if not json_input:
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise Fatal(f"--json-input: TEXT is not JSON: {error}", 2) from error


def _pair(item: str) -> tuple[str, str]:
    key, sign, value = item.partition("=")
    if not sign or not key:
        raise Fatal(f"--metadata takes KEY=VALUE, not {item!r}", 2)
    return key, value


async def _follow(turn: Turn, as_json: bool) -> int:
    screen = Screen(sys.stdout, sys.stderr)
    renderer = Renderer(screen, answer_hint=f"agentrun answer {turn.session.id}")

    async def notice() -> None:
        await anyio.sleep(PATIENCE)
        if renderer.history.turns[turn.id].attempt == 0:
            screen.line("no worker has taken the turn yet; it waits (agentrun status shows who is there)")

    try:
        async with anyio.create_task_group() as group, aclosing(turn.events()) as events:
            group.start_soon(until_nobody_reads)
            async for event in events:
                if as_json:
                    sys.stdout.buffer.write(event_line(event))
                    sys.stdout.buffer.flush()
                    renderer.history.apply(event.offset, event.data, time=event.time)
                else:
                    renderer.show(event)
                if event.offset == turn.offset:
                    group.start_soon(notice)
            group.cancel_scope.cancel()
    except anyio.get_cancelled_exc_class():
        screen.line(f"the turn goes on; to stop it: agentrun cancel {turn.session.id} {turn.id}")
        raise
    return 0 if renderer.history.turns[turn.id].state in ("completed", "consumed") else 1


@command("cancel")
@session_argument
@click.argument("turn", required=False)
@option("--by", help="Who stops it, as readers see it.")
@option("--reason", help="Why.")
@option(
    "--wait", type=duration, default=f"{_SETTINGS.cancel_wait:g}s", show_default=True,
    help="Time after which a stop without an outcome is reported as pending.",
)  # fmt: skip
@json_option
async def cancel(
    app: App, session: str, turn: str | None, by: str | None, reason: str | None, wait: float, as_json: bool
) -> int:
    """Stop TURN of SESSION, or without TURN all that was sent before; print the receipt.

    Exit codes: 0 cancelled or already_ended, 1 not_found, 3 pending (stored, and obeyed by whoever runs it next).
    """
    async with app.client(msgspec.structs.replace(_SETTINGS, cancel_wait=wait)) as client:
        target = client.session(session)
        stop = target.cancel if turn is None else target.turn(turn).cancel
        receipt = await stop(by=by, reason=reason)
    if as_json:
        click.echo(msgspec.json.encode(receipt))
    else:
        where = f" at offset {receipt.offset}" if receipt.offset else ""
        click.echo(f"{receipt.status}{where}, {receipt.took * 1000:.1f} ms")
    return EXIT_CODES[receipt.status]


@command("answer")
@session_argument
@click.argument("turn")
@click.argument("words", nargs=-1, required=True, metavar="[REQUEST] VALUE")
@option("--user", help="Who answers, as readers see it.")
@json_option
async def answer(app: App, session: str, turn: str, words: tuple[str, ...], user: str | None, as_json: bool) -> None:
    """Answer a question of TURN with VALUE: yes or no, one of its choices, text, or JSON for a tool.

    REQUEST may be left out where one question is open.
    """
    request, value = (None, words[0]) if len(words) == 1 else words[:2]
    if len(words) > 2:
        raise Fatal(f"after TURN come REQUEST and VALUE, not {len(words)} words: quote a value of several", 2)
    async with app.client() as client:
        target = client.session(session).turn(turn)
        question = await _question(target.session, turn, request)
        offset = await target.answer(question.event.request, parse_answer(question.event, value), user=user)
    if as_json:
        click.echo(msgspec.json.encode({"request": question.event.request, "offset": offset}))
    else:
        click.echo(f"{question.event.request} is answered at offset {offset}")


async def _question(session: Session, turn: str, request: str | None) -> Question:
    view = (await session.history()).turns.get(turn)
    if view is None:
        raise TurnNotFound(f"session {session.id} has no turn {turn}")
    asked = ", ".join(view.questions) or "none"
    if request is not None:
        if request not in view.questions:
            raise Fatal(f"turn {turn} has no question {request} (its questions: {asked})")
        return view.questions[request]
    waiting = [q for q in view.questions.values() if q.answer is None and not view.ended]
    if len(waiting) != 1:
        raise Fatal(f"turn {turn} has {len(waiting)} open questions, name one (its questions: {asked})")
    return waiting[0]


def parse_answer(question: wire.InputRequired, text: str) -> Any:
    """What a person wrote, as the value that answers the question.

    Raises:
        InvalidInput: It is neither yes nor no, or none of the choices.
    """
    word = text.strip()
    match question.kind:
        case "approval":
            if word.startswith("{"):
                return _json(word)
            if word.lower() in ("y", "yes", "true", "n", "no", "false"):
                return word.lower() in ("y", "yes", "true")
            raise InvalidInput(f"answer yes or no, not {word[:40]!r}")
        case "choice":
            choices = question.choices or []
            if word not in choices and word.isdecimal() and 1 <= int(word) <= len(choices):
                return choices[int(word) - 1]
            if word not in choices:
                raise InvalidInput(f"answer one of {', '.join(choices)}; not {word[:40]!r}")
            return word
        case "text":
            return text
        case "tool":
            return _json(text)


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
