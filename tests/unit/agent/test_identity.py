"""Enrolling and renewing against a server that answers as the test wants: what is kept, what is refused."""

import asyncio
import contextlib
import fcntl
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from agent import config, identity
from farshore import pki
from farshore.errors import (
    AuthError,
    ConfigError,
    Conflict,
    Failed,
    FarshoreError,
    IntegrityError,
    Unreachable,
    UsageError,
)
from farshore.ids import new_id
from farshore.wire import frames
from farshore.wire import messages as m
from tests.fakes.clock import ManualClock

VAULT, MACHINE = bytes(range(16)), bytes(range(16, 32))
AUTHORITY = pki.Authority.create(VAULT, time.time_ns())

Answer = Callable[[m.Message], m.Message | bytes | None]


@dataclass
class Server:
    """One frame in, one out, as 9443 does for those without a certificate."""

    address: str = ""
    answer: Answer = lambda message: None
    got: list[m.Message] = field(default_factory=list)
    certificates: list[bytes | None] = field(default_factory=list)

    def certify(self, message: m.Message) -> m.Enrolled:
        """Answer as an honest server."""
        assert isinstance(message, m.Enrol | m.Renew)
        key = pki.read_request(message.csr)
        certificate = AUTHORITY.issue_agent(VAULT, MACHINE, "db1", key, time.time_ns())
        return m.Enrolled(MACHINE, VAULT, certificate, AUTHORITY.certificate)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            header = frames.decode_header(await reader.readexactly(frames.HEADER.size))
            message = frames.decode_message(header, await reader.readexactly(header.meta_bytes))
            self.got.append(message)
            self.certificates.append(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
            answer = self.answer(message)
            if answer is not None:
                writer.write(answer if isinstance(answer, bytes) else frames.encode(answer))
                await writer.drain()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(handler: Handler, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Run ``handler`` for each connection and see every one of them through to its end."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        finally:
            writer.transport.abort() if context is None else writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    try:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        await listener.wait_closed()
        if tasks:
            await asyncio.wait(tasks)


@contextlib.asynccontextmanager
async def serving(authority: pki.Authority = AUTHORITY, vault_id: bytes = VAULT) -> AsyncIterator[Server]:
    issued = authority.issue_server(vault_id, time.time_ns())
    context = pki.server_context(issued.certificate, issued.private_key, authority.certificate)
    server = Server()
    server.answer = server.certify
    async with listening(server.serve, context) as server.address:
        yield server


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as made:
        yield made


def token(machine: str = "db1", vault_id: bytes = VAULT) -> str:
    made = pki.Token(vault_id, AUTHORITY.certificate_der, new_id(), bytes(32), machine, ("gw.example:9443",))
    return pki.encode_token(made)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def test_an_enrolment_leaves_key_certificate_and_settings(server: Server, tmp_path: Path) -> None:
    directory = tmp_path / "agent"
    done = await identity.enrol(directory, token(), server.address)
    assert (done.machine, done.machine_id, done.renewed) == ("db1", MACHINE, False)
    settings = config.load(directory)
    assert (settings.machine, settings.machine_bytes, settings.vault_bytes) == ("db1", MACHINE, VAULT)
    assert settings.servers == (server.address, "gw.example:9443")
    key, certificate, ca = identity.files(directory)
    assert [mode(path) for path in (directory, directory / "identity", key)] == [0o700, 0o700, 0o600]
    peer = pki.peer_identity(pki.pem_to_der(certificate.read_bytes()), VAULT, "machine")
    assert peer.public_key == pki.public_key_of(pki.key_from_pem(key.read_bytes()))
    assert ca.read_bytes() == AUTHORITY.certificate
    # The key stays here: what was sent is the request, and no certificate was shown.
    sent = server.got[0]
    assert isinstance(sent, m.Enrol)
    assert key.read_bytes() not in msgspec.msgpack.encode(sent)
    assert server.certificates == [None]


async def test_an_enrolment_can_be_repeated_with_the_same_key(server: Server, tmp_path: Path) -> None:
    text = token()
    await identity.enrol(tmp_path, text, server.address)
    key = identity.files(tmp_path)[0].read_bytes()
    again = await identity.enrol(tmp_path, text, server.address)
    assert again.renewed
    assert identity.files(tmp_path)[0].read_bytes() == key
    assert config.load(tmp_path).servers == (server.address, "gw.example:9443")


async def test_a_lost_answer_costs_nothing(server: Server, tmp_path: Path) -> None:
    server.answer = lambda message: None
    with pytest.raises(Unreachable, match="closed the connection"):
        await identity.enrol(tmp_path, token(), server.address)
    key = identity.files(tmp_path)[0].read_bytes()
    with pytest.raises(ConfigError, match="not enrolled"):
        config.load(tmp_path)
    server.answer = server.certify
    await identity.enrol(tmp_path, token(), server.address)
    assert identity.files(tmp_path)[0].read_bytes() == key


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("auth", AuthError),
        ("denied", identity.Denied),
        ("conflict", Conflict),
        ("retry", Unreachable),
        ("capacity", Unreachable),
        ("internal", Unreachable),
        ("protocol", Failed),
        ("odd", Failed),
    ],
)
async def test_a_refusal_is_told_as_what_it_is(
    server: Server, tmp_path: Path, code: str, error: type[FarshoreError]
) -> None:
    server.answer = lambda message: m.Error(code, "the reason")
    with pytest.raises(error, match="the reason"):
        await identity.enrol(tmp_path, token(), server.address)
    assert not (tmp_path / "agent.toml").exists()


