"""Who this machine is: its key, its certificate, how it got them and how it keeps them valid.

``DIR/identity`` holds ``key.pem`` (0600, made here, never sent), ``cert.pem`` and ``ca.pem``. The key stays
the same for the machine's life; a renewal replaces ``cert.pem`` alone, in one rename, so there is no moment
at which the two do not fit together.
"""

import asyncio
import contextlib
import fcntl
import os
import random
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from agent.config import AgentConfig, Layout, load, parse_address, save
from farshore import pki
from farshore.clock import Clock
from farshore.config import create_private, fsync_directory, write_private
from farshore.errors import AuthError, Conflict, Failed, FarshoreError, IntegrityError, Unreachable
from farshore.ids import id_to_hex
from farshore.telemetry import get_logger
from farshore.wire import frames
from farshore.wire import messages as m

ANSWER_S: Final = 10.0
"""Connect, shake hands, ask and be answered: the server gives a stranger no more (docs/formats/wire.md)."""
CHECK_S: Final = 60.0
"""How often the clock is looked at: it may jump, and a suspended host does not sleep through a timer."""
RETRY_FIRST_S: Final = 5.0
RETRY_MAX_S: Final = 300.0

log = get_logger()


class Denied(AuthError):
    """The server has this machine on its deny-list: stop asking, an operator has decided."""


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What an enrolment left behind. ``renewed``: the machine was enrolled here before, with this key."""

    machine: str
    machine_id: bytes
    vault_id: bytes
    servers: tuple[str, ...]
    renewed: bool


def files(directory: Path) -> tuple[Path, Path, Path]:
    """Return the paths of key, certificate and CA below an agent's directory."""
    identity = Layout(directory).identity
    return identity / "key.pem", identity / "cert.pem", identity / "ca.pem"


async def enrol(directory: Path, token_text: str, server: str) -> Enrolment:
    """Spend a token: make a key, let the server certify it, write ``identity/`` and ``agent.toml``.

    Safe to repeat after any failure: the key is kept, and the server answers the same key again.

    Args:
        directory: Made (0700) when it is not there.
        server: ``HOST:PORT`` to enrol with; it becomes the first of ``servers``.

    Raises:
        UsageError: The text is not a token.
        AuthError: The server is not the one the token is for, or does not accept the token.
        Conflict: The directory belongs to another machine or vault, the name to another key, or an enrolment
            of this directory is under way.
        Unreachable: No answer.
        CapacityError, Failed: The files could not be written, or the server could not do it.
    """
    token = pki.decode_token(token_text)
    host, port = parse_address(server)
    layout = Layout(directory)
    _private_directory(directory)
    _private_directory(layout.identity)
    with _only_one(layout.identity):
        known = load(directory) if layout.config.exists() else None
        if known and (known.machine, known.vault_bytes) != (token.machine, token.vault_id):
            raise Conflict(
                "this directory is another machine's",
                where=str(directory),
                why=f"it is enrolled as {known.machine} with vault {known.vault_id}",
                fix="use another directory",
            )
        key_path, certificate_path, ca_path = files(directory)
        key = _key(key_path)
        request = m.Enrol(
            m.PROTOCOL, token.token_id, token.secret, token.machine, pki.make_request(key, token.machine)
        )
        ca = pki.der_to_pem(token.ca)
        answer = await ask(host, port, ca, token.vault_id, request)
        _check_answer(answer, key, ca, token.vault_id, None)
        servers = tuple(dict.fromkeys((server, *(known.servers if known else ()), *token.addresses)))
        _replace(ca_path, ca)
        _replace(certificate_path, answer.certificate)
        if known is None or known.servers != servers or known.machine_bytes != answer.machine_id:
            # Last: with agent.toml the machine counts as enrolled.
            metrics = (known.metrics_host, known.metrics_port) if known else ()
            save(
                directory,
                AgentConfig(
                    token.machine, id_to_hex(answer.machine_id), id_to_hex(token.vault_id), servers, *metrics
                ),
            )
    return Enrolment(token.machine, answer.machine_id, token.vault_id, servers, known is not None)


