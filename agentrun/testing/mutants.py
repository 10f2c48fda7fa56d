"""Brokers that each break one promise, to prove that the suite catches it.

A mutant is the broker in memory with one fault. `MUTANTS` lists them, each with the check that has to catch it: run
that with `run_contract` in the mutant's ``environments``, and see that it fails.
"""

from agentrun.testing import mutants_log, mutants_queue
from agentrun.testing.mutants_base import Mutant

__all__ = ["MUTANTS", "Mutant"]

MUTANTS: tuple[Mutant, ...] = (*mutants_log.MUTANTS, *mutants_queue.MUTANTS)
