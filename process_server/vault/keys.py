"""Keys: the recovery key that people keep, the slots that servers keep, and what is derived from both."""

import base64
import hmac
import re
import secrets
import struct
from typing import Annotated, Final

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from farshore.errors import Conflict, IntegrityError, NotFound, UsageError, WrongKey
from farshore.failpoints import failpoint
from farshore.ids import ID_BYTES, id_to_hex, new_id
from process_server.vault.root import ROOT, Root, check_format, decode_root, encode_root
from process_server.vault.store.protocol import Precondition, Store

SECRET_BYTES: Final = 32
FORMAT: Final = 1
HOLDERS_MAX: Final = 64
KEYS_BYTES_MAX: Final = 64 * 1024

_PREFIX: Final = "FSRK-"
_CHECKSUM_BYTES: Final = 3
_DIGITS: Final = 8 * (SECRET_BYTES + _CHECKSUM_BYTES) // 5
_BASE32: Final = re.compile(r"[A-Z2-7]*")
# Digits that Base32 does not have, written for the letters they look like. A wrong guess meets the checksum.
_LOOKALIKES: Final = str.maketrans("018", "OIB")
_NONCE_ZERO: Final = bytes(12)
_STORED: Final = struct.Struct("<16sI32s")

_Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]


class RecoveryKey:
    """The secret that opens a vault when everything else is lost. 32 random bytes; never in a repr or log."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a recovery key has {SECRET_BYTES} bytes, not {len(secret)}")
        self._secret = secret

    @classmethod
    def generate(cls) -> "RecoveryKey":
        """Return a new key."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> "RecoveryKey":
        """Return the key that `format` wrote; case, spaces, dashes and 0, 1, 8 for O, I, B do not matter.

        Raises:
            UsageError: Not a recovery key, or mistyped. The message does not repeat what was typed.
        """
        digits = re.sub(r"[\s-]", "", text).upper().removeprefix(_PREFIX[:-1]).translate(_LOOKALIKES)
        if len(digits) != _DIGITS or not _BASE32.fullmatch(digits):
            raise UsageError(
                "not a recovery key",
                why=f"{len(digits)} digits after {_PREFIX}, or one that is none",
                fix=f"it is {_PREFIX} and {_DIGITS} letters and digits 2 to 7, in groups of 4",
            )
        raw = base64.b32decode(digits)
        secret, checksum = raw[:SECRET_BYTES], raw[SECRET_BYTES:]
        if not hmac.compare_digest(checksum, _checksum(secret)):
            raise UsageError(
                "the recovery key is mistyped",
                why="its checksum does not match",
                fix="compare it with the original, group by group",
            )
        return cls(secret)

    def format(self) -> str:
        """Return the text to print or store: ``FSRK-`` and 14 groups of 4 digits."""
        digits = base64.b32encode(self._secret + _checksum(self._secret)).decode()
        return _PREFIX + "-".join(digits[at : at + 4] for at in range(0, _DIGITS, 4))

    @property
    def secret(self) -> bytes:
        """The 32 bytes themselves."""
        return self._secret

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecoveryKey) and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash((RecoveryKey, self._secret))

    def __repr__(self) -> str:
        return "RecoveryKey(…)"


