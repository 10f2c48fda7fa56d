"""Who sends a request: tokens, taken from where they may stand, verified, and revoked."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote_plus

import anyio
import msgspec
from anyio.abc import TaskStatus
from msgspec import Struct
from starlette.requests import HTTPConnection

from agentrun.client import Client
from agentrun.errors import InvalidInput, Unavailable
from agentrun.gateway.keys import AUDIENCE, LONGEST_USER, Keys, Refused
from agentrun.gateway.limits import Limiter
from agentrun.gateway.problems import Problem
from agentrun.gateway.revoked import Revocations
from agentrun.gateway.rights import ALL_RIGHTS, Principal, check_patterns, everything
from agentrun.settings import GatewaySettings

__all__ = ["Auth", "take_query_token"]

_DAY = 86400.0
_KNOWN = 10_000
"""Verified tokens that are remembered: about 2 kB each."""
_QUERY = "access_token"
_STATE = "agentrun.access_token"
_CHALLENGE = 'Bearer realm="agentrun"'


class _Claims(Struct):
    exp: float
    iat: float
    sessions: list[str]
    rights: list[str]
    sub: str | None = None
    jti: str | None = None
    agents: list[str] | None = None


class _Known(NamedTuple):
    principal: Principal
    version: int


class Auth:
    """Verifies who sends a request.

    A token is accepted if it is signed with one of the keys, for this audience and issuer, has ``exp`` and ``iat``, is
    good for at most ``max_ttl`` seconds altogether, has not expired, is not from the future, and is not revoked. What
    was verified is remembered until it expires, by the token's hash: the next request costs no signature check.

    `run` must run as long as requests are served: until it knows which tokens are revoked, all are refused with 503.

    Args:
        keys: To verify with.
        audience: What a token's ``aud`` must name.
        issuer: What its ``iss`` must be, or be one of; None: it is not looked at.
        max_ttl: Seconds from a token's ``iat`` to its ``exp``, at most.
        leeway: Seconds by which the clocks of who mints and of this machine may differ.

    Raises:
        InvalidInput: There is no key.
    """

    def __init__(
        self,
        *keys: Keys,
        audience: str = AUDIENCE,
        issuer: str | Sequence[str] | None = None,
        max_ttl: float = _DAY,
        leeway: float = 30.0,
    ) -> None:
        self._keys: Keys | None = Keys.joined(keys)
        self._audience = audience
        self._issuers = [issuer] if isinstance(issuer, str) else issuer
        self._max_ttl = max_ttl
        self._leeway = leeway
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._revoked = Revocations()
        self._limiter = Limiter(GatewaySettings())

    @classmethod
    def insecure(cls) -> Auth:
        """Let everybody do everything, as nobody in particular. For development, on loopback."""
        auth = cls(Keys.secret(secrets.token_hex(32)))
        auth._keys = None
        return auth

    @property
    def needs_token(self) -> bool:
        """Whether requests need a token; else everybody may do everything."""
        return self._keys is not None

    @property
    def ready(self) -> bool:
        """Whether requests can be let in yet."""
        return self._keys is None or self._revoked.ready

    def limit(self, settings: GatewaySettings) -> None:
        """Set the limits that requests, streams and failures are held to."""
        self._limiter = Limiter(settings)

    async def run(
        self,
        client: Client,
        changed: Callable[[], None],
        *,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Follow the revocations and refresh the keys, for ever; ``task_status`` is told when `ready`.

        ``changed`` is called, in the event loop, when tokens were revoked: whatever outlives its request must then ask
        `holds` again.
        """
        if self._keys is None:
            task_status.started()
            return
        async with anyio.create_task_group() as group:
            group.start_soon(self._keys.run)
            await group.start(self._revoked.run, client, changed)
            task_status.started()

    def holds(self, principal: Principal) -> bool:
        """Whether the principal's token is good still: not expired, not revoked. Costs a look into a dict."""
        if self._keys is None:
            return True
        return (principal.jti is None or principal.jti not in self._revoked) and not _expired(principal)

    def admit(self, principal: Principal) -> None:
        """Count one more request of a principal that was authenticated before, on a WebSocket.

        Raises:
            Problem: 401: the token is good no longer. 429: too many requests.
        """
        if not self.holds(principal):
            self._refuse("invalid_token", "the token has expired or been revoked", None)
        self._limiter.take(principal.key)

    def stream(self, principal: Principal) -> AbstractContextManager[None]:
        """Count one open stream of the principal's, while the context lasts.

        Raises:
            Problem: 429, on entering: it has as many as it may have.
        """
        return self._limiter.stream(principal.key)

    async def authenticate(self, conn: HTTPConnection, *, query: bool = False) -> Principal:
        """Return who sends this request, and count it.

        Args:
            conn: The request.
            query: Whether ``?access_token=`` will do, since an EventSource can send no headers. It does for GET with
                ``Accept: text/event-stream`` only.

        Raises:
            Problem: 401: no token, or not a good one; ``WWW-Authenticate`` says why (RFC 6750). 400: two tokens at
                once. 429: too many requests. 503: not ready yet.
        """
        if self._keys is None:
            return everything()
        address = conn.client.host if conn.client is not None else None
        return await self.verify(self._token(conn, query, address), address=address)

    async def verify(self, token: str, *, address: str | None = None) -> Principal:
        """Return whose token this is, and count a request of theirs; see `authenticate`.

        Args:
            token: The token, which may be anything.
            address: The client's, under which a failure is counted.

        Raises:
            Problem: 401, 429 or 503, as of `authenticate`.
        """
        if self._keys is None:
            return everything()
        if not self._revoked.ready:
            raise Problem(503, "not_ready", "which tokens are revoked is not known yet, the broker was not reached")
        try:
            principal = await self._principal(self._keys, token)
        except Refused as refused:
            self._refuse(refused.code, f"the token is refused: {refused}", address)
        except Unavailable as error:
            raise Problem(503, "keys_unavailable", str(error)) from error
        self._limiter.take(principal.key)
        return principal

    async def _principal(self, keys: Keys, token: str) -> Principal:
        digest = sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._known.get(digest)
        if known is not None and known.version == keys.version:
            principal = known.principal
            self._known.move_to_end(digest)
        else:
            claims = await keys.claims(token, audience=self._audience, issuers=self._issuers, leeway=self._leeway)
            principal = self._read(claims, digest)
            self._known[digest] = _Known(principal, keys.version)
            if len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        if _expired(principal):
            self._known.pop(digest, None)
            raise Refused("it has expired", "token_expired")
        if principal.jti is not None and principal.jti in self._revoked:
            raise Refused("it has been revoked", "token_revoked")
        return principal

    def _read(self, payload: dict[str, Any], digest: bytes) -> Principal:
        try:
            claims = msgspec.convert(payload, _Claims)
            sessions = check_patterns("sessions", claims.sessions)
            agents = None if claims.agents is None else check_patterns("agents", claims.agents)
        except (msgspec.ValidationError, InvalidInput) as error:
            raise Refused(f"a claim is missing or wrong: {error}") from None
        if claims.exp - claims.iat > self._max_ttl:
            raise Refused(f"it is good for longer (exp - iat) than the {self._max_ttl:g} s that are accepted")
        if claims.sub is not None and not 0 < len(claims.sub) <= LONGEST_USER:
            raise Refused(f"its sub does not have 1 to {LONGEST_USER} characters")
        return Principal(
            user=claims.sub,
            sessions=sessions,
            # Rights a later version knows give nothing here.
            rights=ALL_RIGHTS & frozenset(claims.rights),
            agents=agents,
            jti=claims.jti,
            expires=claims.exp + self._leeway,
            key=digest.hex()[:32],
        )

    def _token(self, conn: HTTPConnection, query: bool, address: str | None) -> str:
        headers = conn.headers.getlist("authorization")
        in_query: list[str] = conn.scope[_STATE] if _STATE in conn.scope else conn.query_params.getlist(_QUERY)
        if len(headers) + len(in_query) > 1:
            raise Problem(
                400,
                "two_tokens",
                "send one token, in the Authorization header or as access_token",
                headers={"WWW-Authenticate": f'{_CHALLENGE}, error="invalid_request"'},
            )
        if in_query:
            if query and conn.scope.get("method") == "GET" and _takes_events(conn):
                return in_query[0]
            self._refuse(
                "token_in_query",
                "access_token is for EventSource (GET with Accept: text/event-stream): send Authorization: Bearer",
                address,
            )
        scheme, _, token = headers[0].partition(" ") if headers else ("", "", "")
        if scheme.lower() != "bearer" or not token.strip():
            self._refuse("no_token", "send a token: Authorization: Bearer <token>", address)
        return token.strip()

    def _refuse(self, code: str, detail: str, address: str | None) -> NoReturn:
        self._limiter.failed(address)
        challenge = _CHALLENGE
        if code != "no_token":
            # A quoted string in a header: nothing but plain characters, and neither of these two.
            text = "".join(c if " " <= c <= "~" and c not in '"\\' else "'" for c in detail)
            challenge = f'{_CHALLENGE}, error="invalid_token", error_description="{text}"'
        raise Problem(401, code, detail, headers={"WWW-Authenticate": challenge})


def take_query_token(scope: MutableMapping[str, Any]) -> None:
    """Take ``access_token`` out of a request's query, so that nothing behind this ever writes it into a log."""
    raw: bytes = scope.get("query_string", b"")
    tokens: list[str] = []
    kept: list[bytes] = []
    for item in raw.split(b"&") if raw else ():
        name, _, value = item.partition(b"=")
        if unquote_plus(name.decode("latin-1")) == _QUERY:
            tokens.append(unquote_plus(value.decode("latin-1")))
        else:
            kept.append(item)
    scope[_STATE] = tokens
    if tokens:
        scope["query_string"] = b"&".join(kept)


def _expired(principal: Principal) -> bool:
    return principal.expires is not None and principal.expires <= time.time()


def _takes_events(conn: HTTPConnection) -> bool:
    accepted = ",".join(conn.headers.getlist("accept")).split(",")
    return any(entry.partition(";")[0].strip().lower() == "text/event-stream" for entry in accepted)
