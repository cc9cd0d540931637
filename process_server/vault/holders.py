"""Who can open a vault: what people and servers hold, and the master key wrapped for each of them.

What only passphrases and escrows need is imported when one is used: 30 ms of the second that an export has.
"""

import hmac
import re
import secrets
import unicodedata
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from farshore.errors import IntegrityError, UsageError
from farshore.ids import ID_BYTES, new_id
from process_server.vault.recovery_key import SECRET_BYTES, RecoveryKey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

PASSPHRASE_CHARS_MIN: Final = 12
ARGON2: Final = (256 * 1024, 3, 4)
"""KiB of memory, passes, lanes: 0.8 s on two cores; OWASP and RFC 9106 ask for less memory or less passes."""
_NONCE_ZERO: Final = bytes(12)
_LABEL: Final = re.compile(r"[\x20-\x7e]{0,64}")

_Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Argon2Cost(msgspec.Struct, frozen=True, array_like=True):
    """What a passphrase costs to try. The bounds keep a store that lies from taking the reader's memory."""

    memory_kib: Annotated[int, msgspec.Meta(ge=8 * 1024, le=1024 * 1024)]
    passes: Annotated[int, msgspec.Meta(ge=1, le=16)]
    lanes: Annotated[int, msgspec.Meta(ge=1, le=16)]


class Holder(msgspec.Struct, frozen=True, omit_defaults=True):
    """The master key of one generation, wrapped for one secret.

    Attributes:
        kind: ``recovery``, ``server``, ``passphrase`` or ``escrow``.
        label: What people call it.
        argon2: Of a passphrase.
        recipient, ephemeral: Of an escrow: the public key it is for, and the one it was wrapped with.
    """

    kind: str
    id: _Id
    salt: _Bytes32
    check: _Bytes32
    wrapped: Annotated[bytes, msgspec.Meta(min_length=48, max_length=48)]
    label: Annotated[str, msgspec.Meta(max_length=64)] = ""
    argon2: Argon2Cost | None = None
    recipient: _Bytes32 | None = None
    ephemeral: _Bytes32 | None = None


