"""The keys that tokens are verified with, and `mint`, which makes tokens. The only door to PyJWT."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import anyio
import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from agentrun.errors import InvalidInput, Unavailable
from agentrun.gateway.jwks import Source
from agentrun.gateway.rights import check_patterns, check_rights

__all__ = ["Keys", "Refused", "mint", "new_key_pair", "unverified"]

AUDIENCE = "agentrun"
LONGEST_TOKEN = 8192
LONGEST_USER = 256

_LEAST_SECRET = 32
_LEAST_RSA = 2048
_MOST_KEYS = 50
_HOW_SECRET = "make one with: python -c 'import secrets; print(secrets.token_urlsafe(48))'"  # noqa: S105
_PEM = b"-----BEGIN"
_MEMBERS = {"OKP": ("kty", "crv", "x"), "EC": ("kty", "crv", "x", "y"), "RSA": ("kty", "n", "e")}
"""The public members of a JWK; a private one in it is never looked at."""
_ALGORITHMS = {"OKP": "EdDSA", "EC": "ES256", "RSA": "RS256"}

_log = logging.getLogger("agentrun.gateway")


class Refused(Exception):
    """A token that is not accepted. The message is for whoever sent it."""

    def __init__(self, message: str, code: str = "invalid_token") -> None:
        super().__init__(message)
        self.code = code


class _Key(NamedTuple):
    algorithm: str
    """The only one it is used with, whatever a token says."""
    key: Any
    kid: str | None = None


class Keys:
    """Keys that tokens are verified with, each bound to one algorithm. Make them with `secret`, `public` or `jwks`."""

    def __init__(self, static: Sequence[_Key], sets: Sequence[_KeySet]) -> None:
        self._static = static
        self._sets = sets

    @classmethod
    def secret(cls, *secrets: str | bytes) -> Keys:
        """Secrets shared with whoever mints tokens (HS256), at least 32 bytes each; two while one is being replaced.

        Raises:
            InvalidInput: It is too short, or looks like a key of another kind.
        """
        return cls([_Key("HS256", _secret(secret)) for secret in secrets], ())

    @classmethod
    def public(cls, *keys: str | bytes | Mapping[str, Any]) -> Keys:
        """Public keys, in PEM or as JWK: Ed25519 (EdDSA), RSA of at least 2048 bits (RS256), or P-256 (ES256).

        Raises:
            InvalidInput: It is none of these, or a private key.
        """
        return cls([_public(key) for key in keys], ())

    @classmethod
    def jwks(cls, place: str | Path, *, refresh: float = 600.0) -> Keys:
        """A key set of such public keys, in a file or at an ``https://`` URL (``http://`` only on loopback).

        It is looked at when it is needed first, when a token names a key that is not in it (at most every 30 s), and
        every ``refresh`` seconds: a key that was taken out ceases to be accepted then. Keys of other kinds in it,
        symmetric ones above all, are passed over. While it cannot be had, the keys had last go on being used.

        Raises:
            InvalidInput: It is neither, or there is no such file.
        """
        return cls((), [_KeySet(Source(place), refresh)])

    @classmethod
    def joined(cls, keys: Sequence[Keys]) -> Keys:
        """All of them.

        Raises:
            InvalidInput: There are none.
        """
        static = [key for each in keys for key in each._static]
        sets = [key_set for each in keys for key_set in each._sets]
        if not static and not sets:
            raise InvalidInput(f"a gateway needs a key to verify tokens with: a secret ({_HOW_SECRET}), or public keys")
        return cls(static, sets)

    @property
    def version(self) -> int:
        """Grows when the keys change: what was verified before may not be accepted any more."""
        return sum(key_set.version for key_set in self._sets)

    async def run(self) -> None:
        """Keep key sets up to date, for ever; return if there are none."""
        async with anyio.create_task_group() as group:
            for key_set in self._sets:
                group.start_soon(key_set.run)

    async def claims(
        self, token: str, *, audience: str, issuers: Sequence[str] | None, leeway: float
    ) -> dict[str, Any]:
        """Return the claims of a token whose signature, times, audience and issuer are right.

        Costs up to half a millisecond of CPU, by algorithm; and up to 5 seconds where a key set must be fetched.

        Raises:
            Refused: It is not accepted.
            Unavailable: A key set has not been had yet.
        """
        if len(token) > LONGEST_TOKEN or not token.isascii():
            raise Refused(f"it is not a JSON Web Token of at most {LONGEST_TOKEN} characters")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise Refused("it is not a JSON Web Token") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        expected = _Expected(audience, issuers, leeway)
        found = expected.claims_of(token, self._candidates(algorithm, kid))
        if found is not None:
            return found
        for key_set in self._sets:
            if algorithm in _ALGORITHMS.values() and key_set.lacks(kid):
                await key_set.look()
        found = expected.claims_of(token, self._candidates(algorithm, kid))
        if found is not None:
            return found
        if any(key_set.keys is None for key_set in self._sets):
            raise Unavailable("the keys that tokens are verified with cannot be had now: try again later")
        known = bool(self._candidates(algorithm, None))
        raise Refused("its signature fits no key here" if known else "its algorithm (alg) is not accepted here")

    def _candidates(self, algorithm: object, kid: str | None) -> list[_Key]:
        keys = (*self._static, *(key for key_set in self._sets for key in key_set.keys or ()))
        return [k for k in keys if k.algorithm == algorithm and (kid is None or k.kid is None or k.kid == kid)]


class _KeySet:
    """The keys of a JWKS as it was last had."""

    def __init__(self, source: Source, refresh: float) -> None:
        self.keys: list[_Key] | None = None
        self.version = 0
        self._source = source
        self._refresh = refresh
        self._document = b""

    async def run(self) -> None:
        while True:
            await self.look()
            await anyio.sleep(self._source.least_gap + 1.0 if self.keys is None else self._refresh)

    async def look(self) -> None:
        await self._source.look(self._use)

    def lacks(self, kid: str | None) -> bool:
        """Whether a token that names this key is a reason to look again."""
        return self.keys is None or (kid is not None and all(key.kid != kid for key in self.keys))

    def _use(self, document: bytes) -> None:
        if document != self._document:
            self.keys = _keys_of(document)
            self._document = document
            self.version += 1


class _Expected(NamedTuple):
    audience: str
    issuers: Sequence[str] | None
    leeway: float

    def claims_of(self, token: str, keys: Sequence[_Key]) -> dict[str, Any] | None:
        """The claims, if the signature fits one of the keys. Raises Refused if it does and the claims are wrong."""
        for key in keys:
            try:
                return jwt.decode(
                    token,
                    key.key,
                    algorithms=[key.algorithm],
                    audience=self.audience,
                    issuer=self.issuers,
                    leeway=self.leeway,
                    options={"require": ["exp", "iat"]},
                )
            except (jwt.InvalidSignatureError, jwt.InvalidKeyError):
                continue
            except jwt.PyJWTError as error:
                raise _refused(error, self.audience) from None
        return None


def _refused(error: jwt.PyJWTError, audience: str) -> Refused:
    match error:
        case jwt.ExpiredSignatureError():
            return Refused("it has expired", "token_expired")
        case jwt.ImmatureSignatureError():
            return Refused("it is not valid yet")
        case jwt.MissingRequiredClaimError():
            return Refused(f"it has no claim {error.claim}")
        case jwt.InvalidAudienceError():
            return Refused(f"it is for another audience (aud) than {audience}")
        case jwt.InvalidIssuerError():
            return Refused("its issuer (iss) is not one this gateway trusts")
        case _:
            return Refused("it is not a valid JSON Web Token")


# -------------------------------------------------------------------------------------------------------- reading keys


def read_key(file: str | Path) -> bytes:
    """Return what a key file holds, without the line's end.

    Raises:
        InvalidInput: It cannot be read.
    """
    try:
        return Path(file).read_bytes().strip()
    except OSError as error:
        raise InvalidInput(f"the key file {str(file)!r} cannot be read: {error.strerror}") from error


def _secret(secret: str | bytes) -> bytes:
    value = secret.encode() if isinstance(secret, str) else secret
    if len(value) < _LEAST_SECRET:
        raise InvalidInput(f"a secret has at least {_LEAST_SECRET} bytes, not {len(value)}; {_HOW_SECRET}")
    if value.startswith((_PEM, b"ssh-", b"{")):
        raise InvalidInput("this secret looks like a public or private key: give a public key as one, or a secret")
    return value


def _public(key: str | bytes | Mapping[str, Any]) -> _Key:
    if isinstance(key, Mapping):
        return _jwk(key)
    data = key.encode() if isinstance(key, str) else key
    if data.lstrip().startswith(b"{"):
        return _jwk(_object(data))
    if b"PRIVATE KEY" in data:
        raise InvalidInput("this is a private key: a gateway needs only its public half, keep this one where you mint")
    try:
        loaded: object = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput(f"not a public key in PEM or JWK form: {error}") from error
    return _Key(_algorithm_of(loaded), loaded)


def _algorithm_of(key: object) -> str:
    match key:
        case Ed25519PublicKey():
            return "EdDSA"
        case RSAPublicKey() if key.key_size >= _LEAST_RSA:
            return "RS256"
        case EllipticCurvePublicKey() if isinstance(key.curve, SECP256R1):
            return "ES256"
        case _:
            raise InvalidInput(
                f"a public key is Ed25519, RSA of at least {_LEAST_RSA} bits, or P-256; not {type(key).__name__}"
            )


def _object(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"not a key in JSON: {error}") from error


def _jwk(jwk: Mapping[str, Any]) -> _Key:
    kty, kid = jwk.get("kty"), jwk.get("kid")
    if not isinstance(kty, str) or (algorithm := _ALGORITHMS.get(kty)) is None:
        raise InvalidInput(f"a key in JSON has the kty OKP, EC or RSA, not {str(kty)[:20]!r}")
    if "d" in jwk:
        raise InvalidInput("this is a private key: a gateway needs only its public half, keep this one where you mint")
    if jwk.get("alg", algorithm) != algorithm or jwk.get("use", "sig") != "sig":
        raise InvalidInput(f"a key of kty {kty} is for signatures (use sig) with {algorithm}")
    if kid is not None and not isinstance(kid, str):
        raise InvalidInput("a key's kid is text")
    try:
        loaded: object = jwt.PyJWK({name: jwk[name] for name in _MEMBERS[kty]}, algorithm).key
    except (jwt.PyJWTError, KeyError, ValueError, TypeError) as error:
        raise InvalidInput(f"not a public key of kty {kty}: {type(error).__name__}") from error
    if _algorithm_of(loaded) != algorithm:
        raise InvalidInput(f"a key of kty {kty} is for {algorithm}")
    return _Key(algorithm, loaded, kid)


def _keys_of(document: bytes) -> list[_Key]:
    entries = _object(document).get("keys")
    if not isinstance(entries, list):
        raise InvalidInput('not a key set: it has no list "keys"')
    found: list[_Key] = []
    for entry in cast("list[object]", entries)[:_MOST_KEYS]:
        try:
            if not isinstance(entry, dict):
                raise InvalidInput("not an object")
            found.append(_jwk(cast("dict[str, Any]", entry)))
        except InvalidInput as error:
            _log.info("a key of the key set is passed over: %s", error)
    return found


# -------------------------------------------------------------------------------------------------------------- minting


def mint(
    key: str | bytes,
    *,
    user: str | None,
    sessions: Iterable[str],
    rights: Iterable[str],
    agents: Iterable[str] | None = None,
    ttl: float = 600.0,
    audience: str = AUDIENCE,
    issuer: str | None = None,
    jti: str | None = None,
) -> str:
    """Make a token for one of your users, to be handed to their browser by your backend.

    Args:
        key: The secret shared with the gateway (HS256), or an Ed25519 private key in PEM form (EdDSA).
        user: Who they are: stands in the log as the sender of what they send. None: nobody, who owns no turn.
        sessions: Ids of the sessions it is for; ``*`` in one stands for any run of characters.
        rights: ``read``, ``send``, ``cancel``, ``steer``, ``answer``, ``delete``; ``cancel:any`` and the like for
            other users' turns as well.
        agents: Agents that turns may be sent to, with ``*`` likewise; None: any.
        ttl: Seconds it is good for. Keep it short: a browser asks your backend for the next.
        audience: As the gateway expects it.
        issuer: As the gateway expects it, if it does.
        jti: Its id, by which it can be revoked; default is a random one.

    Raises:
        InvalidInput: An argument cannot be used.
    """
    if isinstance(sessions, str) or isinstance(rights, str) or isinstance(agents, str):
        raise InvalidInput("sessions, rights and agents are lists of text, not a text")
    if not (math.isfinite(ttl) and ttl >= 1):
        raise InvalidInput(f"a token is good for at least a second, not {ttl}")
    if user is not None and not 0 < len(user) <= LONGEST_USER:
        raise InvalidInput(f"a user's id has 1 to {LONGEST_USER} characters, not {len(user)}")
    now = int(time.time())
    claims: dict[str, Any] = {
        "sub": user,
        "iss": issuer,
        "aud": audience,
        "iat": now,
        "exp": now + int(ttl),
        "jti": jti or uuid.uuid4().hex,
        "sessions": check_patterns("sessions", sessions),
        "rights": sorted(check_rights(rights)),
        "agents": None if agents is None else check_patterns("agents", agents),
    }
    algorithm, signer = _signer(key)
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, signer, algorithm)


def _signer(key: str | bytes) -> tuple[str, bytes | Ed25519PrivateKey]:
    data = key.encode() if isinstance(key, str) else key
    if not data.lstrip().startswith(_PEM):
        return "HS256", _secret(data)
    try:
        loaded = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidInput(f"not an Ed25519 private key in PEM form without a password: {error}") from error
    if not isinstance(loaded, Ed25519PrivateKey):
        raise InvalidInput("tokens are minted with a secret or an Ed25519 key (agentrun token key makes one)")
    return "EdDSA", loaded


def new_key_pair() -> tuple[bytes, bytes]:
    """Return a fresh Ed25519 key pair in PEM form: the private key for who mints, the public one for the gateway."""
    private = Ed25519PrivateKey.generate()
    return (
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )


def unverified(token: str) -> dict[str, Any]:
    """Return a token's claims without asking whether they are true.

    Raises:
        InvalidInput: It is no token.
    """
    try:
        return jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, UnicodeEncodeError) as error:
        raise InvalidInput(f"not a JSON Web Token: {error}") from error
