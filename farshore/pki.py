"""Who is who: the vault's certificate authority, its certificates, tokens to join, and TLS contexts.

One CA per vault, EC P-256. A certificate names its holder in one SAN URI and in nothing else that we look at:

- ``farshore:<vault id>`` with extended key usage serverAuth: a process server of that vault;
- ``farshore:<vault id>:machine:<machine id>`` with clientAuth: an agent.

Host names play no part, so a server can move. Chain and validity are checked by OpenSSL in the handshake;
name and role by this module, on the client inside the handshake itself (`client_context`), so that no caller
can forget it. Revocation is the server's deny-list, not in here.
"""

import base64
import contextlib
import os
import re
import secrets
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, cast

import msgspec
from blake3 import blake3
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from farshore.errors import AuthError, ConfigError, UsageError
from farshore.ids import ID_BYTES, id_from_hex, id_to_hex, valid_name

ALPN_HRL: Final = "hrl/1"
ALPN_HTTP: Final = "http/1.1"

AGENT_LIFE: Final = timedelta(hours=24)
"""Short, so that a copied certificate is worthless tomorrow; renewed at two thirds (SPIFFE's practice)."""
SERVER_LIFE: Final = timedelta(days=30)
CA_LIFE: Final = timedelta(days=3650)
CLOCK_LEEWAY: Final = timedelta(minutes=5)
"""An agent's certificate is valid this long before it was made: it is judged by the clock that made it."""
SERVER_CLOCK_LEEWAY: Final = timedelta(hours=24)
"""A server's certificate is judged by the clocks of the agents."""

CSR_BYTES_MAX: Final = 8192
TOKEN_CHARS_MAX: Final = 8192
SECRET_BYTES: Final = 32
ADDRESSES_MAX: Final = 16

_TOKEN_PREFIX: Final = "fst1."
_CHECK_BYTES: Final = 4
_SERIAL_RANDOM_BYTES: Final = 14
_URI: Final = re.compile(r"farshore:([0-9a-f]{32})(?::machine:([0-9a-f]{32}))?")


