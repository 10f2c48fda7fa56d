"""Checks of live requests and announcements: S1 to S5."""

from __future__ import annotations

import anyio
import anyio.to_thread

from agentrun.errors import NoListener, Unavailable
from agentrun.testing.contract_base import Check, Environment, check, expect
from agentrun.testing.contract_players import PROMPT, connections, until

CHECKS: list[Check] = []


class _Listener:
    """Remembers what it was asked, and answers with its name."""

    def __init__(self, name: bytes | None) -> None:
        self.name = name
        self.heard: list[bytes] = []

    async def __call__(self, body: bytes) -> bytes | None:
        self.heard.append(body)
        return None if self.name is None else self.name + b":" + body


@check(CHECKS, "S1")
async def request_is_answered(env: Environment) -> None:
    """A request reaches a listener on another connection, with its bytes, and brings its reply."""
    body = bytes(range(256))
    async with connections(env, 2) as (one, two):
        listener = _Listener(b"me")
        async with one.signals.listen("c", listener):
            for broker in (two, one):
                reply = await broker.signals.request("c", body, timeout=5)
                expect(reply == b"me:" + body, f"the reply must be the listener's: {reply[:20]!r}")
        expect(listener.heard == [body, body], f"each request must be heard once: {len(listener.heard)}")


@check(CHECKS, "S1")
async def every_listener_is_reached(env: Environment) -> None:
    """All listeners of a channel hear a request; one without a reply does not keep the others' away."""
    async with connections(env, 3) as (one, two, three):
        listeners = [_Listener(b"one"), _Listener(None), _Listener(b"three")]
        async with (
            one.signals.listen("c", listeners[0]),
            two.signals.listen("c", listeners[1]),
            three.signals.listen("c", listeners[2]),
        ):
            reply = await two.signals.request("c", b"1", timeout=5)
            expect(reply in (b"one:1", b"three:1"), f"the first reply must come back: {reply!r}")
            replies = sorted(await one.signals.gather("c", b"2", wait=0.5))
            expect(replies == [b"one:2", b"three:2"], f"`gather` must give all replies: {replies}")
        heard = [x.heard for x in listeners]
        expect(heard == [[b"1", b"2"]] * 3, f"every listener must hear every request: {heard}")


@check(CHECKS, "S1")
async def handlers_run_side_by_side(env: Environment) -> None:
    """A handler that takes its time does not keep a channel's next request waiting."""
    async with connections(env, 2) as (one, two):
        release = anyio.Event()

        async def handler(body: bytes) -> bytes:
            if body == b"slow":
                await release.wait()
            return body

        async with one.signals.listen("c", handler), anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: two.signals.request("c", b"slow", timeout=10))
            await anyio.sleep(0.1)
            reply = await two.signals.request("c", b"quick", timeout=5)
            expect(reply == b"quick", f"the quick request must be answered first: {reply!r}")
            release.set()


@check(CHECKS, "S2")
async def no_listener_is_told(env: Environment) -> None:
    """A request to nobody fails: at once with NoListener where the broker can tell, else after its time."""
    async with connections(env, 2) as (one, two):
        for _ in range(2):
            start = anyio.current_time()
            detects = one.capabilities.detects_no_listener
            timeout = 2.5 if detects else 0.3
            try:
                await one.signals.request("c", b"x", timeout=timeout)
            except (NoListener, Unavailable) as error:
                took = anyio.current_time() - start
                right = isinstance(error, NoListener) and took < PROMPT if detects else isinstance(error, Unavailable)
                expect(right, f"a request to nobody gave {type(error).__name__} after {took:.2f} s")
            else:
                expect(False, "a request to nobody must fail")
            expect(await one.signals.gather("c", b"x", wait=0.3) == [], "nobody has nothing to say")
            # The second time there was a listener, and it has gone.
            async with two.signals.listen("c", _Listener(b"me")):
                await one.signals.request("c", b"x", timeout=5)
            await anyio.sleep(0.1)  # the broker may hear a moment later that a listener has gone