async def renew(directory: Path, config: AgentConfig, servers: Sequence[str]) -> None:
    """Get a new certificate for the key we have from the first of ``servers`` that answers.

    Raises:
        Denied: An operator revoked this machine.
        FarshoreError: No server gave one; the error is that of the last.
    """
    key_path, certificate_path, ca_path = files(directory)
    key = pki.key_from_pem(_read(key_path), where=str(key_path))
    ca = _read(ca_path)
    request = m.Renew(m.PROTOCOL, config.machine_bytes, pki.make_request(key, config.machine))
    failure: FarshoreError = Failed("no server to renew with", where=str(directory))
    for server in servers:
        host, port = parse_address(server)
        try:
            answer = await ask(host, port, ca, config.vault_bytes, request)
            _check_answer(answer, key, ca, config.vault_bytes, config.machine_bytes)
        except FarshoreError as error:
            failure = error
            continue
        _replace(certificate_path, answer.certificate)
        return
    raise failure


class Renewal:
    """Keeps the certificate valid: a new one at two thirds of its life, and as often as it takes after that.

    Attributes:
        expires: Until when the certificate is valid; for ``farshore_certificate_expiry_timestamp_seconds``.
        error: Why the last attempt failed; empty when it did not.
    """

    def __init__(
        self,
        directory: Path,
        config: AgentConfig,
        clock: Clock,
        *,
        renewed: Callable[[], None] = lambda: None,
        rng: random.Random | None = None,
    ) -> None:
        self._directory, self._config, self._clock = directory, config, clock
        self._renewed, self._rng = renewed, rng or random.Random()
        self._failures = 0
        self.expires, self._due = self._times()
        self.error = ""

    def due_in_s(self) -> float:
        """Return in how many seconds the next attempt is due; 0 when it is, or when there is no telling."""
        return max(0.0, (self._due - self._now()).total_seconds())

    async def run(self) -> None:
        """Renew for ever; ends only by being cancelled, which is safe at any time."""
        while True:
            await asyncio.sleep(min(CHECK_S, self.due_in_s()))
            if self.due_in_s() > 0:
                continue
            if not await self.attempt():
                await asyncio.sleep(self._wait_s())

    async def attempt(self) -> bool:
        """Try once. Returns True when there is a new certificate; logs and keeps the reason otherwise."""
        try:
            await renew(self._directory, self._config, self._config.servers)
        except FarshoreError as error:
            self._failures += 1
            self.error = str(error)
            expired = self._now() >= self.expires
            emit = log.error if expired or isinstance(error, Denied) else log.warning
            emit("certificate_renewal_failed", error=self.error, expires=self.expires.isoformat())
            return False
        self._failures, self.error = 0, ""
        self.expires, self._due = self._times()
        log.info("certificate_renewed", expires=self.expires.isoformat())
        self._renewed()
        return True

    def _times(self) -> tuple[datetime, datetime]:
        _, path, _ = files(self._directory)
        not_before, not_after = pki.validity(_read(path))
        # A little early, each machine by another amount: a thousand enrolled in one go do not renew in one.
        share = 2 / 3 - self._rng.uniform(0, 0.05)
        return not_after, not_before + (not_after - not_before) * share

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.wall_ns() / 1e9, UTC)

    def _wait_s(self) -> float:
        bound = min(RETRY_MAX_S, RETRY_FIRST_S * 2 ** min(self._failures, 10))
        return self._rng.uniform(bound / 2, bound)


