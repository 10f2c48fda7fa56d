"""What all commands share: options, the connection, errors and exit codes."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import select
import stat
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar, cast

import anyio
import click

from agentrun import Client, connect
from agentrun.broker import BrokerAdmin
from agentrun.errors import AgentrunError, BrokerError, Unavailable
from agentrun.settings import ClientSettings
from agentrun.telemetry.logs import JsonFormatter

__all__ = [
    "DEFAULT_URL",
    "NOT_SHARED",
    "App",
    "Fatal",
    "agent_option",
    "command",
    "connection_options",
    "duration",
    "json_option",
    "option",
    "pick_agent",
    "session_argument",
    "until_nobody_reads",
]

F = TypeVar("F", bound=Callable[..., Any])
Command = Callable[..., Awaitable[int | None]]

PREFIX = "AGENTRUN_"
DEFAULT_URL = "nats://127.0.0.1:4222"
NOT_SHARED = (
    "a broker in memory lives in one process, and this is for several: sqlite needs no server either, "
    "as in sqlite:///dev.db"
)
LEVELS = ("debug", "info", "warning", "error")
_INTERRUPTED = 130
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LOOK = 0.25


class Fatal(Exception):
    """Ends the command with one line on stderr. Exit code 2 is for what the user wrote, 1 for what went wrong."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class App:
    """The options of every command."""

    def __init__(self) -> None:
        self.url = ""
        self.namespace = ""
        self.log_level: str | None = None
        self.log_format: str | None = None

    def shared_url(self) -> str:
        """The broker's URL, for a process that is of use only to others.

        Raises:
            Fatal: No other process can be at that broker.
        """
        if self.url.startswith("memory:"):
            raise Fatal(NOT_SHARED, 2)
        return self.url

    @property
    def debug(self) -> bool:
        """Whether errors are to be shown with their traceback."""
        return self.log_level == "debug"

    def log(self, default: str) -> None:
        """Send the log to stderr, from the level asked for, or else from ``default``."""
        handler = logging.StreamHandler(sys.stderr)
        if self.log_format == "json":
            handler.setFormatter(JsonFormatter())
        else:
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
        logging.basicConfig(handlers=[handler], level=(self.log_level or default).upper())

    @asynccontextmanager
    async def client(self, settings: ClientSettings | None = None) -> AsyncGenerator[Client]:
        """Connect as a client."""
        self.log("error")
        async with connect(self.url, namespace=self.namespace, settings=settings) as client:
            yield client


def duration(value: str) -> float:
    """Seconds, of a number with ms, s, m, h or d, or with nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|m|h|d|)", str(value).strip())
    if match is None:
        raise click.BadParameter(f"{value!r} is no duration: write seconds, or 500ms, 30s, 2m, 1h, 7d")
    return float(match[1]) * _SECONDS[match[2]]


def option(*names: str, **attributes: Any) -> Callable[[F], F]:
    """`click.option`, readable from ``AGENTRUN_<NAME>`` as well; the same name for all commands."""
    first = next(name for name in names if name.startswith("--"))
    name = first.partition("/")[0].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=PREFIX + name, **attributes)


json_option = option("--json", "as_json", is_flag=True, help="For programs: JSON.")
agent_option = option("--agent", metavar="NAME", help="Who is to answer. Default: the broker's only agent.")
session_argument = click.argument("session", envvar=PREFIX + "SESSION")


def connection_options(*, defaults: bool) -> Callable[[F], F]:
    """The options that may stand before a command or after it; after it wins."""

    def keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        app = ctx.ensure_object(App)
        if value is not None:
            assert param.name is not None
            setattr(app, param.name, value)

    def decorate(fn: F) -> F:
        make = option if defaults else click.option
        extra: dict[str, Any] = {"callback": keep, "expose_value": False}
        for decorator in (
            make(
                "--log-level", type=click.Choice(LEVELS, case_sensitive=False), help="What to log, to stderr.", **extra
            ),
            make("--log-format", type=click.Choice(("text", "json")), help="How to log.", **extra),
            make(
                "--namespace",
                default="default" if defaults else None,
                show_default=defaults,
                help="Which of the broker's agentrun installations.",
                **extra,
            ),
            make(
                "--url",
                default=DEFAULT_URL if defaults else None,
                show_default=defaults,
                help="The broker.",
                **extra,
            ),
        ):
            fn = decorator(fn)
        return fn

    return decorate


def command(name: str, *, uvloop: bool = False) -> Callable[[Command], click.Command]:
    """Make a coroutine function of `App` and the command's parameters a command; it may return an exit code."""

    def decorate(fn: Command) -> click.Command:
        @functools.wraps(fn)
        def call(**parameters: Any) -> None:
            app = click.get_current_context().ensure_object(App)
            _run(app, functools.partial(fn, app, **parameters), uvloop)

        return click.command(name)(connection_options(defaults=False)(call))

    return decorate


def _run(app: App, main: Callable[[], Awaitable[int | None]], uvloop: bool) -> NoReturn:
    try:
        code = anyio.run(main, backend_options={"use_uvloop": uvloop and _has_uvloop()})
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if app.debug:
            raise
        _fail(_cause(error))
    sys.exit(code or 0)


def _has_uvloop() -> bool:
    try:
        import uvloop  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return False
    return True


def _cause(error: BaseException) -> BaseException:
    """The error itself; of several at once the one that says most."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    group = cast("BaseExceptionGroup[BaseException]", error)
    found = [_cause(e) for e in group.exceptions]
    return next((e for e in found if isinstance(e, (Fatal, AgentrunError, OSError))), found[0])


def _fail(error: BaseException) -> NoReturn:
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        raise error  # click ends quietly then
    code = error.code if isinstance(error, Fatal) else 1
    if isinstance(error, (Fatal, AgentrunError)):
        text = " ".join(str(error).split())
    else:
        text = f"{type(error).__name__}: {' '.join(str(error).split())} (--log-level debug shows where)"
    click.echo(f"agentrun: {text}", err=True)
    sys.exit(code)


async def until_nobody_reads() -> None:
    """Wait for whoever reads stdout to go away, as ``| head`` does, when nothing may be written for long.

    Raises:
        BrokenPipeError: Always, in the end; the command ends quietly by it. On Windows it waits for ever.
    """
    if not hasattr(select, "poll") or not stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
        await anyio.sleep_forever()
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    while not pipe.poll(0):  # noqa: ASYNC110 - the event loop cannot wait for this
        await anyio.sleep(_LOOK)
    raise BrokenPipeError(errno.EPIPE, "nobody reads what is printed")


async def pick_agent(client: Client, agent: str | None) -> str:
    """The agent asked for, else the only one that the broker has a queue for.

    Raises:
        Fatal: There is none, or more than one.
    """
    if agent is not None:
        return agent
    names: list[str] = []
    if isinstance(client.broker, BrokerAdmin):
        try:
            names = [queue.agent for queue in await client.broker.stats()]
        except Unavailable:
            raise
        except BrokerError:
            pass  # whoever may only send may not look
    if len(names) == 1:
        return names[0]
    known = f"the broker knows {', '.join(names)}" if names else "the broker knows none yet, start a worker"
    raise Fatal(f"which agent? Give --agent NAME: {known}", 2)
