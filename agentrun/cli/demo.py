"""``agentrun demo``: a server and two workers, and what happens when they are treated badly."""

from __future__ import annotations

import os
import shutil
import signal
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
    read_over_http,
)
from agentrun.cli._demo_page import served_page
from agentrun.cli._demo_stage import Stage
from agentrun.cli._fleet import Fleet
from agentrun.cli._page import http_port_option
from agentrun.cli._place import Place, broker_option, chosen_url, open_place, shown
from agentrun.cli.common import App, command, option
from agentrun.client import connect

_LEASE = 2.0


@command("demo", uvloop=True)
@option(
    "--once/--keep", default=None,
    help="End when done; or keep server, workers and page until Ctrl-C. Default: keep them at a terminal.",
)  # fmt: skip
@broker_option
@http_port_option
@option("--speed", type=click.FloatRange(0.1, 10), default=1.0, show_default=True, help="2: words come twice as fast.")
async def demo(app: App, once: bool | None, kind: str | None, speed: float, http_port: int | None) -> int:
    """See it work, on this machine and without any key: a stream, a late reader, a stop, a killed worker, a question.

    A broker is started for it (--broker), or the one at --url or AGENTRUN_URL is used, in the namespace "demo". Two
    worker processes and a gateway with the web page are started as well: the session can be watched there. With
    AGENTRUN_MODEL (and its provider's key) set, a real model answers, as in workers/chat.py. Ends with a table of what
    was counted. Exit codes: 0 all is right, 1 not.
    """
    app.log("error")
    model = os.environ.get("AGENTRUN_MODEL")
    script = model_script() if model else echo_script(speed)
    stage = Stage(Console(highlight=False))
    keep = stage.watched if once is None else not once
    who = f"the model {model}" if model else "an agent without a model"
    url = chosen_url(app)
    async with (
        open_place(url, "default" if url is None else "demo", kind) as place,
        _show(place, script, stage, who, http_port) as show,
    ):
        await play_stream(show)
        await play_stop(show)
        await play_takeover(show, _LEASE)
        if script.approval is not None:
            await play_approval(show)
        await read_again(show)
        await read_over_http(show)
        stage.result(show.rows)
        _go_on(show, keep, "" if kind is None else f" --broker {kind}")
        if keep:
            await _until_told()
    return 0 if all(good for _, _, good in show.rows) else 1


@asynccontextmanager
async def _show(place: Place, script: Script, stage: Stage, who: str, http_port: int | None) -> AsyncGenerator[Show]:
    async with (
        connect(place.url, namespace=place.namespace) as client,
        Fleet(place, script.spec, lease=_LEASE, env={"AGENTRUN_TOOLS": ""}) as fleet,
        served_page(place, http_port, agent=script.agent) as page,
    ):
        process = f", process {place.server}" if place.server else ""
        what = f" ({place.software}{process})" if place.software else ""
        stage.say(f"server   {shown(place.url)}{what}", "dim")
        workers = await fleet.start(client, 2)
        stage.say(f"workers  processes {' and '.join(str(w.pid) for w in workers)}, {who}", "dim")
        async with anyio.create_task_group() as group:
            session = new_session(client, script.agent)
            if page is None:
                stage.say("page     none: pip install 'agentrun[gateway]'", "dim")
            else:
                stage.say(f"page     {page}/?session={session.id}")
            reader = Reader(session)
            group.start_soon(reader.run)
            yield Show(
                script=script, stage=stage, place=place, client=client, fleet=fleet, session=session, reader=reader,
                page=page,
            )  # fmt: skip
            group.cancel_scope.cancel()


async def _until_told() -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return


def _go_on(show: Show, keep: bool, broker: str) -> None:
    stage = show.stage
    agentrun = _program()
    stage.say("")
    if not keep:
        stage.say("Go on with a server and workers that stay, and another terminal:")
        stage.command(f"{agentrun} dev{broker}")
        stage.command(f"{agentrun} chat")
        stage.command(f"{agentrun} bench all{broker}")
        return
    if show.page is None:
        stage.say("Server and workers stay until Ctrl-C. In another terminal:")
    else:
        stage.say("Server, workers and page stay until Ctrl-C:")
        stage.say(f"{show.page}/?session={show.session.id}", "bold")
        stage.say("In another terminal:")
    agentrun += show.place.options
    stage.command(f"{agentrun} tail {show.session.id}")
    stage.command(f"{agentrun} chat")
    stage.command(f"{agentrun} status")


def _program() -> str:
    """How the person can call us: by name, or by path where the environment is not active."""
    path = Path(sys.argv[0])
    if shutil.which("agentrun") is None and path.name == "agentrun":
        return os.path.relpath(path)
    return "agentrun"