def wrong(**changes: object) -> Answer:
    return lambda message: msgspec.structs.replace(Server().certify(message), **changes)


def other_key(message: m.Message) -> m.Message:
    assert isinstance(message, m.Enrol | m.Renew)
    changed = msgspec.structs.replace(message, csr=pki.make_request(pki.new_key(), "db1"))
    return Server().certify(changed)


def other_authority(message: m.Message) -> m.Message:
    assert isinstance(message, m.Enrol | m.Renew)
    key = pki.read_request(message.csr)
    foreign = pki.Authority.create(VAULT, time.time_ns())
    certificate = foreign.issue_agent(VAULT, MACHINE, "db1", key, time.time_ns())
    return m.Enrolled(MACHINE, VAULT, certificate, foreign.certificate)


@pytest.mark.parametrize(
    "answer",
    [
        wrong(machine_id=VAULT),
        wrong(vault_id=MACHINE),
        wrong(certificate=AUTHORITY.certificate),
        wrong(certificate=b"rubbish"),
        other_key,
        other_authority,
        lambda message: m.Bye(),
        lambda message: b"HTTP/1.1 400 Bad Request\r\n\r\n",
        lambda message: frames.HEADER.pack(2**32 - 1, 0, 3, 1, 0),
    ],
)
async def test_an_answer_that_does_not_fit_leaves_no_identity(
    server: Server, tmp_path: Path, answer: Answer
) -> None:
    server.answer = answer
    with pytest.raises(FarshoreError):
        await identity.enrol(tmp_path, token(), server.address)
    assert os.listdir(tmp_path) == ["identity"]
    assert os.listdir(tmp_path / "identity") == ["key.pem"]


async def test_a_server_of_another_vault_is_told_nothing(tmp_path: Path) -> None:
    async with serving(vault_id=MACHINE) as other:
        with pytest.raises(AuthError, match="another vault"):
            await identity.enrol(tmp_path, token(), other.address)
        assert other.got == []
    async with serving(pki.Authority.create(VAULT, time.time_ns())) as foreign:
        with pytest.raises(AuthError, match="not the process server of our vault"):
            await identity.enrol(tmp_path, token(), foreign.address)
        assert foreign.got == []


async def test_no_server_is_unreachable(tmp_path: Path) -> None:
    async with serving() as gone:
        address = gone.address
    with pytest.raises(Unreachable, match="cannot be reached"):
        await identity.enrol(tmp_path, token(), address)


async def test_a_server_that_is_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "ANSWER_S", 0.2)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(silent) as address:
        with pytest.raises(Unreachable, match="did not answer"):
            await identity.enrol(tmp_path, token(), address)


async def test_something_else_on_the_port_is_said(tmp_path: Path) -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()

    async with listening(http) as address:
        with pytest.raises(Unreachable, match="no process server answers here"):
            await identity.enrol(tmp_path, token(), address)


async def test_a_directory_belongs_to_one_machine(server: Server, tmp_path: Path) -> None:
    await identity.enrol(tmp_path, token(), server.address)
    with pytest.raises(Conflict, match="another machine's"):
        await identity.enrol(tmp_path, token("db2"), server.address)
    with pytest.raises(Conflict, match="another machine's"):
        await identity.enrol(tmp_path, token("db1", MACHINE), server.address)
    assert len(server.got) == 1


