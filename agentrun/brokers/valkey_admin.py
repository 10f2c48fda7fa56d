"""What an operator does on Valkey, and what is looked at when a broker connects."""

from __future__ import annotations

from agentrun.broker import QueueStats
from agentrun.brokers.streams import Streams
from agentrun.brokers.valkey_core import Core, Layout
from agentrun.brokers.valkey_scripts import STATS
from agentrun.errors import InvalidInput, Misconfigured

VERSION = "1"
MIN_VALKEY = 8
MIN_REDIS = 7
_PAGE = "1000"


async def inspect(core: Core) -> dict[str, str]:
    """What the server says of itself.

    Raises:
        Misconfigured: It is too old, a replica, or may throw records away.
    """
    sections = ("server", "memory", "persistence", "replication")
    text: bytes = await core.command("INFO", *sections)
    lines = (line.partition(":") for line in text.decode().splitlines())
    info = {name: value for name, colon, value in lines if colon}
    shown = core.commands.options.shown
    valkey = info.get("valkey_version")
    version, needed = (valkey, MIN_VALKEY) if valkey else (info.get("redis_version", "0"), MIN_REDIS)
    if int(version.partition(".")[0]) < needed:
        raise Misconfigured(f"{shown} runs version {version}, needed is Valkey {MIN_VALKEY} or Redis {MIN_REDIS}")
    if info.get("role", "master") != "master":
        raise Misconfigured(f"{shown} is a replica: name the primary")
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory", "0") != "0" and policy != "noeviction":
        raise Misconfigured(
            f"{shown} throws data away when its memory is full (maxmemory-policy {policy}): set it to noeviction"
        )
    return info


async def load(core: Core, min_dedupe_window: float) -> Layout:
    """Read what is set up and see that it is what the promises need.

    Raises:
        Misconfigured: Something is missing or not as needed; the message says what and what to do.
    """
    info = await inspect(core)
    meta = await _meta(core)
    if not meta:
        raise Misconfigured(
            f"namespace {core.namespace} is not set up at {core.commands.options.shown}: run `agentrun setup`"
        )
    durable = info.get("aof_enabled") == "1"
    layout = Layout(int(meta["partitions"]), float(meta["delta_ttl"]), float(meta["dedupe_window"]), durable)
    if layout.dedupe_window < min_dedupe_window:
        raise Misconfigured(
            f"namespace {core.namespace} remembers ids for {layout.dedupe_window:g} s, needed is at least "
            f"{min_dedupe_window:g} s: run `agentrun setup --dedupe-window`"
        )
    return layout


async def _meta(core: Core) -> dict[str, str]:
    flat: list[bytes] = await core.command("HGETALL", f"{core.names}meta")
    texts = [item.decode() for item in flat]
    meta = dict(zip(texts[::2], texts[1::2], strict=True))
    if meta and meta.get("version") != VERSION:
        raise Misconfigured(
            f"namespace {core.namespace} was made for version {meta.get('version')} of agentrun's keys, "
            f"this is version {VERSION}"
        )
    return meta


class ValkeyAdmin:
    """`agentrun.broker.BrokerAdmin` on Valkey."""

    def __init__(self, core: Core, wanted: Streams) -> None:
        self._core = core
        self._wanted = wanted
        if (wanted.replicas or 1) > 1 or wanted.max_age:
            raise InvalidInput("Valkey's replicas are its own matter, and records have no greatest age there")

    async def setup(self, *, dry_run: bool) -> list[str]:
        """See `BrokerAdmin.setup`.

        Raises:
            Misconfigured: Another number of partitions than there is, or a server that does not do.
        """
        await inspect(self._core)
        found = await _meta(self._core)
        meta = {
            "version": VERSION,
            "partitions": str(self._wanted.partitions or found.get("partitions", "1")),
            "delta_ttl": _seconds(self._wanted.delta_ttl, found.get("delta_ttl", "3600")),
            "dedupe_window": _seconds(self._wanted.dedupe_window, found.get("dedupe_window", "7200")),
        }
        namespace = self._core.namespace
        if found and meta["partitions"] != found["partitions"]:
            raise Misconfigured(
                f"namespace {namespace} has {found['partitions']} partitions, not {meta['partitions']}: sessions would "
                "move. Use another namespace for another number"
            )
        changes = [f"{key}: {found.get(key)} -> {value}" for key, value in meta.items() if found.get(key) != value]
        if not changes:
            return []
        if not dry_run:
            flat = [word for pair in meta.items() for word in pair]
            await self._core.command("HSET", f"{self._core.names}meta", *flat)
        if found:
            return [f"update namespace {namespace}: {'; '.join(changes)}"]
        return [f"create namespace {namespace} with {meta['partitions']} partition(s)"]

    async def stats(self) -> list[QueueStats]:
        """See `BrokerAdmin.stats`."""
        flat: list[bytes] = await self._core.command("HGETALL", f"{self._core.names}agents")
        out: list[QueueStats] = []
        for name, ttl in sorted(zip(flat[::2], flat[1::2], strict=True)):
            queued = leased = 0
            for partition in range(self._core.found.partitions):
                prefix = self._core.prefix(partition)
                counts = await self._core.run(STATS, f"{prefix}s", (prefix, name))
                queued, leased = queued + counts[0], leased + counts[1]
            out.append(QueueStats(name.decode(), queued - leased, leased, float(ttl)))
        return out

    async def sessions(self, limit: int) -> list[str]:
        """See `BrokerAdmin.sessions`."""
        found: dict[bytes, None] = {}
        for partition in range(self._core.found.partitions):
            cursor = b"0"
            while len(found) < limit:
                cursor, names = await self._core.command(
                    "SSCAN", f"{self._core.prefix(partition)}s", cursor, "COUNT", _PAGE
                )
                found.update(dict.fromkeys(names))
                if cursor == b"0":
                    break
        return [name.decode() for name in list(found)[:limit]]


def _seconds(wanted: float | None, found: str) -> str:
    return found if wanted is None else f"{wanted:g}"
