"""Connecting, checking and setting up: what is not as needed is refused in words that help."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agentrun import brokers
from agentrun.broker import Kind, Pending, Tail
from agentrun.brokers import watch
from agentrun.brokers.valkey import Streams, ValkeyBroker
from agentrun.brokers.valkey_server import ValkeyServer
from agentrun.errors import InvalidInput, Misconfigured, NoListener, Unavailable
from tests.brokers.server_environment import new_namespace
from tests.brokers.valkey_environment import client


async def setup(server: ValkeyServer, namespace: str, *, dry_run: bool = False, **streams: Any) -> list[str]:
    async with ValkeyBroker(server.url, namespace=namespace, check=False, streams=Streams(**streams)) as broker:
        return await broker.setup(dry_run=dry_run)


async def test_setup_creates_once_and_a_dry_run_nothing(valkey_server: ValkeyServer) -> None:
    namespace = new_namespace()
    would = await setup(valkey_server, namespace, dry_run=True, partitions=3)
    assert would == [f"create namespace {namespace} with 3 partition(s)"]
    with pytest.raises(Misconfigured, match="agentrun setup"):
        async with ValkeyBroker(valkey_server.url, namespace=namespace):
            pass
    assert await setup(valkey_server, namespace, partitions=3) == would
    assert await setup(valkey_server, namespace) == []


async def test_settings_can_be_changed_but_for_the_partitions(valkey_server: ValkeyServer) -> None:
    namespace = new_namespace()
    await setup(valkey_server, namespace, partitions=2)
    (line,) = await setup(valkey_server, namespace, delta_ttl=60.0, dedupe_window=9000.0)
    assert "delta_ttl: 3600 -> 60" in line
    assert "dedupe_window: 7200 -> 9000" in line
    async with ValkeyBroker(valkey_server.url, namespace=namespace) as broker:
        assert (broker.capabilities.delta_ttl, broker.capabilities.dedupe_window) == (60.0, 9000.0)
    with pytest.raises(Misconfigured, match="2 partitions, not 3"):
        await setup(valkey_server, namespace, partitions=3)


@pytest.mark.parametrize("streams", [{"partitions": 0}, {"delta_ttl": 0.5}, {"replicas": 3}, {"max_age": 60.0}])
def test_what_cannot_be_set_is_refused(streams: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        ValkeyBroker(streams=Streams(**streams))


async def test_ids_that_are_forgotten_too_soon_are_refused(valkey_server: ValkeyServer) -> None:
    namespace = new_namespace()
    await setup(valkey_server, namespace)
    with pytest.raises(Misconfigured, match="--dedupe-window"):
        async with ValkeyBroker(valkey_server.url, namespace=namespace, min_dedupe_window=10_000):
            pass


@pytest.mark.parametrize(
    "url", ["valkey://", "valkey://host:0", "valkey://host:x", "redis://host/nonsense", "redis://host/0?timeout=1"]
)
def test_a_url_that_names_no_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="valkey://host:6379"):
        brokers.connect(url)


def test_a_url_is_shown_without_its_password() -> None:
    with pytest.raises(InvalidInput) as raised:
        brokers.connect("valkey://me:secret@host:0")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["valkey", "valkeys", "redis", "rediss"])
def test_each_scheme_is_this_broker(scheme: str) -> None:
    assert isinstance(brokers.connect(f"{scheme}://host"), ValkeyBroker)


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['valkey'] = None\n"
        "from agentrun import brokers\n"
        "from agentrun.errors import Misconfigured\n"
        "try: brokers.connect('redis://host')\n"
        "except Misconfigured as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'agentrun[valkey]'" in said


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(Unavailable, match=r"cannot reach valkey://127\.0\.0\.1:9"):
        async with ValkeyBroker("valkey://127.0.0.1:9", connect_timeout=0.3):
            pass


async def test_a_server_without_an_append_only_file_is_not_durable() -> None:
    with ValkeyServer(settings="appendonly no") as server:
        await setup(server, "n")
        async with ValkeyBroker(server.url, namespace="n") as broker:
            assert not broker.capabilities.durable


async def test_a_server_that_throws_data_away_is_refused() -> None:
    settings = "maxmemory 100mb\nmaxmemory-policy allkeys-lru"
    with ValkeyServer(settings=settings) as server, pytest.raises(Misconfigured, match="noeviction"):
        await setup(server, "n")


async def test_a_replica_is_refused() -> None:
    settings = "replicaof 127.0.0.1 9"
    with ValkeyServer(settings=settings) as server, pytest.raises(Misconfigured, match="name the primary"):
        await setup(server, "n")


async def test_a_full_server_takes_nothing_and_is_unavailable() -> None:
    with ValkeyServer() as server:
        await setup(server, "n")
        async with client(server) as valkey, ValkeyBroker(server.url, namespace="n") as broker:
            await valkey.config_set("maxmemory", "1")
            with pytest.raises(Unavailable):
                await broker.log.append("s", b"", kind=Kind.EVENT, after=Tail(), pending=Pending(), timeout=0.3)
            await valkey.config_set("maxmemory", "0")
            await broker.log.append("s", b"", kind=Kind.EVENT, after=Tail(), pending=Pending())


async def test_settings_that_go_and_come_back_are_told_once_each(
    valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("EVERY", "WHILE_WRONG", "SPREAD", "NOT_BEFORE"):
        monkeypatch.setattr(watch, name, 0.05)
    namespace = new_namespace()
    await setup(valkey_server, namespace)
    async with ValkeyBroker(valkey_server.url, namespace=namespace), client(valkey_server) as valkey:
        await valkey.delete(f"ar:{namespace}:meta")
        await until_said(caplog, "is not set up")
        await anyio.sleep(0.3)  # some looks more
        await setup(valkey_server, namespace)
        await until_said(caplog, f"namespace {namespace} is as needed again")
    assert caplog.text.count("what is promised does not hold now") == 1


async def test_another_number_of_partitions_ends_whoever_is_connected(
    valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EVERY", "WHILE_WRONG", "SPREAD", "NOT_BEFORE"):
        monkeypatch.setattr(watch, name, 0.05)
    namespace = new_namespace()
    await setup(valkey_server, namespace)

    async def use() -> None:
        async with ValkeyBroker(valkey_server.url, namespace=namespace), client(valkey_server) as valkey:
            await valkey.hset(f"ar:{namespace}:meta", "partitions", "5")
            await anyio.sleep(30)

    with pytest.raises(Misconfigured, match="has 5 partitions now, and had 1"):
        await use()


async def until_said(caplog: pytest.LogCaptureFixture, words: str) -> None:
    with anyio.fail_after(30):
        while words not in caplog.text:  # noqa: ASYNC110 - it is said in a log
            await anyio.sleep(0.02)


# ------------------------------------------------------------------------------------------ who may connect, and how


async def test_user_and_password_are_in_the_url() -> None:
    with ValkeyServer(settings="requirepass top@secret\nuser me on >pass ~* &* +@all") as server:
        for who in (":top%40secret", "me:pass", "default:top%40secret"):
            url = f"valkey://{who}@127.0.0.1:{server.port}"
            async with ValkeyBroker(url, namespace="n", check=False) as broker:
                await broker.setup()
        for who in ("", ":wrong@", "me:wrong@", "you:pass@"):
            url = f"valkey://{who}127.0.0.1:{server.port}"
            with pytest.raises(Misconfigured) as raised:
                async with ValkeyBroker(url, namespace="n"):
                    pass
            assert "wrong" not in str(raised.value).partition("does not let us in")[0]


async def test_rights_for_the_namespace_are_enough(valkey_server: ValkeyServer) -> None:
    rights = "~{ar:mine:* ~ar:mine:* &ar:mine:* +@all -@dangerous +info"
    with ValkeyServer(settings=f"user me on >pass {rights}") as server:
        url = f"valkey://me:pass@127.0.0.1:{server.port}"
        async with ValkeyBroker(url, namespace="mine", check=False) as broker:
            await broker.setup()
            await broker.turns.open("agent")
            pending = Pending().add(1)
            await broker.log.append("s", b"x", kind=Kind.TURN, after=Tail(), pending=pending, agent="agent")
            lease = await broker.turns.lease("agent", wait=5)
            assert lease is not None
            with pytest.raises(NoListener):
                await broker.signals.request("c", b"", timeout=5)
        with pytest.raises(Misconfigured):
            async with ValkeyBroker(url, namespace="other", check=False) as broker:
                await broker.setup()


async def test_databases_are_apart_their_channels_too(valkey_server: ValkeyServer) -> None:
    namespace = new_namespace()
    await setup(valkey_server, namespace)
    url = f"{valkey_server.url}/3"
    with pytest.raises(Misconfigured, match="not set up"):
        async with ValkeyBroker(url, namespace=namespace):
            pass
    with pytest.raises(Misconfigured, match="does not let us in"):
        async with ValkeyBroker(f"{valkey_server.url}/99", namespace=namespace):
            pass
    async with (
        ValkeyBroker(url, namespace=namespace, check=False) as other,
        ValkeyBroker(valkey_server.url, namespace=namespace) as broker,
        broker.log.follow("s") as records,
    ):
        await other.setup()
        for one, body in ((broker, b"1"), (other, b"x"), (other, b"x"), (broker, b"2")):
            tail = await one.log.last("s")
            await one.log.append("s", body, kind=Kind.EVENT, after=tail, pending=Pending())
        found: list[bytes] = []
        with anyio.fail_after(20):
            while len(found) < 2:
                found += [record.body for record in await anext(records)]
        assert found == [b"1", b"2"]


class Certificate:
    """A certificate of its own for 127.0.0.1."""

    def __init__(self, directory: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agentrun test")])
        now = datetime.datetime.now(datetime.UTC)
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(address, critical=False)
            .sign(key, hashes.SHA256())
        )
        self.path = directory / "server.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self.path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path)
        return context

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.path))


@pytest.fixture
def certificate(tmp_path: Path) -> Iterator[Certificate]:
    return Certificate(tmp_path)


@asynccontextmanager
async def behind_tls(server: ValkeyServer, certificate: Certificate) -> AsyncGenerator[int]:
    """The port of something that ends TLS in front of the server, as providers have it."""
    tasks: set[asyncio.Task[Any]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far = await asyncio.open_connection("127.0.0.1", server.port)
        tasks.update({asyncio.create_task(pump(reader, far[1])), asyncio.create_task(pump(far[0], writer))})

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=certificate.server())
    async with listener:
        yield listener.sockets[0].getsockname()[1]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_tls_checks_the_certificate_and_the_name_in_it(
    valkey_server: ValkeyServer, certificate: Certificate
) -> None:
    namespace = new_namespace()
    await setup(valkey_server, namespace)
    async with behind_tls(valkey_server, certificate) as port:
        for scheme in ("valkeys", "rediss"):
            url = f"{scheme}://127.0.0.1:{port}"
            async with ValkeyBroker(url, namespace=namespace, tls=certificate.client()) as broker:
                assert (await broker.log.last("s")).offset == 0
        for url, tls in (
            (f"valkeys://127.0.0.1:{port}", None),
            (f"valkeys://localhost:{port}", certificate.client()),
        ):
            with pytest.raises(Misconfigured, match="certificate"):
                async with ValkeyBroker(url, namespace=namespace, tls=tls):
                    pass