class Passphrase:
    """Words that somebody remembers. Never in a repr or log."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = unicodedata.normalize("NFC", text)

    def check_new(self) -> None:
        """Refuse one that is too easy to guess. Raises UsageError."""
        if len(self._text) < PASSPHRASE_CHARS_MIN:
            raise UsageError(
                "the passphrase is too short",
                why=f"{len(self._text)} characters",
                fix=f"use {PASSPHRASE_CHARS_MIN} or more, such as five words chosen by dice",
            )

    def secret(self, salt: bytes, cost: Argon2Cost) -> bytes:
        """Return the 32 bytes that it stands for, slowly."""
        from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

        return Argon2id(
            salt=salt,
            length=SECRET_BYTES,
            iterations=cost.passes,
            lanes=cost.lanes,
            memory_cost=cost.memory_kib,
        ).derive(self._text.encode())

    def __repr__(self) -> str:
        return "Passphrase(…)"


class EscrowKey:
    """The private half of an X25519 key pair whose public half a vault was entrusted to."""

    __slots__ = ("_private",)

    def __init__(self, private: "X25519PrivateKey") -> None:
        self._private = private

    @classmethod
    def parse(cls, pem: bytes) -> "EscrowKey":
        """Return the key in a PEM text (PKCS #8). Raises UsageError."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as exc:
            raise UsageError("not a private key", why=str(exc).splitlines()[0]) from exc
        if not isinstance(key, X25519PrivateKey):
            raise UsageError(
                "not an X25519 key", fix="`openssl genpkey -algorithm X25519 -out escrow.pem` makes one"
            )
        return cls(key)

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    def secret(self, salt: bytes, ephemeral: bytes) -> bytes:
        """Return the 32 bytes that it yields for a holder."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        shared = self._private.exchange(X25519PublicKey.from_public_bytes(ephemeral))
        return _escrow_secret(shared, salt, ephemeral, self.public)

    def __repr__(self) -> str:
        return "EscrowKey(…)"


Opener: TypeAlias = RecoveryKey | bytes | Passphrase | EscrowKey
"""What opens a vault; bytes are a server's slot key."""


def parse_public_key(pem: bytes) -> bytes:
    """Return the 32 bytes of an X25519 public key in PEM. Raises UsageError."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except ValueError as exc:
        raise UsageError("not a public key", why=str(exc).splitlines()[0]) from exc
    if not isinstance(key, X25519PublicKey):
        raise UsageError("not an X25519 key", fix="`openssl pkey -in FILE -pubout` prints the public half")
    return key.public_bytes_raw()


def check_label(label: str) -> str:
    """Return a holder's label. Raises UsageError."""
    if not _LABEL.fullmatch(label):
        raise UsageError("not a label", where=repr(label[:80]), fix="use up to 64 printable ASCII characters")
    return label


class Wrapper:
    """Wraps and unwraps the master key of one generation of one vault."""

    def __init__(self, vault_id: bytes, generation: int) -> None:
        self._vault_id, self._generation = vault_id, generation

    def for_secret(self, master: bytes, kind: str, secret: bytes, label: str = "") -> Holder:
        """Wrap for 32 random bytes: a recovery key or a server's slot key."""
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a holder's secret has {SECRET_BYTES} bytes, not {len(secret)}")
        return self._wrap(master, Holder(kind, new_id(), _salt(), bytes(32), bytes(48), label), secret)

    def for_passphrase(
        self, master: bytes, passphrase: Passphrase, label: str = "", cost: tuple[int, int, int] = ARGON2
    ) -> Holder:
        """Wrap for a passphrase."""
        argon2 = Argon2Cost(*cost)
        salt = _salt()
        holder = Holder("passphrase", new_id(), salt, bytes(32), bytes(48), label, argon2)
        return self._wrap(master, holder, passphrase.secret(salt, argon2))

    def for_escrow(self, master: bytes, recipient: bytes, label: str = "") -> Holder:
        """Wrap for whoever has the private half of ``recipient`` (32 bytes)."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

        salt, private = _salt(), X25519PrivateKey.generate()
        ephemeral = private.public_key().public_bytes_raw()
        shared = private.exchange(X25519PublicKey.from_public_bytes(recipient))
        holder = Holder("escrow", new_id(), salt, bytes(32), bytes(48), label, None, recipient, ephemeral)
        return self._wrap(master, holder, _escrow_secret(shared, salt, ephemeral, recipient))

    def unwrap(self, holder: Holder, opener: Opener) -> bytes | None:
        """Return the master key; None when the holder is not for ``opener``. Raises IntegrityError."""
        secret = _secret_of(holder, opener)
        if secret is None:
            return None
        key, check = self._derive(holder.salt, secret)
        if not hmac.compare_digest(check, holder.check):
            return None
        try:
            return AESGCM(key).decrypt(_NONCE_ZERO, holder.wrapped, _context(holder))
        except InvalidTag:
            raise IntegrityError("the wrapped master key is damaged") from None

    def _wrap(self, master: bytes, holder: Holder, secret: bytes) -> Holder:
        key, check = self._derive(holder.salt, secret)
        # Nonce zero: the salt is new, so the key encrypts this once and nothing else.
        wrapped = AESGCM(key).encrypt(_NONCE_ZERO, master, _context(holder))
        return msgspec.structs.replace(holder, check=check, wrapped=wrapped)

    def _derive(self, salt: bytes, secret: bytes) -> tuple[bytes, bytes]:
        info = b"farshore holder 1" + self._vault_id + self._generation.to_bytes(4, "little")
        both = HKDF(algorithm=SHA256(), length=64, salt=salt, info=info).derive(secret)
        return both[:32], both[32:]


def _secret_of(holder: Holder, opener: Opener) -> bytes | None:
    """Return what ``opener`` yields for a holder, None when it is of another kind."""
    match holder.kind, opener:
        case "passphrase", Passphrase() if holder.argon2 is not None:
            return opener.secret(holder.salt, holder.argon2)
        case "escrow", EscrowKey() if holder.ephemeral is not None and holder.recipient == opener.public:
            return opener.secret(holder.salt, holder.ephemeral)
        case "recovery" | "server", RecoveryKey():
            return opener.secret
        case "recovery" | "server", bytes():
            return opener
    return None


def _escrow_secret(shared: bytes, salt: bytes, ephemeral: bytes, recipient: bytes) -> bytes:
    info = b"farshore escrow 1" + ephemeral + recipient
    return HKDF(algorithm=SHA256(), length=SECRET_BYTES, salt=salt, info=info).derive(shared)


def _salt() -> bytes:
    return secrets.token_bytes(32)


def _context(holder: Holder) -> bytes:
    return holder.kind.encode() + b"\0" + holder.id
