"""Trace context and baggage, as they travel in events; and which turn this task is at, for the log."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from opentelemetry import propagate, trace
from opentelemetry.context import Context

from agentrun.telemetry.spans import lost

__all__ = ["At", "at", "carried", "current", "link_to", "read_from", "span_of"]


def carried(trace: Mapping[str, str], over: Context | None = None) -> dict[str, str]:
    """Return the trace fields of an event: those given, and over them those of a context, default the current one."""
    fields = dict(trace)
    try:
        propagate.inject(fields, over)
    except Exception:
        lost("trace context or baggage, on its way out")
    return fields


def span_of(trace: Mapping[str, str]) -> Context:
    """Return the context that the trace fields of an event stand for. What is no such field is passed over."""
    return read_from(trace, Context()) if trace else Context()


def read_from(fields: Mapping[str, str], below: Context) -> Context:
    """Return a context with what fields, or headers, carry. What cannot be used is passed over."""
    try:
        return propagate.extract(fields, below)
    except Exception:
        lost("trace context or baggage, on its way in")
        return below


def link_to(fields: Mapping[str, str], attributes: Mapping[str, str]) -> trace.Link | None:
    """Return a link to the span that trace fields name; None if they name none."""
    if not fields:
        return None
    context = trace.get_current_span(span_of(fields)).get_span_context()
    return trace.Link(context, attributes) if context.is_valid else None


class At(NamedTuple):
    """The turn that a task is at."""

    session: str
    turn: str
    attempt: int


_at: ContextVar[At | None] = ContextVar("agentrun_at", default=None)


def current() -> At | None:
    """The turn that this task, or the one that started it, is at."""
    return _at.get()


@contextmanager
def at(session: str, turn: str, attempt: int) -> Generator[None]:
    """Let what is logged say that it is about this turn."""
    token = _at.set(At(session, turn, attempt))
    try:
        yield
    finally:
        _at.reset(token)
