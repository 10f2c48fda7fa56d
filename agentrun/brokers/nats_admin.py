"""What an operator does on JetStream: create and check streams, look at queues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct, field

from agentrun.broker import QueueStats
from agentrun.brokers.nats_core import Core
from agentrun.brokers.nats_layout import (
    HEADROOM,
    RECORD_LIMIT,
    VERSION,
    Layout,
    consumer_filter,
    differences,
    parse_time,
    session_of,
    stream_name,
    stream_needs,
)
from agentrun.brokers.nats_link import ApiError, NobodyThere
from agentrun.brokers.streams import Streams
from agentrun.errors import Misconfigured, Unavailable

MIN_SERVER = (2, 12)
MIN_LEVEL = 2
_NS = 1_000_000_000
_NO_STREAM = 10059


class _Api(Struct, frozen=True):
    level: int = 0


class _Account(Struct, frozen=True):
    api: _Api = _Api()


class _Stream(Struct, frozen=True):
    config: dict[str, Any]
    ts: str = ""


class _ConsumerConfig(Struct, frozen=True):
    ack_wait: int = 0


class _Consumer(Struct, frozen=True):
    name: str
    config: _ConsumerConfig
    num_pending: int = 0
    num_ack_pending: int = 0


class _Consumers(Struct, frozen=True):
    total: int = 0
    consumers: list[_Consumer] = field(default_factory=list[_Consumer])


class _Subjects(Struct, frozen=True):
    subjects: dict[str, int] | None = None


class _Page(Struct, frozen=True):
    total: int = 0
    state: _Subjects = _Subjects()


async def check_server(core: Core) -> None:
    """See that the server is new enough and has JetStream.

    Raises:
        Misconfigured: It has not.
        Unavailable: It does not answer, or is a cluster without a leader.
    """
    version = core.reads.client.connected_server_version
    if (version.major, version.minor) < MIN_SERVER:
        raise Misconfigured(
            f"{core.reads.options.shown} runs nats-server {version.major}.{version.minor}.{version.patch}, "
            "needed is 2.12 or newer"
        )
    try:
        reply = await core.reads.api("INFO", patience=2.0)
    except NobodyThere as error:
        raise Misconfigured(
            f"JetStream does not answer at {core.reads.options.shown} (is it switched on, for this account?): {error}"
        ) from None
    if isinstance(reply, ApiError):
        raise reply.about(f"JetStream cannot be used at {core.reads.options.shown}")
    level = msgspec.json.decode(reply, type=_Account).api.level
    if level < MIN_LEVEL:
        raise Misconfigured(
            f"{core.reads.options.shown} has JetStream API level {level}, needed is {MIN_LEVEL} (nats-server 2.12)"
        )


async def _stream(core: Core, partition: int) -> _Stream | None:
    reply = await core.reads.api(f"STREAM.INFO.{stream_name(core.namespace, partition)}")
    if isinstance(reply, ApiError):
        if reply.err_code == _NO_STREAM:
            return None
        raise reply.about(f"stream {stream_name(core.namespace, partition)}")
    return msgspec.json.decode(reply, type=_Stream)


def _metadata(config: Mapping[str, Any], stream: str) -> tuple[int, float]:
    """Partitions and the deltas' time to live, as the stream says."""
    metadata: dict[str, str] = config.get("metadata") or {}
    try:
        if metadata["agentrun.version"] != VERSION:
            raise Misconfigured(
                f"stream {stream} was made for version {metadata['agentrun.version']} of agentrun's wire, "
                f"this is version {VERSION}"
            )
        return int(metadata["agentrun.partitions"]), float(metadata["agentrun.delta_ttl"])
    except (KeyError, ValueError):
        raise Misconfigured(
            f"stream {stream} was not made by `agentrun setup`: its metadata lacks agentrun.*"
        ) from None


async def load(core: Core, min_dedupe_window: float) -> Layout:
    """Read what is set up and see that it is what the promises need; also learns the server's clock.

    Raises:
        Misconfigured: Something is missing or not as needed; the message says what and what to do.
        Unavailable: Nobody can tell at the moment.
    """
    first = await _stream(core, 0)
    if first is None:
        raise Misconfigured(
            f"namespace {core.namespace} is not set up at {core.reads.options.shown}: run `agentrun setup`"
        )
    partitions, delta_ttl = _metadata(first.config, stream_name(core.namespace, 0))
    configs: list[dict[str, Any]] = []
    for partition in range(partitions):
        found = first if partition == 0 else await _stream(core, partition)
        name = stream_name(core.namespace, partition)
        if found is None:
            raise Misconfigured(f"stream {name}, one of {partitions}, is missing: run `agentrun setup`")
        wrong = differences(found.config, stream_needs(core.namespace, partition))
        if _metadata(found.config, name) != (partitions, delta_ttl):
            wrong.append("its metadata is not that of partition 0")
        window = found.config.get("duplicate_window", 0) / _NS
        if window < min_dedupe_window:
            wrong.append(f"duplicate_window is {window:g} s, needed is at least {min_dedupe_window:g} s")
        if wrong:
            raise Misconfigured(f"stream {name} is not as needed, run `agentrun setup`: {'; '.join(wrong)}")
        configs.append(found.config)
    if first.ts:
        core.clock.set(parse_time(first.ts))
    sizes = [config["max_msg_size"] for config in configs if config.get("max_msg_size", -1) > 0]
    return Layout(
        namespace=core.namespace,
        partitions=partitions,
        replicas=max(config.get("num_replicas", 1) for config in configs),
        delta_ttl=delta_ttl,
        dedupe_window=min(config["duplicate_window"] for config in configs) / _NS,
        max_body=min([RECORD_LIMIT, core.appends.client.max_payload, *sizes]) - HEADROOM,
    )


