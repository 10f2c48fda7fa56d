"""Waking many at once."""

from __future__ import annotations

import time

import anyio

from agentrun.bell import Bell, Ear


async def test_all_who_wait_are_woken_and_nobody_else() -> None:
    bell = Bell()
    heard: list[int] = []

    async def wait(number: int) -> None:
        if await Ear(bell).wait(60):
            heard.append(number)

    bell.ring()  # for nobody
    async with anyio.create_task_group() as group:
        for number in range(3):
            group.start_soon(wait, number)
        await anyio.wait_all_tasks_blocked()
        assert heard == []
        bell.ring()
        await anyio.wait_all_tasks_blocked()
        assert heard == [0, 1, 2]
        assert not await Ear(bell).wait(0.01), "an earlier ring counts for nothing"


async def test_who_leaves_is_forgotten() -> None:
    bell = Bell()
    ear = Ear(bell)
    assert not await ear.wait(0)
    with anyio.move_on_after(0.01) as scope:
        await ear.wait(60)
    assert scope.cancelled_caught
    async with anyio.create_task_group() as group:
        group.start_soon(ear.wait, 60)
        await anyio.wait_all_tasks_blocked()
        bell.ring()
        group.cancel_scope.cancel()  # after the ring, before it is heard
    assert bell._waiting == {}
    ear.close()


async def test_each_wait_has_its_own_length() -> None:
    bell = Bell()
    ear = Ear(bell)

    async def ring_at_once() -> None:
        bell.ring()

    for seconds in (60, 0.05, 60, 0.1, 0.02):
        begin = time.monotonic()
        async with anyio.create_task_group() as group:
            if seconds == 60:
                group.start_soon(ring_at_once)
            with anyio.fail_after(20):
                assert await ear.wait(seconds) is (seconds == 60)
        if seconds < 60:
            assert time.monotonic() - begin > seconds / 2
    ear.close()


async def test_a_wait_that_outlasts_the_timer_of_the_one_before() -> None:
    bell = Bell()
    ear = Ear(bell)
    async with anyio.create_task_group() as group:
        group.start_soon(ear.wait, 0.05)
        await anyio.wait_all_tasks_blocked()
        bell.ring()
    begin = time.monotonic()
    assert not await ear.wait(0.15)
    assert time.monotonic() - begin > 0.1