async def ask(host: str, port: int, ca: bytes, vault_id: bytes, request: m.Enrol | m.Renew) -> m.Enrolled:
    """Send one frame without a client certificate and return the answer. Cancelling is safe.

    Raises:
        AuthError: The server is not of this vault, or refuses the request.
        Denied: This machine is on the deny-list.
        Conflict: The name is on record with another key.
        Unreachable: No answer within 10 s, or the server asks to try again later.
        Failed: The server could not understand or do it.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        context = pki.client_context(ca, vault_id)
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname="")
            try:
                writer.write(frames.encode(request))
                await writer.drain()
                header = frames.decode_header(
                    await reader.readexactly(frames.HEADER.size), bytes_max=frames.UNAUTHENTICATED_BYTES_MAX
                )
                answer = frames.decode_message(header, await reader.readexactly(header.meta_bytes))
            finally:
                writer.transport.abort()  # nothing is owed to either side, and an orderly end may hang
    except ssl.SSLCertVerificationError as error:
        raise AuthError(
            "this is not the process server of our vault",
            where=where,
            why=error.verify_message,
            fix="check the address, the clock of this host, and which vault the token is for",
        ) from error
    except ssl.SSLError as error:
        why = (error.reason or str(error)).replace("_", " ").lower()
        raise Unreachable(
            "no process server answers here", where=where, why=f"TLS: {why}", fix="check the port"
        ) from error
    except TimeoutError as error:
        raise Unreachable("the process server did not answer", where=where, why="10 s passed") from error
    except asyncio.IncompleteReadError as error:
        raise Unreachable("the process server closed the connection", where=where) from error
    except OSError as error:
        why = error.strerror or str(error)
        raise Unreachable("the process server cannot be reached", where=where, why=why) from error
    match answer:
        case m.Enrolled():
            return answer
        case m.Error():
            raise _refusal(answer, where)
    raise Failed("the process server gave another answer", where=where, why=type(answer).__name__)


def _refusal(error: m.Error, where: str) -> FarshoreError:
    match error.code:
        case "auth":
            return AuthError("the process server refused", where=where, why=error.text)
        case "denied":
            return Denied("this machine was revoked", where=where, why=error.text)
        case "conflict":
            return Conflict("the process server refused", where=where, why=error.text)
        case "retry" | "capacity" | "internal":
            return Unreachable("the process server cannot do it now", where=where, why=error.text)
    return Failed("the process server refused", where=where, why=f"{error.code}: {error.text}")


def _check_answer(
    answer: m.Enrolled, key: ec.EllipticCurvePrivateKey, ca: bytes, vault_id: bytes, machine_id: bytes | None
) -> None:
    """Hold what came back against what was asked: it is going to be this machine's identity."""
    peer = pki.peer_identity(pki.pem_to_der(answer.certificate), vault_id, "machine")
    right = (
        answer.vault_id == vault_id
        and peer.machine_id == answer.machine_id
        and machine_id in (None, answer.machine_id)
        and peer.public_key == pki.public_key_of(key)
        and pki.is_issued_by(answer.certificate, ca)
    )
    if not right:
        raise AuthError("the process server sent a certificate that is not ours")


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    with contextlib.suppress(FileExistsError):
        if not path.exists():
            key = pki.new_key()
            create_private(path, pki.key_to_pem(key))
            return key
    return pki.key_from_pem(_read(path), where=str(path))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            if path.name == "key.pem" and os.fstat(file.fileno()).st_mode & 0o077:
                raise AuthError(
                    "others can read this machine's key",
                    where=str(path),
                    fix="chmod 600 it, and enrol again with another key if somebody did",
                )
            return file.read(64 * 1024)
    except OSError as error:
        raise IntegrityError(
            "cannot read this machine's identity", where=str(path), why=error.strerror or str(error)
        ) from error


def _replace(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_private(path, content)


def _private_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True)
        fsync_directory(path.parent)
    except FileExistsError:
        if not path.is_dir():
            raise Conflict("there is something else in the place", where=str(path)) from None
    except OSError as error:
        raise Failed("cannot make the directory", where=str(path), why=error.strerror or "") from error


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict("another enrolment of this directory is under way", where=str(directory)) from None
        yield
    finally:
        os.close(descriptor)
