"""Tasks that run beside a body, and whose errors come out as they were raised."""

from __future__ import annotations

from types import TracebackType
from typing import Self, cast

import anyio
from anyio.abc import TaskGroup

_Exc = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


class Background:
    """A task group whose tasks end with its body: they are cancelled then, and waited for.

    An error of a task ends the body, as with any task group, but is raised as it is and not in a group (if it is the
    only one); and so is what the body raised.
    """

    def __init__(self) -> None:
        self._group: TaskGroup | None = None

    @property
    def running(self) -> bool:
        """Whether tasks can be started."""
        return self._group is not None

    @property
    def group(self) -> TaskGroup:
        """Where to start a task.

        Raises:
            RuntimeError: It has not been entered, or has ended.
        """
        if self._group is None:
            raise RuntimeError("it is not open: use it inside `async with`")
        return self._group

    async def __aenter__(self) -> Self:
        group = anyio.create_task_group()
        await group.__aenter__()
        self._group = group
        return self

    async def __aexit__(self, *exc: object) -> None:
        group = self.group
        group.cancel_scope.cancel()
        try:
            await group.__aexit__(*cast("_Exc", exc))
        except BaseExceptionGroup as errors:
            others = [e for e in errors.exceptions if e not in exc]
            if len(others) > 1:
                raise
            if others:
                raise others[0] from None
        finally:
            self._group = None
