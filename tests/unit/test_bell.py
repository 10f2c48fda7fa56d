"""Waking many at once."""

from __future__ import annotations

import anyio

from agentrun.bell import Bell


async def test_all_who_wait_are_woken_and_nobody_else() -> None:
    bell = Bell()
    heard: list[int] = []

    async def wait(number: int) -> None:
        if await bell.wait(60):
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
        assert not await bell.wait(0.01), "an earlier ring counts for nothing"


async def test_who_leaves_is_forgotten() -> None:
    bell = Bell()
    assert not await bell.wait(0)
    with anyio.move_on_after(0.01) as scope:
        await bell.wait(60)
    assert scope.cancelled_caught
    async with anyio.create_task_group() as group:
        group.start_soon(bell.wait, 60)
        await anyio.wait_all_tasks_blocked()
        bell.ring()
        group.cancel_scope.cancel()  # after the ring, before it is heard
    assert bell._waiting == {}
