"""Tokens and keys: what is accepted, what is refused and why, what is remembered."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from agentrun.brokers.memory import MemoryBroker
from agentrun.client import Client
from agentrun.errors import InvalidInput, Unavailable
from agentrun.gateway import revoked
from agentrun.gateway.auth import Auth, take_query_token
from agentrun.gateway.jwks import Source
from agentrun.gateway.keys import Keys, Refused, mint, unverified
from agentrun.gateway.limits import Limiter
from agentrun.gateway.problems import Problem
from agentrun.gateway.rights import ALL_RIGHTS, Principal
from agentrun.settings import GatewaySettings
from tests.gateway import tokens
from tests.gateway.tokens import OTHER_PRIVATE, OTHER_SECRET, PRIVATE, PUBLIC, SECRET, signed, until


@asynccontextmanager
async def running(auth: Auth, client: Client | None = None) -> AsyncIterator[Auth]:
    async with anyio.create_task_group() as group:
        await group.start(auth.run, client or Client(MemoryBroker()), lambda: None)
        yield auth
        group.cancel_scope.cancel()


@pytest.fixture
async def auth() -> AsyncIterator[Auth]:
    async with running(Auth(Keys.secret(SECRET), Keys.public(PUBLIC), issuer="tests")) as auth:
        yield auth


def connection(**changes: Any) -> HTTPConnection:
    headers = [(name.encode(), value.encode()) for name, value in changes.pop("headers", [])]
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "client": ("10.0.0.1", 1)}
    return HTTPConnection({**scope, **changes, "headers": headers})


async def refusal(auth: Auth, token: str) -> Problem:
    with pytest.raises(Problem) as caught:
        await auth.verify(token)
    assert caught.value.status == 401
    assert not token or token not in json.dumps(caught.value.body)
    assert not token or token not in caught.value.headers["WWW-Authenticate"]
    return caught.value


# ------------------------------------------------------------------------------------------------------------- good


@pytest.mark.parametrize("key", [SECRET, PRIVATE], ids=["HS256", "EdDSA"])
async def test_a_minted_token_says_who_may_do_what(auth: Auth, key: str | bytes) -> None:
    token = mint(
        key, user="ann", sessions=["s-1", "u7-*"], rights=["read", "cancel:any"], agents=["sup*"], issuer="tests"
    )
    principal = await auth.verify(token)
    assert (principal.user, principal.sessions, principal.agents) == ("ann", ("s-1", "u7-*"), ("sup*",))
    assert principal.rights == {"read", "cancel:any"}
    assert principal.jti == unverified(token)["jti"]
    assert principal.expires is not None
    assert 600 < principal.expires - time.time() <= 630
    assert token not in repr(principal)


async def test_claims_that_are_left_out_give_nothing(auth: Auth) -> None:
    principal = await auth.verify(signed(sub=None, jti=None, rights=["read", "admin", "send:any"], sessions=[]))
    assert (principal.user, principal.jti, principal.agents) == (None, None, None)
    assert principal.rights == {"read"}
    assert not principal.may("read", "s-1")


@pytest.mark.parametrize(
    ("algorithm", "private"),
    [("RS256", tokens.RSA), ("ES256", tokens.EC), ("EdDSA", PRIVATE)],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("form", ["pem", "jwk", "jwks"])
async def test_public_keys(algorithm: str, private: Any, form: str, tmp_path: Path) -> None:
    public = load_pem_public_key(PUBLIC) if algorithm == "EdDSA" else private.public_key()
    if form == "pem":
        keys = Keys.public(tokens.pem(public))
    elif form == "jwk":
        keys = Keys.public(tokens.jwk(public, None))
    else:
        (tmp_path / "jwks.json").write_text(json.dumps({"keys": [tokens.jwk(public, "k1", use="sig")]}))
        keys = Keys.jwks(tmp_path / "jwks.json")
    async with running(Auth(keys)) as auth:
        token = signed(private, algorithm, {"kid": "k1"})
        assert (await auth.verify(token)).user == "ann"
        await refusal(auth, tokens.tampered(token, sub="carl"))


# -------------------------------------------------------------------------------------------------------------- bad

_NOW = time.time
BAD: dict[str, tuple[Callable[[], str], str]] = {
    "expired": (lambda: signed(iat=int(_NOW()) - 700, exp=int(_NOW()) - 31), "expired"),
    "not-yet-nbf": (lambda: signed(nbf=int(_NOW()) + 90), "not valid yet"),
    "not-yet-iat": (lambda: signed(iat=int(_NOW()) + 90), "not valid yet"),
    "no-exp": (lambda: signed(exp=None), "no claim exp"),
    "no-iat": (lambda: signed(iat=None), "no claim iat"),
    "no-aud": (lambda: signed(aud=None), "no claim aud"),
    "no-iss": (lambda: signed(iss=None), "no claim iss"),
    "no-sessions": (lambda: signed(sessions=None), "sessions"),
    "no-rights": (lambda: signed(rights=None), "rights"),
    "audience": (lambda: signed(aud="elsewhere"), "audience"),
    "issuer": (lambda: signed(iss="elsewhere"), "issuer"),
    "too-long": (lambda: signed(exp=int(_NOW()) + 86402), "good for longer"),
    "no-iat-trick": (lambda: signed(iat=0, exp=int(_NOW()) + 600), "good for longer"),
    "exp-text": (lambda: signed(exp=str(int(_NOW()) + 600)), "exp"),
    "exp-infinite": (lambda: tokens.signed(exp=1e308), "good for longer"),
    "sub-number": (lambda: signed(sub=7), "JSON Web Token"),
    "sub-long": (lambda: signed(sub="x" * 257), "sub"),
    "sessions-text": (lambda: signed(sessions="s-1"), "sessions"),
    "sessions-path": (lambda: signed(sessions=["s.>"]), "sessions"),
    "sessions-many": (lambda: signed(sessions=["s"] * 201), "sessions"),
    "agents-wrong": (lambda: signed(agents=["a b"]), "agents"),
    "secret": (lambda: signed(OTHER_SECRET), "fits no key"),
    "key": (lambda: signed(OTHER_PRIVATE, "EdDSA"), "fits no key"),
    "alg-none": (lambda: tokens.forged({"alg": "none"}, tokens.claims()), "alg"),
    "alg-None": (lambda: tokens.forged({"alg": "None"}, tokens.claims()), "alg"),
    "alg-missing": (lambda: tokens.forged({"typ": "JWT"}, tokens.claims()), "alg"),
    "alg-list": (lambda: tokens.forged({"alg": ["HS256"]}, tokens.claims()), "alg"),
    "alg-hs512": (lambda: jwt.encode(tokens.claims(), SECRET * 2, "HS512"), "alg"),
    "alg-rs256": (lambda: signed(tokens.RSA, "RS256"), "alg"),
    "hs-with-public-key": (lambda: tokens.hs256_with(PUBLIC), "fits no key"),
    "hs-with-public-key-stripped": (lambda: tokens.hs256_with(PUBLIC.strip()), "fits no key"),
    "embedded-key": (
        lambda: signed(OTHER_PRIVATE, "EdDSA", {"jwk": tokens.jwk(load_pem_public_key(tokens.OTHER_PUBLIC), None)}),
        "fits no key",
    ),
    "key-url": (lambda: signed(OTHER_PRIVATE, "EdDSA", {"jku": "http://127.0.0.1:1/k", "kid": "../k"}), "fits no key"),
    "unsigned": (lambda: signed().rsplit(".", 1)[0] + ".", "fits no key"),
    "tampered": (lambda: tokens.tampered(signed(), rights=["read", "delete"]), "fits no key"),
    "empty": (lambda: "", "JSON Web Token"),
    "words": (lambda: "let me in", "JSON Web Token"),
    "not-ascii": (lambda: "ä.ö.ü", "JSON Web Token"),
    "surrogate": (lambda: "\ud800.b.c", "JSON Web Token"),
    "long": (lambda: signed(agents=["x" * 9000]), "at most 8192"),
    "list": (lambda: tokens.forged({"alg": "HS256"}, []), "fits no key"),
    "deep": (lambda: "e" * 100 + "." + "W" * 4000 + ".x", "JSON Web Token"),
}


@pytest.mark.parametrize("how", BAD)
async def test_a_bad_token_is_refused_with_the_reason(auth: Auth, how: str) -> None:
    make, reason = BAD[how]
    problem = await refusal(auth, make())
    assert reason in problem.detail
    challenge = problem.headers["WWW-Authenticate"]
    assert challenge.startswith('Bearer realm="agentrun", error="invalid_token", error_description="')
    assert challenge.isascii()
    assert challenge.count('"') == 6


@given(st.one_of(st.text(), st.from_regex(r"[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*")))
@settings(max_examples=300, deadline=None)
def test_no_text_is_more_than_refused(text: str) -> None:
    async def verify() -> None:
        keys = Keys.joined([Keys.secret(SECRET), Keys.public(PUBLIC)])
        with pytest.raises(Refused):
            await keys.claims(text, audience="agentrun", issuers=None, leeway=30)

    anyio.run(verify)


@given(
    st.dictionaries(
        st.sampled_from(["exp", "iat", "nbf", "aud", "iss", "sub", "jti", "sessions", "rights", "agents"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3),
        ),
    )
)
@settings(max_examples=300, deadline=None)
def test_no_claims_break_it(changes: dict[str, Any]) -> None:
    """Whoever has the key may still write nonsense: it is accepted or refused, nothing else."""

    async def verify() -> None:
        async with running(Auth(Keys.secret(SECRET))) as auth:
            status = 200
            try:
                principal = await auth.verify(token)
            except Problem as problem:
                status = problem.status
            else:
                assert principal.rights <= ALL_RIGHTS
            assert status in (200, 401)

    try:
        token = jwt.encode(tokens.claims() | changes, SECRET, "HS256")
    except (TypeError, UnicodeEncodeError):
        return  # not even a token
    anyio.run(verify)


# ------------------------------------------------------------------------------------------------------ time, memory


async def test_a_token_that_was_accepted_expires(auth: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    token = signed()
    principal = await auth.verify(token)
    assert auth.holds(principal)
    assert principal.expires is not None
    late = principal.expires + 0.1
    monkeypatch.setattr("agentrun.gateway.auth.time.time", lambda: late)
    assert not auth.holds(principal)
    assert (await refusal(auth, token)).code == "token_expired"
    with pytest.raises(Problem, match="401"):
        auth.admit(principal)


async def test_the_signature_is_checked_once(auth: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    token = signed()
    first = await auth.verify(token)
    checked: list[str] = []

    async def claims(self: Keys, token: str, **_: Any) -> dict[str, Any]:
        checked.append(token)
        raise Refused("not now")

    monkeypatch.setattr(Keys, "claims", claims)
    assert await auth.verify(token) is first
    assert not checked
    other = tokens.tampered(token, sub="carl")
    await refusal(auth, other)
    assert checked == [other]


async def test_what_is_remembered_is_bounded(auth: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrun.gateway.auth._KNOWN", 3)
    for i in range(10):
        await auth.verify(signed(jti=str(i)))
    assert len(auth._known) == 3


# ----------------------------------------------------------------------------------------------------- revocations


async def test_revoking_is_known_at_once_and_by_later_gateways() -> None:
    client = Client(MemoryBroker())
    changed = anyio.Event()
    auth = Auth(Keys.secret(SECRET))
    token, other = signed(jti="j1"), signed(jti="j2")
    async with anyio.create_task_group() as group:
        await group.start(auth.run, client, changed.set)
        principal, spared = await auth.verify(token), await auth.verify(other)
        assert auth.holds(principal)
        await revoked.revoke(client, "j1", until=time.time() + 700, by="ops")
        with anyio.fail_after(2):
            await changed.wait()
        assert not auth.holds(principal)
        assert auth.holds(spared)
        problem = await refusal(auth, token)
        assert (problem.code, problem.detail) == ("token_revoked", "the token is refused: it has been revoked")
        await auth.verify(other)
        group.cancel_scope.cancel()
    async with running(Auth(Keys.secret(SECRET)), client) as later:
        assert (await refusal(later, token)).code == "token_revoked"
        await later.verify(other)


async def test_nobody_gets_in_before_the_revocations_are_known() -> None:
    auth = Auth(Keys.secret(SECRET))
    assert not auth.ready
    with pytest.raises(Problem) as caught:
        await auth.verify(signed())
    assert (caught.value.status, caught.value.code) == (503, "not_ready")
    async with running(auth):
        assert auth.ready
        await auth.verify(signed())


async def test_what_is_known_outlives_the_broker_and_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revoked, "_PAUSE", 0.01)
    broker = MemoryBroker()
    client = Client(broker)
    await revoked.revoke(client, "j1")
    auth = Auth(Keys.secret(SECRET))
    async with running(auth, client):
        read = broker.log.read

        async def away(*_: Any, **__: Any) -> Any:
            raise Unavailable("the broker is away")

        monkeypatch.setattr(broker.log, "read", away)
        await broker.log.delete(revoked.SESSION)
        await anyio.sleep(0.05)
        assert (await refusal(auth, signed(jti="j1"))).code == "token_revoked"
        await auth.verify(signed(jti="j2"))
        monkeypatch.setattr(broker.log, "read", read)
        await revoked.revoke(client, "j2")
        await until(lambda: "j2" in auth._revoked)
        assert (await refusal(auth, signed(jti="j1"))).code == "token_revoked"


async def test_while_the_broker_is_away_from_the_start_nobody_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revoked, "_PAUSE", 0.01)
    broker = MemoryBroker()
    read = broker.log.read

    async def away(*_: Any, **__: Any) -> Any:
        raise Unavailable("the broker is away")

    monkeypatch.setattr(broker.log, "read", away)
    auth = Auth(Keys.secret(SECRET))
    async with anyio.create_task_group() as group:
        group.start_soon(auth.run, Client(broker), lambda: None)
        await anyio.sleep(0.05)
        with pytest.raises(Problem, match="503"):
            await auth.verify(signed())
        monkeypatch.setattr(broker.log, "read", read)
        await until(lambda: auth.ready)
        await auth.verify(signed())
        group.cancel_scope.cancel()


async def test_revocations_are_forgotten_when_their_tokens_have_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revoked, "_SWEEP", 10)
    now = 1000.0
    revocations = revoked.Revocations(clock=lambda: now)
    client = Client(MemoryBroker())
    async with anyio.create_task_group() as group:
        await group.start(revocations.run, client, lambda: None)
        await revoked.revoke(client, "for-ever")
        for i in range(9):
            await revoked.revoke(client, f"j{i}", until=1100)
        await until(lambda: len(revocations) == 10)
        now = 1101.0
        await revoked.revoke(client, "past", until=1100.5)
        await revoked.revoke(client, "new", until=1200)
        await until(lambda: "new" in revocations)
        assert len(revocations) == 2
        assert "for-ever" in revocations
        group.cancel_scope.cancel()


async def test_other_records_in_the_session_of_revocations_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    client = Client(MemoryBroker())
    session = client.session(revoked.SESSION, agent="echo")
    await session.send('{"type":"token.revoked","jti":"j1"}')
    await session.cancel()
    await client.broker.log.append(
        revoked.SESSION,
        b"\xff not json",
        kind=revoked.Kind.CANCEL,
        after=await client.broker.log.last(revoked.SESSION),
        pending=(await client.broker.log.last(revoked.SESSION)).pending,
    )
    await revoked.revoke(client, "j2")
    async with running(Auth(Keys.secret(SECRET)), client) as auth:
        await auth.verify(signed(jti="j1"))
        await refusal(auth, signed(jti="j2"))
    assert "is no revocation" in caplog.text


@pytest.mark.parametrize(("jti", "until"), [("", None), ("x" * 257, None), ("j", float("nan"))])
async def test_what_cannot_be_revoked(jti: str, until: float | None) -> None:
    with pytest.raises(InvalidInput):
        await revoked.revoke(Client(MemoryBroker()), jti, until=until)


# ------------------------------------------------------------------------------------------------ where a token stands

_SSE = ("accept", "text/event-stream")


async def test_the_header(auth: Auth) -> None:
    token = signed()
    for value in (f"Bearer {token}", f"bearer {token}", f"Bearer   {token} "):
        assert (await auth.authenticate(connection(headers=[("authorization", value)]))).user == "ann"


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer ", "Basic YTpi", "Token {}", "{}"])
async def test_no_token_in_the_header(auth: Auth, value: str | None) -> None:
    headers = [] if value is None else [("authorization", value.format(signed()))]
    with pytest.raises(Problem) as caught:
        await auth.authenticate(connection(headers=headers))
    assert (caught.value.status, caught.value.code) == (401, "no_token")
    assert caught.value.headers["WWW-Authenticate"] == 'Bearer realm="agentrun"'


async def test_the_query_is_for_event_sources(auth: Auth) -> None:
    query = f"after=3&access_token={signed()}".encode()
    for accept in (_SSE, ("accept", "application/json, Text/Event-Stream;q=0.9")):
        conn = connection(headers=[accept], query_string=query)
        assert (await auth.authenticate(conn, query=True)).user == "ann"


@pytest.mark.parametrize(
    ("query", "changes"),
    [
        (False, {"headers": [_SSE]}),
        (True, {}),
        (True, {"headers": [("accept", "application/json")]}),
        (True, {"headers": [_SSE], "method": "POST"}),
        (True, {"headers": [_SSE], "type": "websocket", "method": None}),
    ],
    ids=["route", "accept-none", "accept-json", "post", "websocket"],
)
async def test_the_query_is_for_nothing_else(auth: Auth, query: bool, changes: dict[str, Any]) -> None:
    conn = connection(query_string=f"access_token={signed()}".encode(), **changes)
    with pytest.raises(Problem) as caught:
        await auth.authenticate(conn, query=query)
    assert (caught.value.status, caught.value.code) == (401, "token_in_query")


async def test_two_tokens_are_too_many(auth: Auth) -> None:
    token = signed()
    bearer = ("authorization", f"Bearer {token}")
    for conn in (
        connection(headers=[_SSE, bearer], query_string=f"access_token={token}".encode()),
        connection(headers=[_SSE], query_string=f"access_token={token}&access_token={token}".encode()),
        connection(headers=[_SSE, bearer, bearer]),
    ):
        with pytest.raises(Problem) as caught:
            await auth.authenticate(conn, query=True)
        assert (caught.value.status, caught.value.code) == (400, "two_tokens")
        assert 'error="invalid_request"' in caught.value.headers["WWW-Authenticate"]


@pytest.mark.parametrize("name", ["access_token", "access%5Ftoken", "acc%65ss_token"])
async def test_the_query_is_cleaned_before_anybody_logs_it(auth: Auth, name: str) -> None:
    scope: dict[str, Any] = {"query_string": f"after=3&{name}={signed()}&x=%20y&access_tokens=7".encode()}
    take_query_token(scope)
    assert scope["query_string"] == b"after=3&x=%20y&access_tokens=7"
    conn = connection(headers=[_SSE], **scope)
    assert (await auth.authenticate(conn, query=True)).user == "ann"


async def test_insecure_lets_everybody_in() -> None:
    auth = Auth.insecure()
    assert (auth.needs_token, auth.ready) == (False, True)
    async with running(auth):
        principal = await auth.authenticate(connection(headers=[("authorization", "Bearer nonsense")]))
        assert principal == await auth.verify("")
        assert (principal.user, principal.rights) == (None, ALL_RIGHTS)
        principal.require_turn("cancel", "any", "carl")
        assert auth.holds(principal)
        for _ in range(1000):
            auth.admit(principal)
        with pytest.raises(Problem, match="404"):
            principal.require("read", revoked.SESSION)


# ------------------------------------------------------------------------------------------------------------- rights


def principal(**changes: Any) -> Principal:
    values: dict[str, Any] = {"user": "ann", "sessions": ("s-*",), "rights": frozenset(["read", "cancel"])}
    return Principal(**values | changes)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("s-1", ["s-1"], ["s-", "s-12", "as-1", "S-1", ""]),
        ("*", ["s", "s-1", "-"], []),
        ("s-*", ["s-", "s-1", "s-1-2"], ["s", "as-1"]),
        ("*-a", ["-a", "x-a", "-a-a"], ["a", "-ab", "x"]),
        ("a*b", ["ab", "axb", "abab"], ["a", "b", "ba", "abc"]),
        ("ab*ba", ["abba", "ab-ba"], ["aba", "ab", "ba"]),
        ("a*b*c", ["abc", "axbxc", "abcbc"], ["acb", "ac", "abcb"]),
        ("**", ["x"], []),
    ],
)
def test_patterns(pattern: str, matching: list[str], others: list[str]) -> None:
    one = principal(sessions=(pattern,))
    for session in matching:
        assert one.may("read", session), session
    for session in others:
        assert not one.may("read", session), session


def test_no_pattern_takes_long() -> None:
    one = principal(sessions=("*a" * 60 + "b",))
    began = time.process_time()
    assert not one.may("read", "a" * 128)
    assert time.process_time() - began < 0.5


def test_reserved_sessions_are_not_there() -> None:
    one = principal(sessions=("*", revoked.SESSION), rights=ALL_RIGHTS)
    assert not one.may("read", revoked.SESSION)
    with pytest.raises(Problem, match="404"):
        one.require("read", revoked.SESSION)


@pytest.mark.parametrize(
    ("rights", "user", "owner", "allowed"),
    [
        ({"cancel"}, "ann", "ann", True),
        ({"cancel"}, "ann", "carl", False),
        ({"cancel"}, "ann", None, False),
        ({"cancel"}, None, None, False),
        ({"cancel:any"}, None, "carl", True),
        ({"cancel:any"}, "ann", None, True),
        ({"steer:any", "read"}, "ann", "ann", False),
        (set(), "ann", "ann", False),
    ],
)
def test_turns(rights: set[str], user: str | None, owner: str | None, allowed: bool) -> None:
    one = principal(user=user, rights=frozenset(rights))
    if allowed:
        one.require_turn("cancel", "s-1", owner)
        with pytest.raises(Problem, match="403"):
            one.require_turn("cancel", "t-1", owner)
    else:
        with pytest.raises(Problem, match="403"):
            one.require_turn("cancel", "s-1", owner)


def test_agents() -> None:
    principal().require_agent("anyone")
    one = principal(agents=("support", "sales-*"))
    for agent in ("support", "sales-eu"):
        one.require_agent(agent)
    with pytest.raises(Problem, match="403"):
        one.require_agent("admin")
    with pytest.raises(Problem, match="403"):
        principal(agents=()).require_agent("support")


def test_a_refusal_says_which_right_is_missing() -> None:
    with pytest.raises(Problem) as caught:
        principal().require_any("cancel", "s-1")
    assert caught.value.body["right"] == "cancel:any"
    assert 'error="insufficient_scope", scope="cancel:any"' in caught.value.headers["WWW-Authenticate"]


# -------------------------------------------------------------------------------------------------------------- keys

WRONG_KEYS: dict[str, Callable[[], Keys]] = {
    "short": lambda: Keys.secret("x" * 31),
    "secret-is-public": lambda: Keys.secret(PUBLIC),
    "secret-is-jwk": lambda: Keys.secret(json.dumps(tokens.jwk(load_pem_public_key(PUBLIC), None))),
    "private-pem": lambda: Keys.public(PRIVATE),
    "private-jwk": lambda: Keys.public(tokens.jwk(load_pem_public_key(PUBLIC), None, d="AAAA")),
    "symmetric-jwk": lambda: Keys.public({"kty": "oct", "k": "AAAA"}),
    "no-key": lambda: Keys.public("hello"),
    "small-rsa": lambda: Keys.public(tokens.pem(rsa.generate_private_key(65537, 1024).public_key())),
    "other-curve": lambda: Keys.public(tokens.pem(ec.generate_private_key(ec.SECP384R1()).public_key())),
    "other-curve-jwk": lambda: Keys.public(tokens.jwk(ec.generate_private_key(ec.SECP384R1()).public_key(), None)),
    "other-alg": lambda: Keys.public(tokens.jwk(tokens.RSA.public_key(), None, alg="RS512")),
    "for-encryption": lambda: Keys.public(tokens.jwk(tokens.RSA.public_key(), None, use="enc")),
    "incomplete": lambda: Keys.public({"kty": "OKP", "crv": "Ed25519"}),
    "no-file": lambda: Keys.jwks("/does/not/exist.json"),
    "http": lambda: Keys.jwks("http://keys.example/jwks.json"),
    "http-tricky": lambda: Keys.jwks("http://127.0.0.1.example/jwks.json"),
    "http-user": lambda: Keys.jwks("http://localhost@keys.example/jwks.json"),
    "ftp": lambda: Keys.jwks("ftp://127.0.0.1/jwks.json"),
    "file-url": lambda: Keys.jwks("file:///etc/passwd"),
    "none": lambda: Keys.joined([]),
    "none-of-a-kind": lambda: Keys.joined([Keys.secret()]),
}


@pytest.mark.parametrize("how", WRONG_KEYS)
def test_a_key_that_cannot_be_used_is_refused_at_once(how: str) -> None:
    with pytest.raises(InvalidInput):
        WRONG_KEYS[how]()


def test_a_short_secret_is_told_how_to_make_one() -> None:
    with pytest.raises(InvalidInput, match=r"at least 32 bytes, not 5.*secrets\.token_urlsafe"):
        Keys.secret("short")


async def test_two_secrets_while_one_is_replaced() -> None:
    async with running(Auth(Keys.secret(SECRET, OTHER_SECRET))) as auth:
        await auth.verify(signed(SECRET))
        await auth.verify(signed(OTHER_SECRET))


def a_set(*keys: dict[str, Any]) -> str:
    return json.dumps({"keys": keys})


ED = tokens.jwk(load_pem_public_key(PUBLIC), "old")
ED_NEW = tokens.jwk(load_pem_public_key(tokens.OTHER_PUBLIC), "new")


async def test_keys_of_other_kinds_in_a_key_set_are_passed_over(tmp_path: Path) -> None:
    oct_key = {"kty": "oct", "kid": "sym", "k": jwt.utils.base64url_encode(SECRET.encode()).decode(), "alg": "HS256"}
    (tmp_path / "set").write_text(
        json.dumps({"keys": [oct_key, 7, {"kty": "OKP"}, ED | {"d": "AAAA", "kid": "x"}, ED]})
    )
    async with running(Auth(Keys.jwks(tmp_path / "set"))) as auth:
        assert (await auth.verify(signed(PRIVATE, "EdDSA", {"kid": "old"}))).user == "ann"
        for token in (signed(SECRET, headers={"kid": "sym"}), signed(PRIVATE, "EdDSA", {"kid": "sym"})):
            await refusal(auth, token)


async def test_a_new_key_is_found_and_a_removed_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "set"
    file.write_text(a_set(ED))
    async with running(Auth(Keys.jwks(file, refresh=0.05))) as auth:
        old, new = signed(PRIVATE, "EdDSA", {"kid": "old"}), signed(OTHER_PRIVATE, "EdDSA", {"kid": "new"})
        await auth.verify(old)
        await refusal(auth, new)
        key_set = auth._keys._sets[0]
        key_set._source.least_gap = 0.0
        file.write_text(a_set(ED, ED_NEW))
        await auth.verify(new)
        await auth.verify(old)
        file.write_text(a_set(ED_NEW))
        await until(lambda: key_set.version == 3)
        await refusal(auth, old)
        await auth.verify(new)
        file.write_text("no key set any more")
        await anyio.sleep(0.15)
        await auth.verify(new)


async def test_looks_are_rare_whoever_asks(tmp_path: Path) -> None:
    (tmp_path / "set").write_text(a_set(ED))
    now = 100.0
    source = Source(tmp_path / "set", clock=lambda: now)
    had: list[bytes] = []
    for _ in range(5):
        await source.look(had.append)
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(source.look, had.append)
    assert len(had) == 1
    now += 30.5
    await source.look(had.append)
    assert len(had) == 2


class _Site:
    """An identity provider, on loopback."""

    def __init__(self) -> None:
        self.answer = b""
        self.asked = 0

    async def serve(self, task_status: Any) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        task_status.started(listener.extra(anyio.abc.SocketAttribute.local_port))
        async with listener:
            await listener.serve(self._handle)

    async def _handle(self, stream: Any) -> None:
        async with stream:
            await stream.receive()
            self.asked += 1
            await stream.send(self.answer)


@pytest.fixture
async def site() -> AsyncIterator[tuple[_Site, str]]:
    site = _Site()
    async with anyio.create_task_group() as group:
        port = await group.start(site.serve)
        yield site, f"http://127.0.0.1:{port}/jwks.json"
        group.cancel_scope.cancel()


async def test_a_key_set_at_an_address(site: tuple[_Site, str]) -> None:
    provider, url = site
    provider.answer = b"HTTP/1.0 200 OK\r\n\r\n" + a_set(ED).encode()
    async with running(Auth(Keys.jwks(url))) as auth:
        token = signed(PRIVATE, "EdDSA", {"kid": "old"})
        assert (await auth.verify(token)).user == "ann"
        for i in range(5):
            await refusal(auth, signed(OTHER_PRIVATE, "EdDSA", {"kid": f"unknown-{i}"}))
    assert provider.asked == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.0 500 Oh\r\n\r\n",
        b"HTTP/1.0 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n[1]",
        b"HTTP/1.0 200 OK\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\n\r\n" + b" " * (257 << 10) + a_set(ED).encode(),
        b"HTTP/1.0 200 OK\r\nContent-Length: 5000\r\n\r\n" + a_set(ED).encode()[:-1],
    ],
    ids=["empty", "garbage", "500", "redirect", "list", "no-keys", "huge", "cut"],
)
async def test_an_address_without_keys_lets_nobody_in(
    site: tuple[_Site, str], answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    provider, url = site
    provider.answer = answer
    async with running(Auth(Keys.jwks(url), Keys.secret(SECRET))) as auth:
        with pytest.raises(Problem) as caught:
            await auth.verify(signed(PRIVATE, "EdDSA", {"kid": "old"}))
        assert (caught.value.status, caught.value.code) == (503, "keys_unavailable")
        await auth.verify(signed(SECRET))
    assert "cannot be used" in caplog.text


async def test_a_redirect_is_not_followed(site: tuple[_Site, str]) -> None:
    provider, url = site
    provider.answer = f"HTTP/1.0 302 Found\r\nLocation: {url}?again\r\n\r\n".encode()
    async with running(Auth(Keys.jwks(url))) as auth:
        with pytest.raises(Problem, match="503"):
            await auth.verify(signed(PRIVATE, "EdDSA", {"kid": "old"}))
    assert provider.asked == 1


# ------------------------------------------------------------------------------------------------------------- minting

WRONG_MINT: dict[str, dict[str, Any]] = {
    "right": {"rights": ["read", "admin"]},
    "any-of-send": {"rights": ["send:any"]},
    "pattern": {"sessions": ["s/1"]},
    "pattern-empty": {"sessions": [""]},
    "sessions-text": {"sessions": "s-1"},
    "rights-text": {"rights": "read"},
    "agents": {"agents": ["a.b"]},
    "ttl": {"ttl": 0},
    "ttl-nan": {"ttl": float("nan")},
    "user": {"user": ""},
    "key": {"key": "short"},
    "key-public": {"key": PUBLIC},
    "key-broken": {"key": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"},
}


@pytest.mark.parametrize("how", WRONG_MINT)
def test_what_cannot_be_minted(how: str) -> None:
    values: dict[str, Any] = {"key": SECRET, "user": "ann", "sessions": ["s-1"], "rights": ["read"]}
    values |= WRONG_MINT[how]
    with pytest.raises(InvalidInput):
        mint(values.pop("key"), **values)


# -------------------------------------------------------------------------------------------------------------- limits


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def limits(**values: Any) -> tuple[Limiter, Clock]:
    clock = Clock()
    return Limiter(GatewaySettings(**values), clock=clock), clock


def test_requests_of_one_token() -> None:
    limiter, clock = limits(rate=2.0, burst=3)
    for _ in range(3):
        limiter.take("a")
    with pytest.raises(Problem) as caught:
        limiter.take("a")
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    limiter.take("b")
    clock.now += 0.5
    limiter.take("a")
    with pytest.raises(Problem):
        limiter.take("a")
    clock.now += 100
    for _ in range(3):
        limiter.take("a")
    with pytest.raises(Problem):
        limiter.take("a")


def test_who_asks_too_often_is_let_in_at_the_rate_all_the_same() -> None:
    limiter, clock = limits(rate=10.0, burst=5)
    served = 0
    for _ in range(1000):
        clock.now += 0.01
        try:
            limiter.take("a")
        except Problem:
            continue
        served += 1
    assert served == pytest.approx(5 + 10 * 10, abs=2)


def test_no_limits_where_none_are_set() -> None:
    limiter, _ = limits(rate=0.0, max_failures=0)
    for _ in range(1000):
        limiter.take("a")
        limiter.failed("10.0.0.1")


def test_streams_of_one_token() -> None:
    limiter, _ = limits(max_streams=2)
    with limiter.stream("a"), limiter.stream("b"):
        with limiter.stream("a"), pytest.raises(Problem, match="429"), limiter.stream("a"):
            pass
        with limiter.stream("a"):
            pass
    assert limiter._streams == {}


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("not:an:address", "not:an:address", True),
    ],
)
def test_failures_count_by_address(first: str, second: str, together: bool) -> None:
    limiter, clock = limits(max_failures=3)
    for _ in range(3):
        limiter.failed(first)
    if together:
        with pytest.raises(Problem, match="429"):
            limiter.failed(second)
        clock.now += 21
    limiter.failed(second)


async def test_an_address_that_fails_too_often_is_told_so_and_its_good_tokens_work(auth: Auth) -> None:
    auth.limit(GatewaySettings(max_failures=2))
    bad, good = [("authorization", "Bearer x")], [("authorization", f"Bearer {signed()}")]
    for status in (401, 401, 429, 429):
        with pytest.raises(Problem) as caught:
            await auth.authenticate(connection(headers=bad))
        assert caught.value.status == status
    with pytest.raises(Problem, match="401"):
        await auth.authenticate(connection(headers=bad, client=("10.0.0.2", 1)))
    await auth.authenticate(connection(headers=good))


async def test_requests_are_counted_for_each_token(auth: Auth) -> None:
    auth.limit(GatewaySettings(rate=0.01, burst=2))
    token = signed(jti="a")
    one = await auth.verify(token)
    auth.admit(one)
    with pytest.raises(Problem, match="429"):
        await auth.verify(token)
    with pytest.raises(Problem, match="429"):
        auth.admit(one)
    await auth.verify(signed(jti="b"))


def test_memory_of_limits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrun.gateway.limits._KEYS", 100)
    limiter, _ = limits(rate=1.0, burst=1)
    for i in range(1000):
        limiter.take(f"k{i}")
    assert len(limiter._requests._full_at) == 100
    with pytest.raises(Problem):
        limiter.take("k999")
