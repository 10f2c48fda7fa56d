"""The brokers, and `connect`, which picks one by its URL."""

from __future__ import annotations

import importlib.util
from typing import Any

from agentrun.broker import Broker
from agentrun.errors import InvalidInput, Misconfigured
from agentrun.wire import check_id

__all__ = ["connect"]

_NATS = ("nats", "tls", "ws", "wss")
_VALKEY = ("valkey", "valkeys", "redis", "rediss")


def connect(url: str, *, namespace: str = "default", lease_ttl: float = 30.0, **options: Any) -> Broker:
    """Return the broker a URL names, to be entered with ``async with``; nothing is sent before.

    Args:
        url: ``nats://host:4222`` (also ``tls://``, ``ws://``, ``wss://``), ``valkey://host:6379/0`` (also ``redis://``;
            ``valkeys://`` and ``rediss://`` for TLS), ``memory://name``, or a file: with three slashes where it is now,
            ``sqlite:///dev.db``, with four from the root, ``sqlite:////var/lib/agentrun.db``.
        namespace: Keeps deployments on one broker apart.
        lease_ttl: The lease time, in seconds, of queues that are opened without one (not for ``memory://``).
        options: What the broker's class takes besides: see `agentrun.brokers.nats.NatsBroker`,
            `agentrun.brokers.valkey.ValkeyBroker`, `agentrun.brokers.memory.MemoryBroker` and
            `agentrun.brokers.sqlite.SqliteBroker`.

    Raises:
        InvalidInput: The scheme is not known, or the URL names no file.
        Misconfigured: The extra for this broker is not installed.
    """
    scheme = url.partition("://")[0] if "://" in url else ""
    if scheme in _NATS:
        from agentrun.brokers.nats import NatsBroker

        return NatsBroker(url, namespace=namespace, lease_ttl=lease_ttl, **options)
    if scheme in _VALKEY:
        if importlib.util.find_spec("valkey") is None:
            raise Misconfigured(f"{scheme}:// needs the extra 'valkey': pip install 'agentrun[valkey]'")
        from agentrun.brokers.valkey import ValkeyBroker

        return ValkeyBroker(url, namespace=namespace, lease_ttl=lease_ttl, **options)
    if scheme == "memory":
        from agentrun.brokers.memory import MemoryBroker

        name = url.partition("://")[2]
        return MemoryBroker(f"{name}/{namespace}" if namespace != "default" else name, **options)
    if scheme == "sqlite":
        from agentrun.brokers.sqlite import SqliteBroker

        return SqliteBroker(_file(url, namespace), lease_ttl=lease_ttl, **options)
    raise InvalidInput(
        "a broker's URL starts with nats://, tls://, ws://, wss://, valkey://, valkeys://, redis://, rediss://, "
        f"memory:// or sqlite://, not {scheme or url[:20]!r}"
    )


def _file(url: str, namespace: str) -> str:
    """The file that a URL of SQLite names; each namespace has its own."""
    host, slash, path = url.removeprefix("sqlite://").partition("/")
    if host or not slash or path in ("", ":memory:") or path.endswith("/") or "?" in path:
        raise InvalidInput(
            f"write sqlite:///dev.db for a file where you are, sqlite:////var/lib/dev.db for one from the root, "
            f"or memory://name for none; not {url!r}"
        )
    check_id("namespace", namespace)
    return path if namespace == "default" else f"{path}.{namespace}"
