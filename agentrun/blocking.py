"""The client for programs without an event loop: the same nouns and names, each call waiting for its result.

::

    with agentrun.blocking.connect("nats://localhost:4222", agent="support") as client:
        turn = client.session("s-42").send("hello")
        for event in turn.events():
            print(event.offset, event.data)

An event loop runs in a thread of its own. All objects may be used from several threads; closing the client ends the
calls that still wait with `concurrent.futures.CancelledError`.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from agentrun import client as aio
from agentrun.client import DeadTurn, Event, Receipt, Result
from agentrun.settings import ClientSettings
from agentrun.telemetry import Telemetry

__all__ = ["Client", "DeadTurn", "Event", "Receipt", "Result", "Session", "Steer", "Turn", "connect"]

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")


class _Loop:
    """Runs coroutines in the loop's thread for callers in others."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal
        self._waiting: set[Future[Any]] = set()
        self._closed = False

    def call(self, function: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        if self._closed:
            raise RuntimeError("the client is closed")
        future = self._portal.start_task_soon(functools.partial(function, *args, **kwargs))
        self._waiting.add(future)
        try:
            if self._closed:
                future.cancel()  # `close` may have looked just before it was added
            return future.result()
        except BaseException:
            # Ctrl-C in the caller's thread must not leave the call running.
            future.cancel()
            raise
        finally:
            self._waiting.discard(future)

    def iterate(self, items: AsyncGenerator[R]) -> Generator[R]:
        async def following() -> list[R]:
            async for item in items:
                return [item]
            return []

        try:
            while item := self.call(following):
                yield item[0]
        finally:
            if not self._closed:
                self.call(items.aclose)

    def close(self) -> None:
        """End all calls; iterators that are still open end with the event loop."""
        self._closed = True
        for future in list(self._waiting):
            future.cancel()


class _Handle(Generic[A]):
    def __init__(self, loop: _Loop, handle: A) -> None:
        self._loop = loop
        self._handle = handle

    def __repr__(self) -> str:
        return f"blocking.{self._handle!r}"


def _call(method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[_Handle[A], P], R]:
    return _giving(lambda loop, result: result, method)


def _giving(
    wrap: Callable[[_Loop, R], B], method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]]
) -> Callable[Concatenate[_Handle[A], P], B]:
    @functools.wraps(method)
    def call(self: _Handle[A], *args: P.args, **kwargs: P.kwargs) -> B:
        loop, handle = self._loop, self._handle  # pyright: ignore[reportPrivateUsage]
        return wrap(loop, loop.call(method, handle, *args, **kwargs))

    return call


class Turn(_Handle[aio.Turn]):
    """See `agentrun.client.Turn`."""

    result = _call(aio.Turn.result)
    view = _call(aio.Turn.view)
    cancel = _call(aio.Turn.cancel)
    answer = _call(aio.Turn.answer)
    steer = _giving(lambda loop, turn: Steer(loop, turn), aio.Turn.steer)

    @property
    def id(self) -> str:
        """Its id."""
        return self._handle.id

    @property
    def offset(self) -> int | None:
        """Where its request stands in the log, if that is known."""
        return self._handle.offset

    @property
    def session(self) -> Session:
        """Its session."""
        return Session(self._loop, self._handle.session)

    def events(self) -> Generator[Event]:
        """See `agentrun.client.Turn.events`. Leaving the loop is safe."""
        return self._loop.iterate(self._handle.events())

    def concerns(self, event: Event) -> bool:
        """See `agentrun.client.Turn.concerns`."""
        return self._handle.concerns(event)

    def ended_by(self, event: Event) -> bool:
        """See `agentrun.client.Turn.ended_by`."""
        return self._handle.ended_by(event)


class Steer(Turn):
    """See `agentrun.client.Steer`."""

    def __init__(self, loop: _Loop, handle: aio.Steer) -> None:
        super().__init__(loop, handle)
        self._steer = handle

    @functools.wraps(aio.Steer.consumed_by)
    def consumed_by(self, timeout: float | None = None) -> str | None:
        """See `agentrun.client.Steer.consumed_by`."""
        return self._loop.call(self._steer.consumed_by, timeout)


class Session(_Handle[aio.Session]):
    """See `agentrun.client.Session`."""

    send = _giving(lambda loop, turn: Turn(loop, turn), aio.Session.send)
    history = _call(aio.Session.history)
    cancel = _call(aio.Session.cancel)
    delete = _call(aio.Session.delete)

    @property
    def id(self) -> str:
        """Its id."""
        return self._handle.id

    def turn(self, id: str) -> Turn:
        """See `agentrun.client.Session.turn`."""
        return Turn(self._loop, self._handle.turn(id))

    def events(self, after: int = 0, *, follow: bool = True) -> Generator[Event]:
        """See `agentrun.client.Session.events`. Leaving the loop is safe."""
        return self._loop.iterate(self._handle.events(after, follow=follow))


class Client(_Handle[aio.Client]):
    """See `agentrun.client.Client`; made by `connect`."""

    retry_dead = _giving(lambda loop, turns: [Turn(loop, turn) for turn in turns], aio.Client.retry_dead)
    drop_dead = _call(aio.Client.drop_dead)

    def dead(
        self, *, session: str | None = None, turn: str | None = None, agent: str | None = None
    ) -> Generator[DeadTurn]:
        """See `agentrun.client.Client.dead`. Leaving the loop is safe."""
        return self._loop.iterate(self._handle.dead(session=session, turn=turn, agent=agent))

    def session(self, id: str, *, agent: str | None = None) -> Session:
        """See `agentrun.client.Client.session`."""
        return Session(self._loop, self._handle.session(id, agent=agent))

    def turn(self, session: str, turn: str) -> Turn:
        """See `agentrun.client.Client.turn`."""
        return Turn(self._loop, self._handle.turn(session, turn))


@contextmanager
def connect(
    url: str,
    *,
    namespace: str = "default",
    agent: str | None = None,
    settings: ClientSettings | None = None,
    telemetry: Telemetry | None = None,
) -> Generator[Client]:
    """Connect to a broker and give a blocking `Client`; see `agentrun.connect`."""
    with start_blocking_portal() as portal:
        connected = aio.connect(url, namespace=namespace, agent=agent, settings=settings, telemetry=telemetry)
        with portal.wrap_async_context_manager(connected) as client:
            loop = _Loop(portal)
            try:
                yield Client(loop, client)
            finally:
                loop.close()
