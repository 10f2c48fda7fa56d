"""The bench of the gateway: what HTTP adds to reading from the broker, and how many clients one process holds."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Literal

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from msgspec import Struct

from agentrun.cli._bench_http import Job, Opened, Seen
from agentrun.cli._bench_load import Cpu, Run, store, stream_words
from agentrun.cli._bench_report import Figure, quantile, spread
from agentrun.cli._bench_watch import SETTLE, Digest
from agentrun.cli._fleet import command, cpu_seconds
from agentrun.client import Event, Session
from agentrun.errors import Unavailable

try:
    import resource
except ModuleNotFoundError:  # not on Windows
    resource = None

_LINE = 1 << 28
_OPEN = 180.0
_SPARE = 200
"""Files a process opens besides its clients' connections."""
_AT_ONCE = 64
_SETTLED = 2.0
_END = 10.0
_CALM = 3
_REPLAYS: dict[str, Literal["replay", "pages"]] = {"sse": "replay", "pages": "pages"}
_EVENTS = 4
"""Of an idle session: a turn that has ended."""
_FAN_OUT = 500
_SOCKETS = 20


async def bench_gateway(run: Run) -> None:
    """Token latency over HTTP beside the broker's own, one stream for many clients, coming back, idle clients."""
    sessions = run.options.sessions or (1, _SOCKETS, 100)
    by_socket = max((count for count in sessions if count <= _SOCKETS), default=0)
    async with _open_gateway(run) as gateway:
        for count in sessions:
            await _streams(run, gateway, count, ("sse", "socket") if count == by_socket else ("sse",))
        await _fan_out(run, gateway, run.options.readers or _FAN_OUT)
        await _replay(run, gateway)
    for one_session in (False, True):
        for count in run.options.clients:
            async with _open_gateway(run) as gateway:
                await _idle(run, gateway, count, one_session=one_session)


# ------------------------------------------------------------------------------------------------------------ streams


async def _streams(run: Run, gateway: _Gateway, count: int, ways: Sequence[Literal["sse", "socket"]]) -> None:
    """The same load three times: read from the broker by this process, over HTTP by another; some by WebSocket."""
    words = max(2, int(run.options.seconds * run.options.rate))
    run.say(f"gateway: {count} streams, read from the broker")
    case = f"{count} streams"
    run.report.add("gateway streams", f"{case}, broker", **await stream_words(run, count, f"gateway, {case}, broker"))
    for how in ways:
        name = f"{case}, {how}"
        run.say(f"gateway: {name}")
        sessions = await _sessions(run, count)
        jobs = [f"/v1/sessions/{session.id}/events?after={await _end(run, session)}" for session in sessions]
        if how == "socket":
            jobs = [path.replace("/events?", "/socket?") for path in jobs]
        async with _client(run, Job(gateway.port, how, jobs)) as client:
            await client.opened(run, name, count)
            cpu = Cpu(run, gateway=gateway.pid, client=client.pid)
            await _send_all(run, sessions, words)
            seen = await client.seen(words / run.options.rate)
            used = cpu.per(seen.words, "token")
        _check(run, name, seen, count, words)
        run.report.add("gateway streams", name, **_latency(seen), **used)
        for session in sessions:
            await session.delete()


async def _sessions(run: Run, count: int) -> list[Session]:
    """New sessions that have run a turn."""
    prefix = f"g{uuid.uuid4().hex[:8]}"
    sessions = [run.client.session(f"{prefix}-{i}", agent="echo") for i in range(count)]

    async def warm(session: Session) -> None:
        await (await session.send("bench 3 50")).result(SETTLE)

    async with anyio.create_task_group() as group:
        for session in sessions:
            group.start_soon(warm, session)
    return sessions


async def _send_all(run: Run, sessions: Sequence[Session], words: int) -> None:
    async def send(session: Session, delay: float) -> None:
        await anyio.sleep(delay)
        await session.send(f"bench {words} {run.options.rate}")

    spread_over = min(1.0, run.options.seconds / 4)
    async with anyio.create_task_group() as group:
        for number, session in enumerate(sessions):
            group.start_soon(send, session, spread_over * number / len(sessions))


async def _end(run: Run, session: Session) -> int:
    return (await run.client.broker.log.last(session.id)).offset


def _check(run: Run, name: str, seen: Seen, streams: int, words: int) -> None:
    what = f"gateway, {name}"
    run.report.expect(f"{what}: streams read to their end", seen.streams, streams)
    run.report.expect(f"{what}: words", seen.words, streams * words)
    run.report.expect(f"{what}: words lost", seen.lost, 0)
    run.report.expect(f"{what}: words doubled", seen.doubled, 0)
    run.report.expect(f"{what}: jumps in the offsets", seen.jumps, 0)
    run.report.expect(f"{what}: answers that are the stored ones", seen.as_stored, streams)


def _latency(seen: Seen) -> dict[str, Figure]:
    delays = [delay / 1e6 for delay in seen.delays]
    return {
        "tokens": seen.words,
        **spread("latency", delays),
        "latency_max_ms": max(delays, default=None),
        "lost": seen.lost,
        "doubled": seen.doubled,
    }