# --- certificates ---


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its private key, both PEM. The key is in memory only; who writes it says where."""

    certificate: bytes
    private_key: bytes
    not_before: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Peer:
    """What a certificate of ours says about its holder.

    Attributes:
        machine_id: None for a process server.
        public_key: SubjectPublicKeyInfo, DER: what is kept on record of a machine.
    """

    vault_id: bytes
    machine_id: bytes | None
    public_key: bytes
    serial: int
    not_before: datetime
    not_after: datetime


class Authority:
    """A vault's CA: the only thing that can make certificates for it.

    Args:
        certificate: PEM.
        private_key: PEM (PKCS #8, not encrypted: it lies in the sealed ``control/`` object).

    Raises:
        ConfigError: Not a CA certificate with its key.
    """

    def __init__(self, certificate: bytes, private_key: bytes) -> None:
        try:
            self._certificate = x509.load_pem_x509_certificate(certificate)
            key = serialization.load_pem_private_key(private_key, None)
        except (ValueError, TypeError) as error:
            raise ConfigError("cannot read the certificate authority", why=str(error)) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or _spki(key.public_key()) != _spki(
            self._certificate.public_key()
        ):
            raise ConfigError("cannot use the certificate authority", why="key and certificate do not match")
        self._key = key
        self.certificate = certificate
        self.private_key = private_key

    @classmethod
    def create(cls, vault_id: bytes, now_ns: int) -> "Authority":
        """Make a new CA for a vault."""
        key = new_key()
        name = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, f"Farshore vault {id_to_hex(vault_id)[:8]}")]
        )
        now = _time(now_ns)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SERVER_CLOCK_LEEWAY)
            .not_valid_after(now + CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate.public_bytes(serialization.Encoding.PEM), key_to_pem(key))

    @property
    def certificate_der(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.DER)

    def issue_server(self, vault_id: bytes, now_ns: int) -> Issued:
        """Make a key and a certificate for a process server."""
        key, now = new_key(), _time(now_ns)
        not_before, not_after = now - SERVER_CLOCK_LEEWAY, now + SERVER_LIFE
        certificate = self._sign(
            key.public_key(),
            "Farshore process server",
            server_uri(vault_id),
            ExtendedKeyUsageOID.SERVER_AUTH,
            not_before,
            not_after,
        )
        return Issued(certificate, key_to_pem(key), not_before, not_after)

    def issue_agent(
        self, vault_id: bytes, machine_id: bytes, name: str, public_key: bytes, now_ns: int
    ) -> bytes:
        """Return the PEM certificate of an agent for the key that `read_request` gave."""
        now = _time(now_ns)
        key = serialization.load_der_public_key(public_key)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return self._sign(
            key,
            name,
            machine_uri(vault_id, machine_id),
            ExtendedKeyUsageOID.CLIENT_AUTH,
            now - CLOCK_LEEWAY,
            now + AGENT_LIFE,
        )

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        uri: str,
        usage: x509.ObjectIdentifier,
        not_before: datetime,
        not_after: datetime,
    ) -> bytes:
        not_after = min(not_after, self._certificate.not_valid_after_utc)
        digital_signature = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(_new_serial(not_after))
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(digital_signature, critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


def _new_serial(not_after: datetime) -> int:
    # Who keeps a serial number on record knows with it until when the certificate is valid.
    seconds = int(not_after.timestamp())
    return int.from_bytes(seconds.to_bytes(5, "big") + secrets.token_bytes(_SERIAL_RANDOM_BYTES), "big")


def expiry_of_serial(serial: int) -> datetime:
    """Return until when the certificate with this serial number, made by `Authority`, is valid."""
    return datetime.fromtimestamp((serial >> 8 * _SERIAL_RANDOM_BYTES) & (2**36 - 1), UTC)


def server_uri(vault_id: bytes) -> str:
    """Return the SAN URI of a vault's process servers."""
    return f"farshore:{id_to_hex(vault_id)}"


def machine_uri(vault_id: bytes, machine_id: bytes) -> str:
    """Return the SAN URI of a machine's agent."""
    return f"farshore:{id_to_hex(vault_id)}:machine:{id_to_hex(machine_id)}"


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a new key on P-256, the only curve we issue for."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return PKCS #8, PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_pem(text: bytes, *, where: str = "") -> ec.EllipticCurvePrivateKey:
    """Read what `key_to_pem` wrote.

    Raises:
        ConfigError: Not a private key on P-256.
    """
    try:
        key = serialization.load_pem_private_key(text, None)
    except (ValueError, TypeError) as error:
        raise ConfigError("cannot read the private key", where=where, why="not an unencrypted PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("cannot use the private key", where=where, why="not on the curve P-256")
    return key


def public_key_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return SubjectPublicKeyInfo, DER."""
    return _spki(key.public_key())


def fingerprint(public_key: bytes) -> str:
    """Return a public key's name in logs and lists: 32 hexadecimal digits of its BLAKE3."""
    return blake3(public_key).hexdigest(16)


def make_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Return a PEM certificate request, signed with the key it is for. The key itself goes nowhere."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(text: bytes) -> bytes:
    """Return the public key of a PEM certificate request; nothing else in it is looked at.

    Raises:
        AuthError: Too long, not a request, its signature does not prove the key, or not a P-256 key.
    """
    if len(text) > CSR_BYTES_MAX:
        raise AuthError("certificate request refused", why=f"longer than {CSR_BYTES_MAX} bytes")
    try:
        request = x509.load_pem_x509_csr(text)
        key = request.public_key()
        proved = request.is_signature_valid
    except Exception as error:  # the parser's errors have no common class; what we get is a stranger's
        raise AuthError("certificate request refused", why="it cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AuthError("certificate request refused", why="its key is not on the curve P-256")
    if not proved:
        raise AuthError("certificate request refused", why="it is not signed with its own key")
    return _spki(key)


def peer_identity(certificate_der: bytes, vault_id: bytes, role: Literal["server", "machine"]) -> Peer:
    """Return who holds a certificate whose chain and validity the TLS handshake has checked.

    Raises:
        AuthError: It is not a certificate of that role in that vault; ``why`` says which check failed.
    """
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        key = certificate.public_key()
        extensions = certificate.extensions
        names = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        usages = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        is_ca = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except Exception as error:  # as in read_request
        raise AuthError("certificate refused", why="it is not one of ours") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AuthError("certificate refused", why="its key is not on the curve P-256")
    usage = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    if is_ca or usages != [usage]:
        raise AuthError("certificate refused", why=f"it is not made for a {role}")
    name = names[0] if len(names) == 1 else None
    found = _URI.fullmatch(name.value) if isinstance(name, x509.UniformResourceIdentifier) else None
    if found is None or (found[2] is None) != (role == "server"):
        raise AuthError("certificate refused", why=f"its name is not that of a {role}")
    if id_from_hex(found[1]) != vault_id:
        raise AuthError("certificate refused", why="it belongs to another vault")
    return Peer(
        vault_id,
        id_from_hex(found[2]) if found[2] else None,
        _spki(key),
        certificate.serial_number,
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )


def machine_of_certificate(certificate_der: bytes, vault_id: bytes) -> bytes:
    """Return the machine id in an agent's certificate. Raises AuthError as `peer_identity`."""
    machine_id = peer_identity(certificate_der, vault_id, "machine").machine_id
    assert machine_id is not None
    return machine_id


def validity(certificate: bytes) -> tuple[datetime, datetime]:
    """Return from when until when a PEM certificate is valid.

    Raises:
        ConfigError: Not a certificate.
    """
    try:
        loaded = x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise ConfigError("cannot read the certificate", why="not a PEM certificate") from error
    return loaded.not_valid_before_utc, loaded.not_valid_after_utc


def serial_of(certificate: bytes) -> int:
    """Return a PEM certificate's serial number. Raises ConfigError as `validity`."""
    try:
        return x509.load_pem_x509_certificate(certificate).serial_number
    except ValueError as error:
        raise ConfigError("cannot read the certificate", why="not a PEM certificate") from error


def is_issued_by(certificate: bytes, ca: bytes) -> bool:
    """Tell whether the CA signed the certificate (both PEM); validity in time is not looked at."""
    try:
        x509.load_pem_x509_certificate(certificate).verify_directly_issued_by(
            x509.load_pem_x509_certificate(ca)
        )
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def pem_to_der(certificate: bytes) -> bytes:
    """Return a PEM certificate as DER. Raises ConfigError as `validity`."""
    try:
        return x509.load_pem_x509_certificate(certificate).public_bytes(serialization.Encoding.DER)
    except ValueError as error:
        raise ConfigError("cannot read the certificate", why="not a PEM certificate") from error


def _spki(key: Any) -> bytes:
    return cast(
        bytes,
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
    )


def _time(ns: int) -> datetime:
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC)


# --- tokens ---


class Token(msgspec.Struct, frozen=True, array_like=True):
    """What an operator carries to a new machine: proof for both sides, good for one enrolment.

    Attributes:
        ca: The CA's certificate, DER: how the agent knows the server.
        token_id: Names the token at the server; not secret.
        secret: 256 random bits; the server keeps a hash.
        machine: The one name it is good for.
        addresses: ``HOST:PORT`` of process servers; may be empty.
    """

    vault_id: bytes
    ca: bytes
    token_id: bytes
    secret: bytes
    machine: str
    addresses: tuple[str, ...]

    def __repr__(self) -> str:
        """Return it without the secret: a repr ends in logs and tracebacks."""
        return f"Token({self.token_id.hex()}, machine={self.machine!r})"


_token_decoder: Final = msgspec.msgpack.Decoder(Token)


def encode_token(token: Token) -> str:
    """Return the one-line text of a token: ``fst1.`` and base64url of MessagePack with a checksum."""
    body = msgspec.msgpack.encode(token)
    check = blake3(body).digest(_CHECK_BYTES)
    return _TOKEN_PREFIX + base64.urlsafe_b64encode(body + check).rstrip(b"=").decode()


def decode_token(text: str) -> Token:
    """Read what `encode_token` wrote; white space around it is ignored.

    Raises:
        UsageError: Not a token, or damaged on the way. The text is never repeated in the error.
    """
    stripped = text.strip()
    if not stripped.startswith(_TOKEN_PREFIX) or len(stripped) > TOKEN_CHARS_MAX:
        raise UsageError(
            "not a token",
            why=f"it does not begin with {_TOKEN_PREFIX}",
            fix="make one: farshore token create",
        )
    encoded = stripped.removeprefix(_TOKEN_PREFIX)
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        body, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
        if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != encoded:
            raise ValueError("the last digit has bits that belong to no byte")
        if blake3(body).digest(_CHECK_BYTES) != check:
            raise ValueError("checksum")
        token = _token_decoder.decode(body)
        sizes = (len(token.vault_id), len(token.token_id), len(token.secret))
        if sizes != (ID_BYTES, ID_BYTES, SECRET_BYTES) or not valid_name(token.machine):
            raise ValueError("fields")
        if len(token.addresses) > ADDRESSES_MAX:
            raise ValueError("addresses")
        x509.load_der_x509_certificate(token.ca)
    except (ValueError, msgspec.MsgspecError) as error:
        # "from None" would hide which of ours failed; the cause's text holds none of the token.
        raise UsageError("the token is damaged", fix="copy it whole, it is one line") from error
    return token


def der_to_pem(certificate: bytes) -> bytes:
    """Return a DER certificate as PEM."""
    return ssl.DER_cert_to_PEM_cert(certificate).encode()


# --- TLS ---


def server_context(
    certificate: bytes,
    private_key: bytes,
    ca: bytes,
    *,
    alpn: str = ALPN_HRL,
    client_certificates: bool = True,
) -> ssl.SSLContext:
    """Return a TLS 1.3 context of a process server; all arguments are PEM.

    With ``client_certificates`` one is asked for and, when shown, must be valid and of our CA: a bad one ends
    the handshake. None at all is accepted here; what such a peer may do is the caller's matter.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context, alpn)
    use_certificate(context, certificate, private_key)
    # A resumed session would not look at the certificate again; a ticket nobody reads costs the tail (a RST).
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    if client_certificates:
        context.load_verify_locations(cadata=ca.decode())
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def client_context(
    ca: bytes,
    vault_id: bytes,
    *,
    certificate: bytes | None = None,
    private_key: bytes | None = None,
    alpn: str = ALPN_HRL,
) -> ssl.SSLContext:
    """Return a TLS 1.3 context that completes a handshake only with a process server of ``vault_id``.

    Works with asyncio, uvloop, blocking sockets and `http.client`. A refused client certificate shows only at
    the first read (TLS 1.3), so "connected" is when the peer has answered something.

    Args:
        ca, certificate, private_key: PEM; without a certificate the peer may only enrol or renew.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _restrict(context, alpn)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=ca.decode())
    if certificate is not None and private_key is not None:
        use_certificate(context, certificate, private_key)

    def check(peer: ssl.SSLObject | ssl.SSLSocket) -> None:
        try:
            peer_identity(peer.getpeercert(binary_form=True) or b"", vault_id, "server")
        except AuthError as error:
            refused = ssl.SSLCertVerificationError(f"not a process server of this vault: {error.why}")
            # As OpenSSL's own refusals have them; 50 is X509_V_ERR_APPLICATION_VERIFICATION.
            refused.verify_code, refused.verify_message = 50, error.why
            raise refused from error

    class CheckedObject(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            check(self)

    class CheckedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            check(self)

    context.sslobject_class = CheckedObject
    context.sslsocket_class = CheckedSocket
    return context


def use_certificate(context: ssl.SSLContext, certificate: bytes, private_key: bytes) -> None:
    """Show this certificate (both PEM) in handshakes from now on; a context in use may be given another."""
    with _as_file(certificate + b"\n" + private_key) as path:
        context.load_cert_chain(path)


def _restrict(context: ssl.SSLContext, alpn: str) -> None:
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    # RFC 5280 to the letter; Python's own default from 3.13 on.
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols([alpn])


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    # `ssl` takes keys from files only; this one is memory, so that no key ever reaches a disk.
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
