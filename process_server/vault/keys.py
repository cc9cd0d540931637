"""The keys of a vault: made, opened by whoever holds a key to it, and what is derived from them."""

import secrets
import struct
from collections.abc import Callable
from typing import Annotated, Final, TypeAlias

import msgspec
from blake3 import blake3
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from farshore.errors import Conflict, IntegrityError, NotFound, WrongKey
from farshore.failpoints import failpoint
from farshore.ids import ID_BYTES, id_to_hex, new_id
from process_server.vault.holders import Holder, Opener, Wrapper
from process_server.vault.recovery_key import SECRET_BYTES, RecoveryKey
from process_server.vault.root import ROOT, Root, check_format, decode_root, encode_root
from process_server.vault.store.protocol import Precondition, Store

FORMAT: Final = 1
HOLDERS_MAX: Final = 64
KEYS_BYTES_MAX: Final = 64 * 1024
TRIES_MAX: Final = 16

_STORED: Final = struct.Struct("<16sI32s")

_Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]


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

    def wrap(self, how: "Callable[[Wrapper, bytes], Holder]") -> Holder:
        """Return the master key as ``how`` wraps it for another holder; it goes nowhere else."""
        return how(Wrapper(self.vault_id, self.generation), self._master)

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


class KeysObject(msgspec.Struct, frozen=True):
    """``keys/<vault id>/<generation>``."""

    format: int
    vault: _Id
    generation: int
    holders: Annotated[tuple[Holder, ...], msgspec.Meta(max_length=HOLDERS_MAX)]


Holders: TypeAlias = tuple[Holder, ...]


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
        keys.wrap(lambda wrapper, master: wrapper.for_secret(master, "recovery", recovery.secret)),
        keys.wrap(lambda wrapper, master: wrapper.for_secret(master, "server", server_slot)),
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


def open_vault(store: Store, opener: Opener) -> VaultKeys:
    """Return the keys of the vault in ``store``, by whatever one of its holders is for.

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
    keys = _unwrap(kept, opener)
    decode_root(body, keys.root_key)
    return keys


def add_server_slot(store: Store, keys: VaultKeys, server_slot: bytes) -> None:
    """Let another server open the vault with its slot key (32 bytes); one that can already is left alone.

    Raises:
        Conflict: There are too many holders, or others keep changing them.
    """
    wrapper = Wrapper(keys.vault_id, keys.generation)
    fresh = keys.wrap(lambda wrapper, master: wrapper.for_secret(master, "server", server_slot))

    def add(holders: Holders) -> Holders:
        if any(wrapper.unwrap(holder, server_slot) for holder in holders if holder.kind == "server"):
            return holders
        return (*holders, fresh)

    change_holders(store, keys, add)


def list_holders(store: Store, keys: VaultKeys) -> Holders:
    """Return whom the vault is open to. Raises IntegrityError."""
    return _load_keys(store, keys.vault_id, keys.generation)[0].holders


def change_holders(store: Store, keys: VaultKeys, change: Callable[[Holders], Holders]) -> Holders:
    """Replace the holders by ``change`` of them, atomically, and return what is stored; durable on return.

    Args:
        change: A pure function; called again when another change came first. What it raises is passed on.

    Raises:
        Conflict: There would be too many, or nobody but servers could open the vault; or others keep
            changing them.
        Unreachable: The store did not answer; to repeat it is safe when ``change`` looks at what is there.
    """
    for _ in range(TRIES_MAX):
        kept, etag = _load_keys(store, keys.vault_id, keys.generation)
        holders = change(kept.holders)
        if holders == kept.holders:
            return holders
        if len(holders) > HOLDERS_MAX:
            raise Conflict("cannot add a key", why=f"the vault has {HOLDERS_MAX} keys already")
        if all(holder.kind == "server" for holder in holders):
            raise Conflict(
                "cannot remove the key",
                why="only servers could open the vault then",
                fix="add another one first",
            )
        body = _encode_keys(msgspec.structs.replace(kept, holders=holders))
        try:
            store.cas(keys_name(keys.vault_id, keys.generation), body, etag)
        except Precondition:
            continue
        return holders
    raise Conflict("cannot change the vault's keys", why="others kept changing them", fix="try again")


def keys_name(vault_id: bytes, generation: int) -> str:
    """Return the name of the object that holds a wrapped master key."""
    return f"keys/{id_to_hex(vault_id)}/{generation:020}"


def _unwrap(kept: KeysObject, opener: Opener) -> VaultKeys:
    where = keys_name(kept.vault, kept.generation)
    wrapper = Wrapper(kept.vault, kept.generation)
    for holder in kept.holders:
        try:
            master = wrapper.unwrap(holder, opener)
        except IntegrityError as exc:
            raise IntegrityError(exc.what, where=where) from exc
        if master is not None:
            return VaultKeys(kept.vault, kept.generation, master)
    raise WrongKey(
        "this key does not open the vault",
        where=f"vault {id_to_hex(kept.vault)}",
        why=f"none of its {len(kept.holders)} key slots is for it",
        fix="use this vault's recovery key",
    )


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


def _exists() -> Conflict:
    return Conflict(
        "there is a vault already",
        fix="take it over with `farshore server adopt`, or choose an empty place",
    )
