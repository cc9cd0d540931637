"""Certificates, tokens and TLS contexts: the matrix of what must be refused, on asyncio and uvloop."""

import asyncio
import contextlib
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from farshore import pki
from farshore.errors import AuthError, ConfigError, UsageError
from farshore.ids import new_id

VAULT, MACHINE = bytes(range(16)), bytes(range(16, 32))
NOW = time.time_ns()
DAY_NS = 86_400 * 1_000_000_000


@dataclass
class Pair:
    certificate: bytes
    key: bytes


@pytest.fixture(scope="module")
def authority() -> pki.Authority:
    return pki.Authority.create(VAULT, NOW)


def agent(authority: pki.Authority, *, now_ns: int = NOW, machine_id: bytes = MACHINE) -> Pair:
    key = pki.new_key()
    request = pki.read_request(pki.make_request(key, "db1"))
    return Pair(authority.issue_agent(VAULT, machine_id, "db1", request, now_ns), pki.key_to_pem(key))


def forge(
    authority: pki.Authority,
    *,
    uri: str | None = None,
    usages: tuple[Any, ...] = (ExtendedKeyUsageOID.CLIENT_AUTH,),
    key: Any = None,
    names: tuple[Any, ...] | None = None,
) -> Pair:
    """Sign what our own code never would."""
    ca_key = serialization.load_pem_private_key(authority.private_key, None)
    ca = x509.load_pem_x509_certificate(authority.certificate)
    key = key or pki.new_key()
    uri = uri if uri is not None else pki.machine_uri(VAULT, MACHINE)
    names = names if names is not None else (x509.UniformResourceIdentifier(uri),)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "db1")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key()),  # type: ignore[arg-type]
            critical=False,
        )
    )
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
    certificate = builder.sign(ca_key, hashes.SHA256())  # type: ignore[arg-type]
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


# --- certificates ---


def test_an_agent_is_known_by_its_certificate(authority: pki.Authority) -> None:
    pair = agent(authority)
    peer = pki.peer_identity(pki.pem_to_der(pair.certificate), VAULT, "machine")
    assert (peer.vault_id, peer.machine_id) == (VAULT, MACHINE)
    assert pki.machine_of_certificate(pki.pem_to_der(pair.certificate), VAULT) == MACHINE
    assert peer.public_key == pki.public_key_of(pki.key_from_pem(pair.key))
    assert peer.not_after - datetime.fromtimestamp(NOW / 1e9, UTC) <= timedelta(hours=24)
    assert pki.expiry_of_serial(peer.serial) == peer.not_after
    assert pki.is_issued_by(pair.certificate, authority.certificate)


REFUSED: dict[str, tuple[Callable[[pki.Authority], Pair], str]] = {
    "server as machine": (lambda ca: server(ca), "not made for a machine"),
    "both usages": (
        lambda ca: forge(ca, usages=(ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)),
        "not made for a machine",
    ),
    "no usage": (lambda ca: forge(ca, usages=()), "not one of ours"),
    "other vault": (lambda ca: forge(ca, uri=pki.machine_uri(MACHINE, MACHINE)), "another vault"),
    "server's name": (lambda ca: forge(ca, uri=pki.server_uri(VAULT)), "not that of a machine"),
    "longer name": (
        lambda ca: forge(ca, uri=pki.machine_uri(VAULT, MACHINE) + "x"),
        "not that of a machine",
    ),
    "upper case": (
        lambda ca: forge(ca, uri=pki.machine_uri(VAULT, MACHINE).upper()),
        "not that of a machine",
    ),
    "two names": (
        lambda ca: forge(
            ca,
            names=(
                x509.UniformResourceIdentifier(pki.machine_uri(VAULT, MACHINE)),
                x509.UniformResourceIdentifier(pki.machine_uri(VAULT, VAULT)),
            ),
        ),
        "not that of a machine",
    ),
    "a host name": (lambda ca: forge(ca, names=(x509.DNSName("db1"),)), "not that of a machine"),
    "no name": (lambda ca: forge(ca, names=()), "not one of ours"),
    "rsa": (lambda ca: forge(ca, key=rsa.generate_private_key(65537, 2048)), "P-256"),
    "p-384": (lambda ca: forge(ca, key=ec.generate_private_key(ec.SECP384R1())), "P-256"),
    "the ca itself": (lambda ca: Pair(ca.certificate, ca.private_key), "not one of ours"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_certificate_that_is_not_a_machines_is_refused(authority: pki.Authority, case: str) -> None:
    make, why = REFUSED[case]
    with pytest.raises(AuthError, match=why):
        pki.peer_identity(pki.pem_to_der(make(authority).certificate), VAULT, "machine")


@pytest.mark.parametrize("der", [b"", b"\0", b"\x30\x82\xff\xff", bytes(5000)])
def test_bytes_that_are_no_certificate_are_refused(der: bytes) -> None:
    with pytest.raises(AuthError, match="not one of ours"):
        pki.peer_identity(der, VAULT, "machine")


def test_a_request_proves_its_key(authority: pki.Authority) -> None:
    key = pki.new_key()
    request = pki.make_request(key, "db1")
    assert pki.read_request(request) == pki.public_key_of(key)
    der = bytearray(x509.load_pem_x509_csr(request).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(AuthError, match="not signed with its own key"):
        pki.read_request(broken)


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP192R1()),
    ],
    ids=["rsa", "p-384", "p-192"],
)
def test_a_request_for_another_kind_of_key_is_refused(key: Any) -> None:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    with pytest.raises(AuthError, match="P-256"):
        pki.read_request(request.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize("text", [b"", b"x", b"-" * 10_000, b"-----BEGIN CERTIFICATE REQUEST-----\n"])
def test_what_is_no_request_is_refused(text: bytes) -> None:
    with pytest.raises(AuthError):
        pki.read_request(text)


def test_a_private_key_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="private key"):
        pki.key_from_pem(b"rubbish", where="key.pem")
    other = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(ConfigError, match="P-256"):
        pki.key_from_pem(pki.key_to_pem(other))


