"""``agentrun worker``: a process of the fleet."""

from __future__ import annotations

import ast
import functools
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import click
import msgspec

from agentrun import brokers, settings
from agentrun.agent import Agent
from agentrun.cli.common import App, Fatal, command, duration, option
from agentrun.errors import InvalidInput
from agentrun.settings import WorkerSettings
from agentrun.worker import Worker

log = logging.getLogger("agentrun.worker")

_FIELDS = msgspec.structs.fields(WorkerSettings)
_PLAIN = ("checkpoint",)
"""Numbers that are no times."""


def _field_texts() -> dict[str, str]:
    """What `settings` says of each field, below it."""
    try:
        tree = ast.parse(Path(settings.__file__).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}  # installed without sources
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == WorkerSettings.__name__)
    texts: dict[str, str] = {}
    for node, below in pairwise(body):
        match node, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = text
            case _:
                pass
    return texts


def worker_options(fn: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each field of `WorkerSettings`; the function gets them as ``settings``."""

    @functools.wraps(fn)
    def collect(app: App, **parameters: Any) -> Any:
        values = {field.name: parameters.pop(field.name) for field in _FIELDS}
        return fn(app, settings=WorkerSettings(**values), **parameters)

    texts = _field_texts()
    decorated: Callable[..., Any] = collect
    for field in reversed(_FIELDS):
        is_time = isinstance(field.default, float) and field.name not in _PLAIN
        kind = duration if is_time else click.IntRange(min=1) if isinstance(field.default, int) else float
        default = f"{field.default:g}s" if is_time else field.default
        make = option(
            "--" + field.name.replace("_", "-"),
            type=kind,
            default=default,
            show_default=True,
            help=texts.get(field.name),
        )
        decorated = make(decorated)
    return decorated


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
    loaded = [load_agent(spec, debug=app.debug) for spec in agents]
    async with brokers.connect(app.url, namespace=app.namespace) as broker:
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