@check(CHECKS, "S2")
async def silence_is_unavailable(env: Environment) -> None:
    """A request that is heard and not answered fails with Unavailable after its time."""
    async with connections(env, 2) as (one, two):
        listener = _Listener(None)
        async with one.signals.listen("c", listener):
            start = anyio.current_time()
            try:
                await two.signals.request("c", b"x", timeout=0.4)
            except Unavailable:
                took = anyio.current_time() - start
                expect(0.35 < took < 0.4 + PROMPT, f"no reply within 0.4 s was told after {took:.2f} s")
            else:
                expect(False, "a request without a reply must raise Unavailable")
        expect(listener.heard == [b"x"], "the request must have been heard")


@check(CHECKS, "S3")
async def channels_are_apart(env: Environment) -> None:
    """A request is heard on its own channel only, and by nobody who comes later."""
    async with connections(env, 2) as (one, two):
        names = ("c", "c1", "C", "d-1")
        listeners = {name: _Listener(name.encode()) for name in names}
        async with (
            one.signals.listen("c", listeners["c"]),
            one.signals.listen("c1", listeners["c1"]),
            two.signals.listen("C", listeners["C"]),
            two.signals.listen("d-1", listeners["d-1"]),
        ):
            for name in names:
                reply = await two.signals.request(name, name.encode(), timeout=5)
                expect(reply == f"{name}:{name}".encode(), f"channel {name} must answer: {reply!r}")
        late = _Listener(b"late")
        async with one.signals.listen("c", late):
            await anyio.sleep(0.1)
        expect(late.heard == [], f"nothing is remembered: {late.heard}")
        for name, listener in listeners.items():
            expect(listener.heard == [name.encode()], f"channel {name} must hear its own only: {listener.heard}")


@check(CHECKS, "S4")
async def handler_may_still_answer(env: Environment) -> None:
    """A handler that runs when its listening ends still answers; the next request finds nobody."""
    async with connections(env, 2) as (one, two):
        asked, closing, replies = anyio.Event(), anyio.Event(), list[bytes]()

        async def handler(body: bytes) -> bytes:
            asked.set()
            await closing.wait()
            await anyio.sleep(0.2)
            return b"last words"

        async def ask() -> None:
            replies.append(await two.signals.request("c", b"x", timeout=5))

        async with anyio.create_task_group() as tasks, one.signals.listen("c", handler):
            tasks.start_soon(ask)
            await asked.wait()
            closing.set()
        expect(replies == [b"last words"], f"the handler's reply must arrive: {replies}")
        try:
            await two.signals.request("c", b"x", timeout=0.3)
        except (NoListener, Unavailable):
            pass
        else:
            expect(False, "nobody listens any more")


@check(CHECKS, "S5")
async def announcement_reaches_all(env: Environment) -> None:
    """What is announced, from whatever thread, is heard by every listener, in order."""
    async with connections(env, 3) as (one, two, three):
        listeners = [_Listener(None), _Listener(b"a reply nobody waits for")]
        async with two.signals.listen("c", listeners[0]), three.signals.listen("c", listeners[1]):

            async def heard(what: bytes) -> bool:
                return all(what in listener.heard for listener in listeners)

            async def first() -> bool:
                one.signals.announce("c", b"first")  # a connection made for it may just begin: best effort
                await anyio.sleep(0.01)
                return await heard(b"first")

            expect(await until(first), f"an announcement must be heard: {[x.heard for x in listeners]}")
            said = [b"%d" % number for number in range(100)]
            await anyio.to_thread.run_sync(lambda: [one.signals.announce("c", body) for body in said])
            await until(lambda: heard(said[-1]))
            for listener in listeners:
                found = [body for body in listener.heard if body != b"first"]
                expect(found == said, f"announcements must come in order, each once: {found}")