class VaultKeys:
    """What an open vault is read and written with: the master key of one generation and what it yields.

    Attributes:
        vault_id: 16 bytes; part of every key and of everything sealed.
        generation: Of the master key, from 1.
        id_key: Makes chunk ids.
        root_key: Authenticates ``root``.
        seal_key: What object keys are derived from.
        key_check: 32 bits that tell "sealed for another key" from damage; says nothing about the key.
    """

    __slots__ = ("_master", "generation", "id_key", "key_check", "root_key", "seal_key", "vault_id")

    def __init__(self, vault_id: bytes, generation: int, master: bytes) -> None:
        if len(vault_id) != ID_BYTES or len(master) != SECRET_BYTES or not 0 < generation < 2**32:
            raise ValueError("not the keys of a vault")
        self.vault_id, self.generation, self._master = vault_id, generation, master
        self.id_key = self._derive("id")
        self.root_key = self._derive("root")
        self.seal_key = self._derive("seal")
        self.key_check = int.from_bytes(self._derive("check")[:4], "little")

    def chunk_id(self, digest: bytes) -> bytes:
        """Return the id (32 bytes) of the chunk whose plaintext has this BLAKE3 digest (32 bytes)."""
        return blake3(digest, key=self.id_key).digest()

    def to_bytes(self) -> bytes:
        """Return everything, for a worker process of ours over a socketpair. Never to a disk or argv."""
        return _STORED.pack(self.vault_id, self.generation, self._master)

    @classmethod
    def from_bytes(cls, data: bytes) -> "VaultKeys":
        """Return what `to_bytes` gave. Raises ValueError."""
        if len(data) != _STORED.size:
            raise ValueError("not the keys of a vault")
        return cls(*_STORED.unpack(data))

    def _derive(self, label: str) -> bytes:
        return _hkdf(self._master, self.vault_id, f"farshore {label} 1".encode(), SECRET_BYTES)

    def __repr__(self) -> str:
        return f"VaultKeys(vault={self.vault_id.hex()}, generation={self.generation})"

    def __reduce__(self) -> str:
        raise TypeError("keys are not pickled: to_bytes says where they may go")


class Holder(msgspec.Struct, frozen=True):
    """The master key, wrapped for one secret. ``kind`` is ``recovery`` or ``server``."""

    kind: str
    id: _Id
    salt: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    check: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    wrapped: Annotated[bytes, msgspec.Meta(min_length=48, max_length=48)]


class KeysObject(msgspec.Struct, frozen=True):
    """``keys/<vault id>/<generation>``."""

    format: int
    vault: _Id
    generation: int
    holders: Annotated[tuple[Holder, ...], msgspec.Meta(max_length=HOLDERS_MAX)]


def create_vault(store: Store, recovery: RecoveryKey, server_slot: bytes) -> VaultKeys:
    """Make a new vault in ``store``, open to the recovery key and to the server's slot key (32 bytes).

    A crash before the end leaves no vault, only an object that nothing refers to.

    Raises:
        Conflict: There is a vault already, or somebody made one at the same moment.
    """
    try:
        store.size(ROOT)
    except NotFound:
        pass
    else:
        raise _exists()
    keys = VaultKeys(new_id(), 1, secrets.token_bytes(SECRET_BYTES))
    holders = (
        _wrap(keys, "recovery", recovery.secret),
        _wrap(keys, "server", server_slot),
    )
    # The name holds the new vault's id: two that race, or a try after a crash, do not meet here.
    body = _encode_keys(KeysObject(FORMAT, keys.vault_id, keys.generation, holders))
    store.put_new(keys_name(keys.vault_id, keys.generation), body)
    failpoint("vault.create.after_keys")
    root = encode_root(Root(vault=keys.vault_id, key_generation=keys.generation), keys.root_key)
    try:
        store.cas(ROOT, root, None)
    except Precondition:
        if store.get(ROOT) != root:
            raise _exists() from None
    return keys


def open_vault(store: Store, holder: RecoveryKey | bytes) -> VaultKeys:
    """Return the keys of the vault in ``store``, by the recovery key or a server's slot key (32 bytes).

    Raises:
        NotFound: There is no vault here.
        WrongKey: The vault is not for this key.
        IntegrityError: Its first objects are damaged, missing, or of a newer format.
    """
    try:
        body = store.get(ROOT)
    except NotFound:
        raise NotFound("no vault here", fix="check the address; `farshore server init` makes one") from None
    claimed = decode_root(body, None)
    kept, _ = _load_keys(store, claimed.vault, claimed.key_generation)
    keys = _unwrap(kept, holder.secret if isinstance(holder, RecoveryKey) else holder)
    decode_root(body, keys.root_key)
    return keys