async def test_two_enrolments_of_a_directory_do_not_mix(server: Server, tmp_path: Path) -> None:
    (tmp_path / "identity").mkdir()
    held = os.open(tmp_path / "identity", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(Conflict, match="under way"):
            await identity.enrol(tmp_path, token(), server.address)
    finally:
        os.close(held)


async def test_a_damaged_token_goes_nowhere(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="damaged"):
        await identity.enrol(tmp_path / "agent", token()[:-3], server.address)
    assert not (tmp_path / "agent").exists()


async def test_a_key_that_others_can_read_is_refused(server: Server, tmp_path: Path) -> None:
    await identity.enrol(tmp_path, token(), server.address)
    identity.files(tmp_path)[0].chmod(0o644)
    with pytest.raises(AuthError, match="others can read"):
        await identity.enrol(tmp_path, token(), server.address)
    assert len(server.got) == 1


# --- renewal ---


@pytest.fixture
async def enrolled(server: Server, tmp_path: Path) -> Path:
    await identity.enrol(tmp_path, token(), server.address)
    settings = msgspec.structs.replace(config.load(tmp_path), servers=(server.address,))
    config.save(tmp_path, settings)
    return tmp_path


async def test_a_renewal_replaces_the_certificate_alone(server: Server, enrolled: Path) -> None:
    key, certificate, _ = (path.read_bytes() for path in identity.files(enrolled))
    settings = config.load(enrolled)
    await identity.renew(enrolled, settings, settings.servers)
    new_key, new_certificate, _ = (path.read_bytes() for path in identity.files(enrolled))
    assert new_key == key
    assert new_certificate != certificate
    assert isinstance(server.got[-1], m.Renew)


async def test_a_renewal_tries_every_server(server: Server, enrolled: Path) -> None:
    async with serving() as gone:
        address = gone.address
    await identity.renew(enrolled, config.load(enrolled), (address, server.address))
    with pytest.raises(Unreachable):
        await identity.renew(enrolled, config.load(enrolled), (address,))


async def test_a_renewal_is_due_at_two_thirds_and_then_until_it_works(server: Server, enrolled: Path) -> None:
    clock = ManualClock(wall_ns=time.time_ns())
    told: list[bool] = []
    renewal = identity.Renewal(
        enrolled, config.load(enrolled), clock, renewed=lambda: told.append(True), rng=random.Random(1)
    )
    life_s = pki.AGENT_LIFE.total_seconds()
    assert 0.6 * life_s < renewal.due_in_s() < 0.67 * life_s
    server.answer = lambda message: m.Error("retry", "not now")
    clock.advance(0.7 * life_s)
    assert renewal.due_in_s() == 0
    assert not await renewal.attempt()
    assert "not now" in renewal.error
    # A weekend later the certificate is long expired; the key is still good.
    clock.advance(3 * life_s)
    assert renewal.due_in_s() == 0
    assert renewal.expires < datetime.fromtimestamp(clock.wall_ns() / 1e9, UTC)
    server.answer = server.certify
    assert await renewal.attempt()
    assert (renewal.error, told) == ("", [True])


async def test_the_renewal_task_renews_when_it_is_due(
    server: Server, enrolled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "CHECK_S", 0.01)
    monkeypatch.setattr(identity, "RETRY_FIRST_S", 0.01)
    clock = ManualClock(wall_ns=time.time_ns())
    done = asyncio.Event()
    renewal = identity.Renewal(enrolled, config.load(enrolled), clock, renewed=done.set)
    failures = [m.Error("retry", "not now")] * 2

    def answer(message: m.Message) -> m.Message:
        if failures:
            return failures.pop()
        # By the time of the test's clock, or it would be due again at once.
        clock.jump_wall((time.time_ns() - clock.wall_ns()) / 1e9)
        return server.certify(message)

    server.answer = answer
    task = asyncio.create_task(renewal.run())
    deadline = time.monotonic() + 60
    while not server.got:
        assert time.monotonic() < deadline, "nobody was asked"
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert len(server.got) == 1
    clock.advance(pki.AGENT_LIFE.total_seconds())
    async with asyncio.timeout(10):
        await done.wait()
    assert len(server.got) == 4
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_being_revoked_is_told(server: Server, enrolled: Path) -> None:
    server.answer = lambda message: m.Error("denied", "by an operator")
    renewal = identity.Renewal(enrolled, config.load(enrolled), ManualClock(wall_ns=time.time_ns()))
    assert not await renewal.attempt()
    assert "this machine was revoked" in renewal.error


async def test_a_lost_identity_is_said(enrolled: Path) -> None:
    settings = config.load(enrolled)
    identity.files(enrolled)[0].unlink()
    with pytest.raises(IntegrityError, match="cannot read this machine's identity"):
        await identity.renew(enrolled, settings, settings.servers)
