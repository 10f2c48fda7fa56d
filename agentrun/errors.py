"""The errors of agentrun, each named for its condition.

::

    AgentrunError
      + BrokerError
        - Unavailable        the broker cannot be reached, or did not answer in time
        - Misconfigured      the broker, stream or consumer found is not what is needed
        - TooLarge           a record is over the broker's limit
        - Conflict           the session moved on since it was read (compare-and-append)
        - Duplicate          this input was stored before, under the same id
        - NoListener         nobody listens on the channel of a live request
      + LeaseLost            the lease is no longer ours
        - Fenced             another owner took the session over
      + SessionError
        - SessionBusy        on_busy="reject" met a session with work
        - QueueFull          the session has max_queued turns waiting
        - TurnNotFound       the session holds no such turn
        - NotWaiting         the question is not open: unknown, answered, or its turn ended
        - SessionGone        the session was deleted under the caller
          + RecordsLost      the broker lost records of it that it had acknowledged
      + SessionExists        an import met other records under the session's name
      + TurnFailed           raised by Turn.result() for a turn that did not complete
      + InvalidInput         an argument, id or record that cannot be used
        - IdTaken            the id names another request already
    AuthorSignal             what an agent's author raises
      - Retry                try this turn again later
      - Fail                 end this turn as failed, do not retry
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentrun.broker import Tail

__all__ = [
    "AgentrunError",
    "AuthorSignal",
    "BrokerError",
    "Conflict",
    "Duplicate",
    "Fail",
    "Fenced",
    "IdTaken",
    "InvalidInput",
    "LeaseLost",
    "Misconfigured",
    "NoListener",
    "NotWaiting",
    "QueueFull",
    "RecordsLost",
    "Retry",
    "SessionBusy",
    "SessionError",
    "SessionExists",
    "SessionGone",
    "TooLarge",
    "TurnFailed",
    "TurnNotFound",
    "Unavailable",
]


class AgentrunError(Exception):
    """Everything agentrun raises on purpose, but for what authors raise."""


class BrokerError(AgentrunError):
    """The broker said no, or said nothing."""


class Unavailable(BrokerError):
    """The broker cannot be reached or did not answer in time. Trying again later is right."""


class Misconfigured(BrokerError):
    """What was found at the broker is not what is needed. The message says which command mends it."""


class TooLarge(BrokerError):
    """A record is over the broker's limit.

    Attributes:
        size: Bytes the record has.
        limit: Bytes the broker takes.
    """

    def __init__(self, size: int, limit: int, what: str = "record") -> None:
        super().__init__(
            f"the {what} has {size} bytes, the broker takes {limit}: "
            "send less, or store it elsewhere and send a reference"
        )
        self.size = size
        self.limit = limit


class Conflict(BrokerError):
    """Compare-and-append found the session further on than the caller knew. Nothing was stored.

    Attributes:
        tail: The session's end as it is now, or None where the broker did not say.
    """

    def __init__(self, message: str, tail: Tail | None = None) -> None:
        super().__init__(message)
        self.tail = tail


class Duplicate(BrokerError):
    """An input with this id is stored already; nothing was stored now.

    Attributes:
        offset: The offset of the record stored before.
    """

    def __init__(self, key: str, offset: int) -> None:
        super().__init__(f"{key!r} is stored already, at offset {offset}")
        self.key = key
        self.offset = offset


class NoListener(BrokerError):
    """Nobody listens on the channel of a live request."""


class LeaseLost(AgentrunError):
    """The lease is no longer ours: it ran out, was settled, or the session moved on without us."""


class Fenced(LeaseLost):
    """Another owner took the session over; the broker refuses what we append."""


class SessionError(AgentrunError):
    """The session is not in a state that allows what was asked."""


class SessionBusy(SessionError):
    """A turn sent with ``on_busy="reject"`` met a session that has work. Nothing was stored."""


class QueueFull(SessionError):
    """The session has ``max_queued`` inputs waiting. Nothing was stored."""


class TurnNotFound(SessionError):
    """The session's log holds no turn of this id."""


class NotWaiting(SessionError):
    """The question is not open: never asked, answered by someone else first, or its turn has ended."""


class SessionGone(SessionError):
    """The session was deleted while it was being used."""


class RecordsLost(SessionGone):
    """The broker lost records of the session that it had acknowledged: a failover, or a crash before they were on disk.

    Attributes:
        after: The offset of a record that was stored.
        end: The offset that the session ends at now, which may have been given out anew.
    """

    def __init__(self, session: str, after: int, end: int) -> None:
        super().__init__(
            f"the broker has lost records of session {session}: {after} was stored, and the session ends at {end} now "
            "or has another record there. What it has is read from offset 0"
        )
        self.after = after
        self.end = end


class SessionExists(AgentrunError):
    """A session that is to be imported has records here that are not those of the export."""


class TurnFailed(AgentrunError):
    """Raised by ``Turn.result()`` for a turn that ended in another way than completed.

    Attributes:
        turn: The turn's id.
        state: ``cancelled``, ``failed``, ``expired``, ``rejected`` or ``consumed``.
        code: A short machine-readable reason.
        retryable: Whether sending the same again may help.
    """

    def __init__(self, turn: str, state: str, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(f"turn {turn} {state}: {message}" if message else f"turn {turn} {state}")
        self.turn = turn
        self.state = state
        self.code = code
        self.retryable = retryable


class InvalidInput(AgentrunError, ValueError):
    """An argument, id or record that cannot be used. The message says what was expected and what came."""


class IdTaken(InvalidInput):
    """The id was used before, for another request. An id names one request: sending it again changes nothing."""


class AuthorSignal(Exception):
    """What an agent's author raises to say how a turn goes on."""


class Retry(AuthorSignal):
    """Try this turn again, on any worker.

    Args:
        message: Why; stands in the log.
        after: Seconds to wait before the next attempt.
    """

    def __init__(self, message: str = "", *, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Fail(AuthorSignal):
    """End this turn as failed; it is not tried again.

    Args:
        message: For the person who reads the answer; stands in the log.
        code: A short machine-readable reason.
    """

    def __init__(self, message: str, *, code: str = "agent_failed") -> None:
        super().__init__(message)
        self.code = code