class NatsAdmin:
    """`agentrun.broker.BrokerAdmin` on JetStream."""

    def __init__(self, core: Core, streams: Streams) -> None:
        self._core = core
        self._wanted = streams

    async def setup(self, *, dry_run: bool) -> list[str]:
        """See `BrokerAdmin.setup`."""
        await check_server(self._core)
        partitions, delta_ttl = await self._agreed()
        done: list[str] = []
        for partition in range(partitions):
            done += await self._stream(partition, partitions, delta_ttl, dry_run)
        return done

    async def _agreed(self) -> tuple[int, float]:
        wanted, ttl = self._wanted.partitions, self._wanted.delta_ttl
        first = await _stream(self._core, 0)
        if first is None:
            return wanted or 1, ttl or 3600.0
        partitions, delta_ttl = _metadata(first.config, stream_name(self._core.namespace, 0))
        if wanted is not None and wanted != partitions:
            raise Misconfigured(
                f"namespace {self._core.namespace} has {partitions} partitions, not {wanted}: sessions would move. "
                "Use another namespace for another number"
            )
        if ttl is not None and ttl < delta_ttl:
            raise Misconfigured(
                f"namespace {self._core.namespace} keeps deltas for {delta_ttl:g} s: "
                f"that cannot be lowered to {ttl:g} s, those that are stored would outlive newer ones"
            )
        return partitions, ttl or delta_ttl

    def _config(
        self, partition: int, partitions: int, delta_ttl: float, found: dict[str, Any] | None
    ) -> dict[str, Any]:
        name = stream_name(self._core.namespace, partition)
        config: dict[str, Any] = {
            "name": name,
            "storage": "file",
            "max_consumers": 10_000,
            "num_replicas": 1,
            "max_age": 0,
            "duplicate_window": 7200 * _NS,
            **(found or {}),
            **stream_needs(self._core.namespace, partition),
            "compression": "s2",
            "max_msg_size": RECORD_LIMIT,
        }
        for key, value, unit in (
            ("num_replicas", self._wanted.replicas, 1),
            ("max_age", self._wanted.max_age, _NS),
            ("duplicate_window", self._wanted.dedupe_window, _NS),
        ):
            if value is not None:
                config[key] = int(value * unit)
        if config["max_age"]:
            config["duplicate_window"] = min(config["duplicate_window"], config["max_age"])
        config["metadata"] = {
            **((found or {}).get("metadata") or {}),
            "agentrun.version": VERSION,
            "agentrun.partitions": str(partitions),
            "agentrun.delta_ttl": f"{delta_ttl:g}",
        }
        return config

    async def _stream(self, partition: int, partitions: int, delta_ttl: float, dry_run: bool) -> list[str]:
        name = stream_name(self._core.namespace, partition)
        found = await _stream(self._core, partition)
        config = self._config(partition, partitions, delta_ttl, found.config if found else None)
        if found is None:
            verb, line = "CREATE", f"create stream {name} with {config['num_replicas']} replica(s)"
        else:
            changes = [
                f"{key}: {found.config.get(key)!r} -> {v!r}" for key, v in config.items() if found.config.get(key) != v
            ]
            if not changes:
                return []
            verb, line = "UPDATE", f"update stream {name}: {'; '.join(changes)}"
        if not dry_run:
            reply = await self._core.reads.api(f"STREAM.{verb}.{name}", config)
            if isinstance(reply, ApiError):
                raise reply.about(f"cannot {line}")
        return [line]

    async def stats(self) -> list[QueueStats]:
        """See `BrokerAdmin.stats`."""
        sums: dict[str, QueueStats] = {}
        for partition in range(self._core.found.partitions):
            for c in await self._consumers(stream_name(self._core.namespace, partition)):
                if not c.name.startswith("q-"):
                    continue
                agent = c.name[2:]
                before = sums.get(agent, QueueStats(agent, 0, 0, 0.0))
                sums[agent] = QueueStats(
                    agent, before.waiting + c.num_pending, before.leased + c.num_ack_pending, c.config.ack_wait / _NS
                )
        return [sums[agent] for agent in sorted(sums)]

    async def sessions(self, limit: int) -> list[str]:
        """See `BrokerAdmin.sessions`."""
        found: dict[str, None] = {}
        for partition in range(self._core.found.partitions):
            if len(found) >= limit:
                break
            await self._sessions(partition, limit, found)
        return list(found)[:limit]

    async def _sessions(self, partition: int, limit: int, found: dict[str, None]) -> None:
        # The subjects of turns: one for each agent that a session has talked to.
        name = stream_name(self._core.namespace, partition)
        filter = consumer_filter(self._core.namespace, partition, "*")
        seen = 0
        while len(found) < limit:
            reply = await self._core.reads.api(f"STREAM.INFO.{name}", {"subjects_filter": filter, "offset": seen})
            if isinstance(reply, ApiError):
                raise Unavailable(f"stream {name}: {reply.description}")
            page = msgspec.json.decode(reply, type=_Page)
            subjects = page.state.subjects or {}
            found.update((session_of(subject), None) for subject in subjects)
            seen += len(subjects)
            if not subjects or seen >= page.total:
                return

    async def _consumers(self, stream: str) -> list[_Consumer]:
        out: list[_Consumer] = []
        while True:
            reply = await self._core.reads.api(f"CONSUMER.LIST.{stream}", {"offset": len(out)})
            if isinstance(reply, ApiError):
                raise Unavailable(f"stream {stream}: {reply.description}")
            page = msgspec.json.decode(reply, type=_Consumers)
            out += page.consumers
            if not page.consumers or len(out) >= page.total:
                return out
