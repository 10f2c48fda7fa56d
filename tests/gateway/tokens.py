"""Keys, and tokens good and bad in every way."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import anyio
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agentrun.gateway.keys import new_key_pair

SECRET = "a-secret-of-tests-that-is-long-enough-for-hs256"
OTHER_SECRET = "another-secret-of-tests-that-nobody-here-trusts"
PRIVATE, PUBLIC = new_key_pair()
OTHER_PRIVATE, OTHER_PUBLIC = new_key_pair()
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())

ALL = ["read", "send", "cancel", "steer", "answer", "delete"]


def claims(**changes: Any) -> dict[str, Any]:
    """Claims that are good; a change to None takes the claim out."""
    now = int(time.time())
    given: dict[str, Any] = {
        "sub": "ann",
        "aud": "agentrun",
        "iss": "tests",
        "iat": now,
        "exp": now + 600,
        "jti": base64.urlsafe_b64encode(json.dumps([now, str(changes)]).encode()).decode()[-40:],
        "sessions": ["s-*"],
        "rights": ALL,
    }
    return {name: value for name, value in (given | changes).items() if value is not None}


def signed(key: Any = SECRET, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **changes: Any) -> str:
    return jwt.encode(claims(**changes), key, algorithm, headers)


def forged(header: dict[str, Any], payload: dict[str, Any], signature: bytes = b"") -> str:
    """A token as anybody can write one."""
    parts = (json.dumps(header).encode(), json.dumps(payload).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def hs256_with(key: bytes, **changes: Any) -> str:
    """A token signed with a public key as if that were a secret, which PyJWT itself refuses to do."""
    unsigned = forged({"alg": "HS256", "typ": "JWT"}, claims(**changes)).rsplit(".", 1)[0]
    digest = hmac.new(key, unsigned.encode(), hashlib.sha256).digest()
    return f"{unsigned}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def tampered(token: str, **changes: Any) -> str:
    """The token with other claims and its old signature."""
    header, payload, signature = token.split(".")
    old = json.loads(base64.urlsafe_b64decode(payload + "=="))
    new = base64.urlsafe_b64encode(json.dumps(old | changes).encode()).rstrip(b"=").decode()
    return f"{header}.{new}.{signature}"


def jwk(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    kind = {
        "RSAPublicKey": jwt.algorithms.RSAAlgorithm,
        "ECPublicKey": jwt.algorithms.ECAlgorithm,
        "Ed25519PublicKey": jwt.algorithms.OKPAlgorithm,
    }[type(key).__name__]
    found: dict[str, Any] = kind.to_jwk(key, as_dict=True)
    found.pop("key_ops", None)
    return found | ({} if kid is None else {"kid": kid}) | more


def pem(public: Any) -> bytes:
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


async def until(done: Callable[[], bool], *, within: float = 5.0) -> None:
    with anyio.fail_after(within):
        while not done():  # noqa: ASYNC110 - what is waited for has no event
            await anyio.sleep(0.005)