# ------------------------------------------------------------------------------------------------------------ fan-out


async def _fan_out(run: Run, gateway: _Gateway, clients: int) -> None:
    """One stream for many clients, and for one reader at the broker at the same time."""
    words = max(2, int(run.options.seconds * run.options.rate))
    name = f"{clients} clients of one stream"
    run.say(f"gateway: {name}")
    async with run.watches(1) as (watch,):
        path = f"/v1/sessions/{watch.session.id}/events?after={watch.offset}"
        await gateway.until_unwatched()
        async with _client(run, Job(gateway.port, "sse", [path] * clients)) as client:
            await client.opened(run, name, clients)
            watched = await gateway.watched()
            cpu = Cpu(run, gateway=gateway.pid, client=client.pid)
            turn = await watch.session.send(f"bench {words} {run.options.rate}")
            direct = await watch.until_ended(turn, within=SETTLE + 10 * run.options.seconds)
            seen = await client.seen(0)
            used = cpu.per(seen.words, "token")
    run.check(direct, f"gateway, {name}, the reader at the broker", words)
    _check(run, name, seen, clients, words)
    run.report.expect(f"gateway, {name}: sessions watched at the broker for them", watched, 1)
    run.report.add(
        "gateway fan-out",
        name,
        **_latency(seen),
        **spread("at_the_broker", [delay / 1e6 for delay in direct.delays]),
        subscriptions=watched,
        **used,
    )


# ------------------------------------------------------------------------------------------------------- coming back


async def _replay(run: Run, gateway: _Gateway) -> None:
    """A session that is read from its beginning: over SSE, page by page, and from the broker."""
    events = run.options.events
    run.say(f"gateway: storing a session of {events} events")
    session = run.client.session(f"g{uuid.uuid4().hex[:8]}")
    await store(run.client.broker.log, session.id, events)
    path = f"/v1/sessions/{session.id}/events?after=0"
    run.say(f"gateway: reading {events} events")
    rounds = run.options.rounds + 1  # the first is the warm-up
    reads = {"broker": [await _read_all(session) for _ in range(rounds)]}
    for way, how in _REPLAYS.items():
        async with _client(run, Job(gateway.port, how, [path], until=events, rounds=rounds)) as client:
            reads[way] = [await client.seen(0) for _ in range(rounds)]
    for way, seen in reads.items():
        exact = sum(one.digest == reads["broker"][0].digest and one.jumps == 0 for one in seen)
        run.report.expect(f"gateway, {events} events, {way}: reads of exactly what is stored", exact, rounds)
        wholes = [one.whole / 1e6 for one in seen[1:]]
        run.report.add(
            "gateway resume",
            f"{events} events, {way}",
            **spread("first_event", [one.first / 1e6 for one in seen[1:]]),
            **spread("whole", wholes),
            events_per_s=events * 1e3 / (quantile(wholes, 0.5) or 1.0),
        )
    await session.delete()


async def _read_all(session: Session) -> Seen:
    begin = time.monotonic_ns()
    first = 0
    events: list[Event] = []
    async for event in session.events(follow=False):
        first = first or time.monotonic_ns()
        events.append(event)
    whole = time.monotonic_ns()
    digest = Digest()
    for event in events:
        digest.add(event)
    return Seen(first=first - begin, whole=whole - begin, digest=digest.text)


# --------------------------------------------------------------------------------------------------------------- idle


async def _idle(run: Run, gateway: _Gateway, clients: int, *, one_session: bool) -> None:
    """Clients that wait: what they hold of the gateway's memory, and take of the processor."""
    most = _files(clients + _SPARE) - _SPARE
    name = f"{clients} on one session" if one_session else f"{clients}, each its own"
    count = min(clients, most)
    run.say(f"gateway: storing sessions for {count} idle clients")
    prefix = f"i{uuid.uuid4().hex[:8]}"
    names = [f"{prefix}-{i}" for i in range(1 if one_session else count)]
    await _store_each(run, names)
    paths = [f"/v1/sessions/{names[i % len(names)]}/events?after=0" for i in range(count)]
    run.say(f"gateway: {name}")
    before = await _settled(gateway)
    begin = time.monotonic()
    async with _client(run, Job(gateway.port, "idle", paths, until=_EVENTS)) as client:
        await client.opened(run, name, count)
        opening = time.monotonic() - begin
        after = await _settled(gateway)
        await anyio.sleep(_CALM * run.options.seconds)  # a session is looked at less and less often
        used, began = _used(run, gateway), time.monotonic()
        await anyio.sleep(1.5 * run.options.seconds)  # by default, a keep-alive for each
        shares = [
            None if start is None or end is None else 100 * (end - start) / (time.monotonic() - began)
            for start, end in zip(used, _used(run, gateway), strict=True)
        ]
        watched = await gateway.watched()
        seen = await client.stop()
    run.report.expect(f"gateway, {name}: clients still there", seen.streams, count)
    run.report.expect(f"gateway, {name}: sessions watched", watched, len(names))
    if count < clients:
        name = f"{name}: this machine allows {count}"
    run.report.add(
        "gateway idle",
        name,
        clients=count,
        opened_per_s=count / opening,
        memory_per_client_kB=None if before is None or after is None else (after - before) / count / 1e3,
        memory_before_MB=None if before is None else before / 1e6,
        memory_MB=None if after is None else after / 1e6,
        gateway_cpu_percent=shares[0],
        server_cpu_percent=shares[1],
        subscriptions=watched,
    )