def test_an_authority_needs_its_own_key(authority: pki.Authority) -> None:
    assert pki.Authority(authority.certificate, authority.private_key).certificate == authority.certificate
    with pytest.raises(ConfigError, match="do not match"):
        pki.Authority(authority.certificate, pki.key_to_pem(pki.new_key()))
    with pytest.raises(ConfigError):
        pki.Authority(b"rubbish", authority.private_key)


# --- tokens ---


def token(authority: pki.Authority) -> pki.Token:
    return pki.Token(VAULT, authority.certificate_der, new_id(), bytes(range(32)), "db1", ("gw:9443",))


def test_a_token_is_one_line_and_comes_back(authority: pki.Authority) -> None:
    made = token(authority)
    text = pki.encode_token(made)
    assert text.startswith("fst1.")
    assert text.split() == [text]
    assert pki.decode_token(f"\n {text}\r\n") == made


def test_a_damaged_token_is_refused_and_not_repeated(authority: pki.Authority) -> None:
    text = pki.encode_token(token(authority))
    cut = [text[:-1], text[:100], text + "A", "fst1.", "", "FST1." + text[5:], text[5:], "fst1." + "é" * 8]
    flipped = [text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :] for at in range(5, len(text))]
    for wrong in [*cut, *flipped, "fst1." + "A" * 10_000]:
        with pytest.raises(UsageError) as caught:
            pki.decode_token(wrong)
        assert text[20:60] not in str(caught.value)


def test_a_token_shows_no_secret(authority: pki.Authority) -> None:
    made = token(authority)
    assert made.secret.hex() not in repr(made)
    assert repr(made.secret)[2:-1] not in repr(made)


# --- TLS ---


def server(authority: pki.Authority, *, now_ns: int = NOW, vault_id: bytes = VAULT) -> Pair:
    issued = authority.issue_server(vault_id, now_ns)
    return Pair(issued.certificate, issued.private_key)


async def exchange(server_side: ssl.SSLContext, client_side: ssl.SSLContext) -> bytes:
    """Connect, let the server say who called; raises what the client sees."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readexactly(4)
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.write(b"%08d" % len(der or b"") + (der or b""))
            await writer.drain()
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_side)
    try:
        port = listener.sockets[0].getsockname()[1]
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_side)
            try:
                writer.write(b"who?")
                size = int(await reader.readexactly(8))
                return await reader.readexactly(size)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    finally:
        listener.close()
        await listener.wait_closed()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[bytes]], bytes]]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        # A refused handshake is logged by the loop; the test sees it as the client's exception.
        runner.get_loop().set_exception_handler(lambda loop, context: None)
        yield runner.run  # type: ignore[misc]


def client(authority: pki.Authority, pair: Pair | None, *, vault_id: bytes = VAULT) -> ssl.SSLContext:
    if pair is None:
        return pki.client_context(authority.certificate, vault_id)
    return pki.client_context(
        authority.certificate, vault_id, certificate=pair.certificate, private_key=pair.key
    )


def careless_client(pair: Pair) -> ssl.SSLContext:
    """A client that checks nothing and shows whatever it has, which our own would not even load."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.set_alpn_protocols(["hrl/1"])
    with tempfile.NamedTemporaryFile() as file:
        file.write(pair.certificate + pair.key)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def serving(authority: pki.Authority, pair: Pair) -> ssl.SSLContext:
    return pki.server_context(pair.certificate, pair.key, authority.certificate)


