"""The tasks of a broker end with it, and errors come out as they were raised."""

from __future__ import annotations

import anyio
import pytest

from agentrun.background import Background


async def fail(error: Exception) -> None:
    raise error


async def wait_beside(*errors: Exception) -> None:
    """Wait for ever in the body of a background whose tasks raise these."""
    async with Background() as background:
        for error in errors:
            background.group.start_soon(fail, error)
        await anyio.sleep_forever()


async def test_the_end_cancels_the_tasks_and_waits_for_them() -> None:
    ended = False

    async def task() -> None:
        nonlocal ended
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            ended = True

    background = Background()
    async with background:
        background.group.start_soon(task)
        await anyio.wait_all_tasks_blocked()
    assert ended
    assert not background.running


async def test_what_the_body_raises_goes_on_as_it_is() -> None:
    with pytest.raises(ValueError, match="body"):
        async with Background():
            raise ValueError("body")


async def test_a_task_that_fails_ends_the_body_with_its_error() -> None:
    with pytest.raises(ValueError, match="task"):
        await wait_beside(ValueError("task"))


async def test_several_errors_are_a_group() -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        await wait_beside(ValueError("one"), KeyError("two"))
    assert raised.group_contains(ValueError)
    assert raised.group_contains(KeyError)


async def test_a_cancelled_body_stays_cancelled() -> None:
    with anyio.CancelScope() as scope:
        async with Background():
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught


async def test_nothing_is_started_where_it_is_not_open() -> None:
    background = Background()
    with pytest.raises(RuntimeError, match="async with"):
        _ = background.group
    async with background:
        pass
    with pytest.raises(RuntimeError, match="async with"):
        _ = background.group
