"""Where a run takes place: all that clients and readers of it need."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct


class Place(Struct, frozen=True, kw_only=True):
    """What the stage gives to the load. All urls lead over cables, which are cut, and to processes, which die."""

    brokers: tuple[str, ...]
    """The servers, as clients reach them: ``nats://127.0.0.1:port``, one or three, or ``valkey://…``, one."""
    namespace: str
    gateways: tuple[str, ...]
    """Base urls, ``http://127.0.0.1:port``. They stay the same when a gateway is started again; while it is away,
    connections are reset. Everybody may do everything there, without a token."""
    agents: tuple[str, ...]
    """Whom turns may be sent to; all understand the same commands (see `tests.chaos.agents`)."""
    folder: Path
    """Where notes are written."""

    @property
    def broker(self) -> str:
        """What `agentrun.connect` takes."""
        return ",".join(self.brokers)