Run = Callable[[Awaitable[bytes]], bytes]


def test_both_sides_know_each_other(authority: pki.Authority, run: Run) -> None:
    pair = agent(authority)
    seen = run(exchange(serving(authority, server(authority)), client(authority, pair)))
    assert seen == pki.pem_to_der(pair.certificate)


def test_without_a_certificate_the_server_sees_none(authority: pki.Authority, run: Run) -> None:
    assert run(exchange(serving(authority, server(authority)), client(authority, None))) == b""


CLIENTS_REFUSED: dict[str, Callable[[pki.Authority], Pair]] = {
    "expired": lambda ca: agent(ca, now_ns=NOW - 2 * DAY_NS),
    "not yet valid": lambda ca: agent(ca, now_ns=NOW + DAY_NS),
    "wrong ca": lambda ca: agent(pki.Authority.create(VAULT, NOW)),
    "server's usage": lambda ca: server(ca),
    "weak key": lambda ca: forge(ca, key=rsa.generate_private_key(65537, 1024)),
}


@pytest.mark.parametrize("case", CLIENTS_REFUSED)
def test_a_client_with_a_bad_certificate_gets_no_answer(
    authority: pki.Authority, run: Run, case: str
) -> None:
    context = careless_client(CLIENTS_REFUSED[case](authority))
    # In TLS 1.3 the client's own handshake succeeds; the refusal comes with the first read.
    with pytest.raises((ssl.SSLError, asyncio.IncompleteReadError, ConnectionError)):
        run(exchange(serving(authority, server(authority)), context))


SERVERS_REFUSED: dict[str, Callable[[pki.Authority], Pair]] = {
    "expired": lambda ca: server(ca, now_ns=NOW - 40 * DAY_NS),
    "not yet valid": lambda ca: server(ca, now_ns=NOW + 3 * DAY_NS),
    "wrong ca": lambda ca: server(pki.Authority.create(VAULT, NOW)),
    "other vault": lambda ca: server(ca, vault_id=MACHINE),
    "an agent": lambda ca: agent(ca),
    "an agent's name": lambda ca: forge(ca, usages=(ExtendedKeyUsageOID.SERVER_AUTH,)),
    "both usages": lambda ca: forge(
        ca,
        uri=pki.server_uri(VAULT),
        usages=(ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH),
    ),
}


@pytest.mark.parametrize("case", SERVERS_REFUSED)
def test_a_server_that_is_not_ours_gets_not_one_byte(authority: pki.Authority, run: Run, case: str) -> None:
    pair = SERVERS_REFUSED[case](authority)
    with pytest.raises(ssl.SSLCertVerificationError):
        run(exchange(serving(authority, pair), client(authority, agent(authority))))


@pytest.mark.parametrize("case", SERVERS_REFUSED)
def test_a_blocking_client_checks_the_server_too(authority: pki.Authority, case: str) -> None:
    pair = SERVERS_REFUSED[case](authority)
    with blocking_server(serving(authority, pair)) as port:
        raw = socket.create_connection(("127.0.0.1", port), timeout=10)
        with raw, pytest.raises(ssl.SSLCertVerificationError):
            client(authority, None).wrap_socket(raw)


@contextlib.contextmanager
def blocking_server(context: ssl.SSLContext) -> Iterator[int]:
    """Accept one connection and answer its first byte."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(10)
                with context.wrap_socket(accepted, server_side=True) as wrapped:
                    wrapped.sendall(wrapped.recv(1))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            # Wakes an accept that nobody came for.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=10)


def test_no_ticket_is_given_and_no_session_resumed(authority: pki.Authority) -> None:
    with blocking_server(serving(authority, server(authority))) as port:
        raw = socket.create_connection(("127.0.0.1", port), timeout=10)
        with client(authority, agent(authority)).wrap_socket(raw) as wrapped:
            wrapped.sendall(b"x")
            assert wrapped.recv(1) == b"x"
            assert wrapped.version() == "TLSv1.3"
            assert wrapped.selected_alpn_protocol() == "hrl/1"
            assert not wrapped.session_reused
            assert wrapped.session is None or not wrapped.session.has_ticket


def test_tls_1_2_is_refused(authority: pki.Authority) -> None:
    with blocking_server(serving(authority, server(authority))) as port:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        raw = socket.create_connection(("127.0.0.1", port), timeout=10)
        with raw, pytest.raises(ssl.SSLError, match=r"(?i)protocol version|alert"):
            old.wrap_socket(raw)
