"""The suite catches every broken broker, and lets the sound one pass."""

from __future__ import annotations

import pytest

from agentrun.errors import AgentrunError
from agentrun.testing import CHECKS, ContractBroken, memory_environments, run_contract
from agentrun.testing.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.name}-{m.caught_by.partition('_')[0]}")
async def test_mutant_is_caught(mutant: Mutant) -> None:
    checks = [c for c in CHECKS if c.name == mutant.caught_by]
    assert checks, f"there is no check {mutant.caught_by}"
    (outcome,) = await run_contract(mutant.environments, checks, limit=4.0)
    assert outcome.error is not None, f"{mutant.caught_by} must catch {mutant.name}"
    # Caught for what it does, and not because it falls over.
    assert all(isinstance(e, ContractBroken | AgentrunError) for e in leaves(outcome.error)), outcome.error


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


async def test_sound_broker_passes_the_same_runner() -> None:
    outcomes = await run_contract(memory_environments, at_once=10)
    assert len(outcomes) == len(CHECKS)
    assert {o.check.name: o.error for o in outcomes if o.error} == {}


def test_every_line_of_the_contract_has_a_check_and_a_mutant() -> None:
    lines = {f"L{n}" for n in range(1, 8)} | {f"Q{n}" for n in range(1, 11)} | {f"S{n}" for n in range(1, 6)}
    assert {c.name.partition("_")[0] for c in CHECKS} == lines
    # Q1 is broken by whatever breaks the append or the lease.
    assert {m.caught_by.partition("_")[0] for m in MUTANTS} == lines - {"Q1"}
