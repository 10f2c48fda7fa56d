"""Who may do what: what a verified token allows, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

from msgspec import Struct

from agentrun.errors import InvalidInput
from agentrun.gateway.problems import Problem

__all__ = ["ALL_RIGHTS", "RESERVED", "Principal", "Right", "check_patterns", "check_rights"]

Right = Literal["read", "send", "cancel", "steer", "answer", "delete"]

OF_TURNS = ("cancel", "steer", "answer")
"""Rights that concern a turn: one's own, or everybody's with ``:any``."""
ALL_RIGHTS = frozenset((*get_args(Right), *(f"{right}:any" for right in OF_TURNS)))

RESERVED = "agentrun--"
"""What the ids of the gateway's own sessions begin with. No token reaches them."""

_PATTERN = re.compile(r"[A-Za-z0-9_*-]{1,128}\Z")
_MOST_PATTERNS = 200


def check_patterns(what: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the patterns if each can be one.

    Raises:
        InvalidInput: One is not 1 to 128 of ``A-Z a-z 0-9 _ - *``, or there are more than 200.
    """
    found = tuple(patterns)
    for pattern in found:
        if not _PATTERN.match(pattern):
            raise InvalidInput(
                f"{what} are ids in which * stands for any run of characters (A-Z a-z 0-9 _ - *, at most 128), "
                f"not {pattern[:140]!r}"
            )
    if len(found) > _MOST_PATTERNS:
        raise InvalidInput(f"{what}: {len(found)} patterns, at most {_MOST_PATTERNS} are taken")
    return found


def check_rights(rights: Iterable[str]) -> frozenset[str]:
    """Return the rights if all are known.

    Raises:
        InvalidInput: One is not.
    """
    found = frozenset(rights)
    if unknown := found - ALL_RIGHTS:
        raise InvalidInput(f"rights are {', '.join(sorted(ALL_RIGHTS))}; not {', '.join(sorted(unknown))[:140]}")
    return found


class Principal(Struct, frozen=True, kw_only=True):
    """Whoever sends a request, as the token says that was verified.

    Attributes:
        user: The token's ``sub``; stamped on what is appended. None: turns have no owner, none is one's own.
        sessions: Patterns of the sessions it is for: an id, or with ``*`` for any run of characters.
        rights: What may be done in them, such as ``read`` or ``cancel:any`` (which includes ``cancel``).
        agents: Patterns of the agents turns may be sent to; None: any.
        jti: The token's id, by which it is revoked.
        expires: When the token ceases to be accepted, in seconds since the epoch.
        key: Under what its requests are counted: never the token. Empty: they are not.
    """

    user: str | None
    sessions: tuple[str, ...]
    rights: frozenset[str]
    agents: tuple[str, ...] | None = None
    jti: str | None = None
    expires: float | None = None
    key: str = ""

    def may(self, right: Right, session: str) -> bool:
        """Whether it has the right in this session, to its own turns at least."""
        if session.startswith(RESERVED):
            return False
        held = right in self.rights or f"{right}:any" in self.rights
        return held and any(_matches(pattern, session) for pattern in self.sessions)

    def require(self, right: Right, session: str) -> None:
        """Refuse what it may not do in this session; to be asked before anything is looked up there.

        Raises:
            Problem: 403, whether the session exists or not; 404 for a session of the gateway's own.
        """
        if session.startswith(RESERVED):
            raise Problem(404, "no_such_session", f"sessions whose id begins with {RESERVED} are the gateway's own")
        if not self.may(right, session):
            raise _forbidden(f"the token does not give the right {right} in this session", right)

    def require_any(self, right: Right, session: str) -> None:
        """Refuse unless it has the right to everybody's turns: for what touches turns that are not named.

        Raises:
            Problem: 403.
        """
        self.require(right, session)
        if f"{right}:any" not in self.rights:
            raise _forbidden(f"this concerns other users' turns: it needs the right {right}:any", f"{right}:any")

    def require_turn(self, right: Right, session: str, owner: str | None) -> None:
        """Refuse unless it has the right to a turn of this owner (the user its request names, None if none).

        Raises:
            Problem: 403.
        """
        self.require(right, session)
        if f"{right}:any" in self.rights:
            return
        if self.user is None or self.user != owner:
            raise _forbidden(f"this is another user's turn: it needs the right {right}:any", f"{right}:any")

    def require_replace(self, session: str, owner: str | None) -> None:
        """Refuse to take a turn of this owner out of the history, by a turn sent in its place: it is one's own to take
        out, or needs ``cancel:any``.

        Raises:
            Problem: 403.
        """
        self.require("send", session)
        if "cancel:any" not in self.rights and (self.user is None or self.user != owner):
            raise _forbidden("this would replace another user's turn: it needs the right cancel:any", "cancel:any")

    def require_agent(self, agent: str) -> None:
        """Refuse an agent that turns may not be sent to.

        Raises:
            Problem: 403.
        """
        if self.agents is not None and not any(_matches(pattern, agent) for pattern in self.agents):
            raise _forbidden("the token does not allow this agent", "send")


def everything() -> Principal:
    """Whom authentication that is switched off lets in: everybody may do everything."""
    return Principal(user=None, sessions=("*",), rights=ALL_RIGHTS)


def _forbidden(detail: str, right: str) -> Problem:
    headers = {"WWW-Authenticate": f'Bearer realm="agentrun", error="insufficient_scope", scope="{right}"'}
    extra: dict[str, Any] = {"right": right}
    return Problem(403, "forbidden", detail, headers=headers, **extra)


def _matches(pattern: str, name: str) -> bool:
    # No regular expression: patterns may hold what a user typed, and a backtracking match takes for ever on some.
    first, *rest = pattern.split("*")
    if not rest:
        return name == first
    *middle, last = rest
    if not name.startswith(first):
        return False
    at = len(first)
    for part in middle:
        at = name.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return name.endswith(last) and len(name) - len(last) >= at
