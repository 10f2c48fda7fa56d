"""The same for tests without an event loop.

::

    from agentrun.testing import blocking

    def test_greets():
        assert blocking.run_turn(support, "hello").text == "Hello!"
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import anyio

from agentrun.testing import turn as aio

__all__ = ["run_turn"]

P = ParamSpec("P")
R = TypeVar("R")


def _blocking(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return anyio.run(functools.partial(function, *args, **kwargs))

    return call


run_turn = _blocking(aio.run_turn)
