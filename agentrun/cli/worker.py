"""``agentrun worker``: a process of the fleet."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import traceback

import anyio
import click

from agentrun import brokers
from agentrun.agent import Agent
from agentrun.cli._settings import settings_options
from agentrun.cli._telemetry import seen_as
from agentrun.cli.common import App, Fatal, command, option
from agentrun.errors import InvalidInput
from agentrun.settings import WorkerSettings
from agentrun.worker import Worker

log = logging.getLogger("agentrun.worker")

worker_options = settings_options(WorkerSettings, plain=("checkpoint",))
agents_argument = functools.partial(
    click.argument, "agents", nargs=-1, metavar="MODULE:AGENT...", envvar="AGENTRUN_AGENTS"
)


@command("worker", uvloop=True)
@agents_argument(required=True)
@option("--name", help="Stands in the log as who ran an attempt. Default: host, process id and a random part.")
@click.option("--while-stdin", is_flag=True, hidden=True, help="Drain when stdin is closed, as by a parent that died.")
@worker_options
async def worker(
    app: App, agents: tuple[str, ...], name: str | None, while_stdin: bool, settings: WorkerSettings
) -> None:
    """Run agents until SIGTERM or Ctrl-C.

    AGENTS are written module:name, as in workers.echo:echo; modules are looked for in this directory as well.

    The first SIGTERM drains: no new turns are taken, running ones get --drain to end, what is left is handed to other
    workers. A second one hands everything over now. Exit codes: 0 stopped as told, 1 the broker is lost or not
    set up, 2 an agent cannot be loaded.
    """
    app.log("info")
    sys.path.insert(0, os.getcwd())
    url = app.shared_url()
    loaded = [load_agent(spec, debug=app.debug) for spec in agents]
    async with seen_as("agentrun-worker"), brokers.connect(url, namespace=app.namespace) as broker:
        try:
            runner = Worker(broker, loaded, settings=settings, name=name)
        except InvalidInput as error:
            raise Fatal(str(error), 2) from error
        async with anyio.create_task_group() as group:
            if while_stdin:
                group.start_soon(_drain_with_stdin, runner)
            await runner.serve()
            group.cancel_scope.cancel()
    log.info("worker %s has stopped", runner.name)


def load_agent(spec: str, *, debug: bool = False) -> Agent:
    """Import the agent that ``module:name`` names.

    Raises:
        Fatal: It cannot be had; the message says why in one line.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise Fatal(f"{spec!r} names no agent: write module:name, as in workers.echo:echo", 2)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if debug:
            raise
        raise Fatal(_why_not_imported(module_name, error), 2) from error
    found = getattr(module, name, None)
    if isinstance(found, Agent):
        return found
    if found is None:
        agents = [key for key, value in vars(module).items() if isinstance(value, Agent)]
        raise Fatal(f"module {module_name} has no {name}; its agents: {', '.join(agents) or 'none'}", 2)
    if callable(found):
        raise Fatal(f"{spec} is a function, not an agent: decorate it with @agent (from agentrun import agent)", 2)
    raise Fatal(f"{spec} is of type {type(found).__name__}, not an agent", 2)


def _why_not_imported(module: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        if module == error.name or module.startswith(error.name + "."):
            return f"there is no module {module} (looked in {os.getcwd()} and where Python looks)"
        return f"module {module} needs {error.name}, which is not installed"
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{where.filename}:{where.lineno}"
    return f"module {module} cannot be imported: {type(error).__name__}: {error} ({place})"


async def _drain_with_stdin(runner: Worker) -> None:
    while True:
        await anyio.wait_readable(sys.stdin)
        if not os.read(sys.stdin.fileno(), 4096):
            return runner.drain()
