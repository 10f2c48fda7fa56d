"""``agentrun demo``: a server and two workers, and what happens when they are treated badly."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import click
from rich.console import Console

from agentrun.cli._demo_acts import (
    Reader,
    Script,
    Show,
    echo_script,
    model_script,
    new_session,
    play_approval,
    play_stop,
    play_stream,
    play_takeover,
    read_again,
)
from agentrun.cli._demo_stage import Stage
from agentrun.cli._fleet import Fleet, open_place
from agentrun.cli.common import App, command, option
from agentrun.client import connect

_LEASE = 2.0


@command("demo", uvloop=True)
@option(
    "--once/--keep", default=True, show_default=True,
    help="End when done; or keep server and workers, for commands of your own, until Ctrl-C.",
)  # fmt: skip
@option("--speed", type=click.FloatRange(0.1, 10), default=1.0, show_default=True, help="2: words come twice as fast.")
async def demo(app: App, once: bool, speed: float) -> int:
    """See it work, on this machine and without any key: a stream, a late reader, a stop, a killed worker, a question.

    A NATS server and two worker processes are started for it. With AGENTRUN_MODEL (and its provider's key) set, a real
    model answers, as in workers/chat.py. Ends with a table of what was counted. Exit codes: 0 all is right, 1 not.
    """
    app.log("error")
    model = os.environ.get("AGENTRUN_MODEL")
    script = model_script() if model else echo_script(speed)
    stage = Stage(Console(highlight=False))
    async with _show(script, stage, f"the model {model}" if model else "an agent without a model") as show:
        await play_stream(show)
        await play_stop(show)
        await play_takeover(show, _LEASE)
        if script.approval is not None:
            await play_approval(show)
        await read_again(show)
        stage.result(show.rows)
        _go_on(show, once)
        if not once:
            await anyio.sleep_forever()
    return 0 if all(good for _, _, good in show.rows) else 1


@asynccontextmanager
async def _show(script: Script, stage: Stage, who: str) -> AsyncGenerator[Show]:
    async with (
        open_place(None, "default") as place,
        connect(place.url, namespace=place.namespace) as client,
        Fleet(place, script.spec, lease=_LEASE, env={"AGENTRUN_TOOLS": ""}) as fleet,
    ):
        stage.say(f"server   {place.url} (nats-server, process {place.server})", "dim")
        workers = await fleet.start(client, 2)
        stage.say(f"workers  processes {' and '.join(str(w.pid) for w in workers)}, {who}", "dim")
        async with anyio.create_task_group() as group:
            session = new_session(client, script.agent)
            reader = Reader(session)
            group.start_soon(reader.run)
            yield Show(
                script=script, stage=stage, place=place, client=client, fleet=fleet, session=session, reader=reader
            )  # fmt: skip
            group.cancel_scope.cancel()


def _go_on(show: Show, once: bool) -> None:
    stage = show.stage
    agentrun = _program()
    stage.say("")
    if once:
        stage.say("Go on with a server and workers that stay, and another terminal:")
        stage.command(f"{agentrun} dev")
        stage.command(f"{agentrun} chat")
        stage.command(f"{agentrun} bench all")
        return
    stage.say("Server and workers stay until Ctrl-C. In another terminal:")
    agentrun = f"{agentrun} --url {show.place.url}"
    stage.command(f"{agentrun} tail {show.session.id}")
    stage.command(f"{agentrun} chat")
    stage.command(f"{agentrun} status")


def _program() -> str:
    """How the person can call us: by name, or by path where the environment is not active."""
    path = Path(sys.argv[0])
    if shutil.which("agentrun") is None and path.name == "agentrun":
        return os.path.relpath(path)
    return "agentrun"