def add_server_slot(store: Store, keys: VaultKeys, server_slot: bytes) -> None:
    """Let another server open the vault with its slot key (32 bytes); one that can already is left alone.

    Raises:
        Conflict: There are too many holders, or others keep changing them.
    """
    for _ in range(16):
        kept, etag = _load_keys(store, keys.vault_id, keys.generation)
        if any(_fits(kept, holder, server_slot) for holder in kept.holders):
            return
        if len(kept.holders) >= HOLDERS_MAX:
            raise Conflict("cannot add a server", why=f"the vault has {HOLDERS_MAX} keys already")
        holders = (*kept.holders, _wrap(keys, "server", server_slot))
        body = _encode_keys(msgspec.structs.replace(kept, holders=holders))
        try:
            store.cas(keys_name(keys.vault_id, keys.generation), body, etag)
        except Precondition:
            continue
        return
    raise Conflict("cannot add a server", why="the holders of keys kept changing", fix="try again")


def keys_name(vault_id: bytes, generation: int) -> str:
    """Return the name of the object that holds a wrapped master key."""
    return f"keys/{id_to_hex(vault_id)}/{generation:020}"


def _wrap(keys: VaultKeys, kind: str, secret: bytes) -> Holder:
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a holder's secret has {SECRET_BYTES} bytes, not {len(secret)}")
    id, salt = new_id(), secrets.token_bytes(32)
    key, check = _holder_key(keys.vault_id, keys.generation, salt, secret)
    # Nonce zero: the salt is new, so the key encrypts this once and nothing else.
    wrapped = AESGCM(key).encrypt(_NONCE_ZERO, keys._master, kind.encode() + b"\0" + id)
    return Holder(kind, id, salt, check, wrapped)


def _unwrap(kept: KeysObject, secret: bytes) -> VaultKeys:
    where = keys_name(kept.vault, kept.generation)
    for holder in kept.holders:
        if not _fits(kept, holder, secret):
            continue
        key, _ = _holder_key(kept.vault, kept.generation, holder.salt, secret)
        try:
            master = AESGCM(key).decrypt(
                _NONCE_ZERO, holder.wrapped, holder.kind.encode() + b"\0" + holder.id
            )
        except InvalidTag:
            raise IntegrityError("the wrapped master key is damaged", where=where) from None
        return VaultKeys(kept.vault, kept.generation, master)
    raise WrongKey(
        "this key does not open the vault",
        where=f"vault {id_to_hex(kept.vault)}",
        why=f"none of its {len(kept.holders)} key slots is for it",
        fix="use this vault's recovery key",
    )


def _fits(kept: KeysObject, holder: Holder, secret: bytes) -> bool:
    _, check = _holder_key(kept.vault, kept.generation, holder.salt, secret)
    return hmac.compare_digest(check, holder.check)


def _holder_key(vault_id: bytes, generation: int, salt: bytes, secret: bytes) -> tuple[bytes, bytes]:
    info = b"farshore holder 1" + vault_id + generation.to_bytes(4, "little")
    both = _hkdf(secret, salt, info, 64)
    return both[:32], both[32:]


def _encode_keys(kept: KeysObject) -> bytes:
    body = msgspec.msgpack.encode(kept)
    # Not keyed: without it one flipped bit in a salt would be called a wrong key.
    return body + blake3(body).digest()


def _load_keys(store: Store, vault_id: bytes, generation: int) -> tuple[KeysObject, str]:
    name = keys_name(vault_id, generation)
    try:
        raw, etag = store.get_with_etag(name)
    except NotFound as exc:
        raise IntegrityError("the vault's keys are missing", where=name) from exc
    body, digest = raw[:-32], raw[-32:]
    if len(raw) > KEYS_BYTES_MAX or blake3(body).digest() != digest:
        raise IntegrityError("the vault's keys are damaged", where=name, why="the checksum does not match")
    check_format(body, name)
    try:
        kept = msgspec.msgpack.decode(body, type=KeysObject)
    except msgspec.MsgspecError as exc:
        raise IntegrityError("the vault's keys are damaged", where=name, why=str(exc)) from exc
    if (kept.vault, kept.generation) != (vault_id, generation):
        raise IntegrityError("these are another vault's keys", where=name)
    return kept, etag


def _hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret)


def _checksum(secret: bytes) -> bytes:
    return blake3(b"farshore recovery key 1" + secret).digest(length=_CHECKSUM_BYTES)


def _exists() -> Conflict:
    return Conflict(
        "there is a vault already",
        fix="take it over with `farshore server adopt`, or choose an empty place",
    )
