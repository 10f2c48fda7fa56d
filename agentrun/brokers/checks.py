"""What every broker refuses, in the same words."""

from __future__ import annotations

from agentrun.broker import Kind
from agentrun.errors import InvalidInput, Misconfigured, TooLarge


def check_record(kind: Kind, agent: str | None, body: bytes, limit: int) -> None:
    """See that a record can be stored at all.

    Raises:
        TooLarge: Its body has more than ``limit`` bytes.
        InvalidInput: It is to be queued, and does not say for whom.
    """
    if len(body) > limit:
        raise TooLarge(len(body), limit)
    if kind is Kind.TURN and agent is None:
        raise InvalidInput("a record of kind TURN needs the agent it is queued for")


def check_lease_ttl(agent: str, found: float, wanted: float | None) -> None:
    """See that a queue that is there has the lease time that was asked for.

    Raises:
        Misconfigured: It has another one.
    """
    if wanted is not None and wanted != found:
        raise Misconfigured(
            f"the queue of agent {agent} has a lease time of {found:g} s, not {wanted:g} s: "
            "ask for the same, or take another name"
        )


def not_open(agent: str) -> Misconfigured:
    """What to raise when a queue is to give a lease and was not opened."""
    return Misconfigured(f"the queue of agent {agent} is not open: call turns.open({agent!r}) first")
