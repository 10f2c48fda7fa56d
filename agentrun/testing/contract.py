"""Runs the checks, as pytest tests or without pytest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import anyio
from msgspec import Struct

from agentrun.testing import (
    contract_expiry,
    contract_log,
    contract_order,
    contract_queue,
    contract_reading,
    contract_signals,
)
from agentrun.testing.contract_base import Check, ContractBroken, Environments

__all__ = ["CHECKS", "BrokerContract", "Outcome", "run_check", "run_contract"]

CHECKS: tuple[Check, ...] = (
    *contract_log.CHECKS,
    *contract_reading.CHECKS,
    *contract_expiry.CHECKS,
    *contract_queue.CHECKS,
    *contract_order.CHECKS,
    *contract_signals.CHECKS,
)
"""Every check, each named for the line of the contract in `agentrun.broker` that it checks."""

TIME_LIMIT = 90.0
"""Seconds after which a check counts as failed."""


class Outcome(Struct, frozen=True):
    """How a check went. ``error`` is None where the promise was kept."""

    check: Check
    error: BaseException | None


async def run_check(check: Check, environments: Environments, *, limit: float = TIME_LIMIT) -> None:
    """Run one check in an environment of its own.

    Raises:
        ContractBroken: The promise is not kept, or nothing was heard of it for ``limit`` seconds.
    """
    with anyio.move_on_after(limit) as scope:
        async with environments(check.settings) as environment:
            await check.run(environment)
    if scope.cancelled_caught:
        raise ContractBroken(f"{check.name} did not end within {limit} s")


async def run_contract(
    environments: Environments, checks: Iterable[Check] = CHECKS, *, limit: float = TIME_LIMIT, at_once: int = 1
) -> list[Outcome]:
    """Run checks whatever their outcome, ``at_once`` of them side by side, each in its own environment."""
    outcomes: list[Outcome] = []
    slots = anyio.CapacityLimiter(at_once)

    async def run(check: Check) -> None:
        error: BaseException | None = None
        async with slots:
            try:
                await run_check(check, environments, limit=limit)
            except Exception as raised:
                error = raised
        outcomes.append(Outcome(check, error))

    async with anyio.create_task_group() as tasks:
        for check in checks:
            tasks.start_soon(run, check)
    return outcomes


class BrokerContract:
    """The contract as a pytest class: subclass it and give a fixture ``environments``. See `agentrun.testing`."""

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Make a test of each check."""
        if "check" in metafunc.fixturenames:
            metafunc.parametrize("check", CHECKS, ids=[c.name for c in CHECKS])

    def test_promise(self, check: Check, environments: Environments) -> None:
        """The broker keeps the promise this test is named for."""
        anyio.run(run_check, check, environments)