async def _store_each(run: Run, names: Sequence[str]) -> None:
    limiter = anyio.Semaphore(_AT_ONCE)

    async def one(name: str) -> None:
        async with limiter:
            await store(run.client.broker.log, name, _EVENTS)

    async with anyio.create_task_group() as group:
        for name in names:
            group.start_soon(one, name)


async def _settled(gateway: _Gateway) -> int | None:
    await gateway.watched()  # so that it has served a request
    await anyio.sleep(_SETTLED)
    return gateway.memory()


def _used(run: Run, gateway: _Gateway) -> tuple[float | None, float | None]:
    return cpu_seconds(gateway.pid), cpu_seconds(run.place.server)


def _files(wanted: int) -> int:
    """Let the processes started from now on open so many files; return how many they may."""
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(wanted, soft)
    if soft < min(wanted, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    return min(wanted, hard)


# ---------------------------------------------------------------------------------------------------------- processes


class _Gateway(Struct, frozen=True):
    """A gateway process."""

    port: int
    pid: int

    async def watched(self) -> int:
        """Sessions it has a subscription for at the broker."""
        return await anyio.to_thread.run_sync(self._watched)

    async def until_unwatched(self) -> None:
        """Wait until it has let go of what its earlier clients read: it lingers for some seconds."""
        with anyio.fail_after(SETTLE):
            while await self.watched():  # noqa: ASYNC110 - another process: it can only be asked
                await anyio.sleep(0.2)

    def _watched(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=30) as reply:
            return int(msgspec.json.decode(reply.read())["watched"])

    def memory(self) -> int | None:
        """Bytes of memory it has; None where the system does not say."""
        try:
            text = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return None
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        return int(found[1]) * 1024 if found else None


@asynccontextmanager
async def _open_gateway(run: Run) -> AsyncGenerator[_Gateway]:
    run.say("starting a gateway")
    _files(max(*run.options.clients, run.options.readers or _FAN_OUT) + _SPARE)
    words = ("--log-level", "warning", "gateway", "--insecure", "--port", "0", "--while-stdin")
    async with _process(run, command(*words), env={**os.environ, **run.place.environment}) as child:
        with _patience("the gateway did not start", SETTLE):
            line = await child.line()
        yield _Gateway(int(re.findall(rb":(\d+)", line)[-1]), child.pid)


class _Child:
    """A process that is told and tells lines: a gateway, or the clients."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self.pid = process.pid
        self._process = process
        self._lines = BufferedByteReceiveStream(process.stdout)

    async def line(self) -> bytes:
        try:
            return await self._lines.receive_until(b"\n", _LINE)
        except (anyio.IncompleteRead, anyio.EndOfStream):
            raise Unavailable(f"process {self.pid} of the bench ended") from None

    async def tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send(line + b"\n")

    async def opened(self, run: Run, name: str, count: int) -> None:
        with _patience("the clients did not get through", _OPEN):
            opened = msgspec.json.decode(await self.line(), type=Opened)
        run.report.expect(f"gateway, {name}: streams opened", (opened.streams, *opened.refused), (count,))

    async def seen(self, seconds: float) -> Seen:
        """What it saw, when all has come; or what has come when that is not so ``seconds`` and a minute from now."""
        line = b""
        with anyio.move_on_after(SETTLE + 3 * seconds):
            line = await self.line()
        return msgspec.json.decode(line, type=Seen) if line else await self.stop()

    async def stop(self) -> Seen:
        """What it has seen by now."""
        await self.tell(b"stop")
        with _patience("the clients did not stop", SETTLE):
            return msgspec.json.decode(await self.line(), type=Seen)


@asynccontextmanager
async def _client(run: Run, job: Job) -> AsyncGenerator[_Child]:
    words = [sys.executable, "-m", "agentrun.cli._bench_http"]
    async with _process(run, words) as child:
        await child.tell(msgspec.json.encode(job))
        yield child


@asynccontextmanager
async def _process(run: Run, words: Sequence[str], *, env: Mapping[str, str] | None = None) -> AsyncGenerator[_Child]:
    with tempfile.TemporaryFile("a+b", prefix="agentrun-bench-") as said:
        process = await anyio.open_process(words, stdin=PIPE, stdout=PIPE, stderr=said, env=env, start_new_session=True)
        try:
            yield _Child(process)
        finally:
            with anyio.CancelScope(shield=True):
                assert process.stdin is not None
                await process.stdin.aclose()
                with anyio.move_on_after(_END):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                await process.aclose()
            said.seek(0)
            run.report.worker_log += said.read().decode(errors="replace")


@contextmanager
def _patience(what: str, seconds: float) -> Generator[None]:
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Unavailable(f"{what} within {seconds:g} s")
