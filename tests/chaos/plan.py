"""What is going to be broken: a fault, before it happens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

SERVERS = "servers"
"""The target of all that befalls servers: one thing at a time does."""


class Plan(NamedTuple):
    """One fault that is going to be: on what, for how long, and how."""

    target: str
    seconds: float
    act: Callable[[], Awaitable[None]]
    lives: Sequence[str] = ()
    """What it befalls, where that is more, or named more exactly, than the target."""


Plans = Mapping[str, tuple[float, Callable[[], Plan | None]]]
"""Kinds of faults: how often each comes compared with others, and what draws one; None: nothing to do it to."""
