"""The sealed object: a header, then sections that are each compressed and authenticated on their own.

Whatever is read is authenticated before it is decompressed or parsed, and a section can be fetched alone.
"""

import hmac
import secrets
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import accumulate
from typing import Final

import numpy as np
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from farshore.compression import LEVEL, PLAIN, ZSTD_VERSION, codec
from farshore.errors import IntegrityError, WrongKey
from farshore.units import MIB
from process_server.vault.keys import VaultKeys
from process_server.vault.root import newer_format
from process_server.vault.store.protocol import Buffer, Store

MAGIC: Final = b"FARSHSEA"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sHHI32s32s32sIIIHh")
HEADER_BYTES: Final = 128
ROW_BYTES: Final = 48
TAG_BYTES: Final = 16
SECTION_BYTES_MAX: Final = 64 * MIB
"""Plain and stored: bounds what one section can make a reader allocate."""
SECTIONS_MAX: Final = 2**20

TABLE_DTYPE: Final = np.dtype(
    [("id", "V32"), ("stored", "<u4"), ("plain", "<u4"), ("flag", "<u4"), ("zero", "<u4")]
)
_PREFACE: Final = struct.Struct("<II")
_CONTEXT: Final = struct.Struct("<III32s")
_FIRST_READ_BYTES: Final = 64 * 1024
_NO_ID: Final = bytes(32)


class Kind(IntEnum):
    """What an object is; part of its key, so that none is taken for another."""

    PACK = 1
    COMMIT = 2
    MAP = 3
    CONTROL = 4


class Sealer:
    """The key of one object and the header that goes with it; encrypts or decrypts its sections.

    Made by `new` for an object to write, by `parse` for one to read.
    """

    def __init__(self, keys: VaultKeys, name: str, header: bytes, key: bytes) -> None:
        self.header = header
        self._aes = AESGCM(key)
        encoded = name.encode("ascii")
        self._aad = header + keys.vault_id + len(encoded).to_bytes(2, "little") + encoded

    @classmethod
    def new(
        cls, keys: VaultKeys, kind: Kind, name: str, digest: bytes, count: int, first_bytes: int, level: int
    ) -> "Sealer":
        """Return the sealer of a new object.

        Args:
            keys: Of the vault.
            kind: Of the object.
            name: The object's name.
            digest: The content digest: keeps a cloned host that draws our salt from reusing the key.
            count: Sections, the first included.
            first_bytes: Plain length of section 0.
            level: zstd level that the sections were compressed with.
        """
        salt = secrets.token_bytes(32)
        fixed = struct.pack("<HHI", VERSION, kind, keys.generation)
        last = struct.pack("<IHh", keys.key_check, _zstd_version(), level)
        key, tag = _object_key(keys, name, salt, digest, fixed[:4] + last[4:])
        lengths = struct.pack("<II", count, first_bytes + TAG_BYTES)
        return cls(keys, name, MAGIC + fixed + salt + digest + tag + lengths + last, key)

    @classmethod
    def parse(cls, keys: VaultKeys, kind: Kind, name: str, head: Buffer) -> "Sealer":
        """Return the sealer for an object that begins with ``head``.

        Raises:
            WrongKey: Sealed for another vault or key generation.
            IntegrityError: Damaged, another object under this name, or of a newer format.
        """
        header = bytes(head[:HEADER_BYTES])
        if len(header) < HEADER_BYTES:
            raise _damaged(name, f"{len(header)} bytes are less than a header")
        (magic, version, found, generation, salt, digest, tag, count, first, check, _, _) = HEADER.unpack(
            header
        )
        if magic != MAGIC:
            raise _damaged(name, "it is not a sealed object")
        if version != VERSION:
            raise newer_format(name, version)
        key, expected = _object_key(keys, name, salt, digest, header[8:12] + header[124:128])
        if not hmac.compare_digest(tag, expected):
            if check != keys.key_check:
                raise WrongKey(
                    "the object is sealed for another key",
                    where=name,
                    why=f"key generation {generation} of some vault, and we have {keys.generation} of ours",
                )
            raise _damaged(name, "its key commitment does not match: damaged, or another object's bytes")
        if found != kind:
            raise _damaged(name, f"it is of kind {found}, not {kind.value}")
        if not 1 <= count <= SECTIONS_MAX + 1 or first > SECTION_BYTES_MAX + TAG_BYTES:
            raise _damaged(name, f"{count} sections, the first of {first} bytes")
        if first < TAG_BYTES + _PREFACE.size + ROW_BYTES * (count - 1):
            raise _damaged(name, f"its first section of {first} bytes has no room for {count} sections")
        return cls(keys, name, header, key)

    def seal_into(self, index: int, stored: Buffer, plain_bytes: int, id: bytes, target: memoryview) -> None:
        """Encrypt section ``index`` into ``target``, which has exactly ``len(stored) + 16`` bytes."""
        aad = self._aad + _CONTEXT.pack(index, len(stored) + TAG_BYTES, plain_bytes, id)
        self._aes.encrypt_into(index.to_bytes(12, "little"), stored, aad, target)

    def open(self, index: int, sealed: Buffer, plain_bytes: int, id: bytes, name: str) -> bytes:
        """Return what section ``index`` stores, authenticated. Raises IntegrityError."""
        aad = self._aad + _CONTEXT.pack(index, len(sealed), plain_bytes, id)
        try:
            return self._aes.decrypt(index.to_bytes(12, "little"), sealed, aad)
        except InvalidTag:
            raise _damaged(name, f"section {index} does not authenticate") from None


def seal(
    keys: VaultKeys,
    kind: Kind,
    name: str,
    head: bytes,
    sections: Sequence[Buffer] = (),
    *,
    compress: Sequence[bool] | None = None,
) -> bytes:
    """Return the sealed object: a commit, map or control object. Packs have `PackBuilder`.

    Args:
        keys: Of the vault.
        kind: Of the object.
        name: The name it will be stored under; it opens under no other.
        head: Goes to section 0 as it is; anything, by convention MessagePack.
        sections: The others, from number 1, at most `SECTION_BYTES_MAX` each.
        compress: Whether to try zstd, per section; all of them by default. What does not shrink is kept.
    """
    wanted = compress if compress is not None else [True] * len(sections)
    shared = codec()
    stored: list[Buffer] = []
    table = np.zeros(len(sections), TABLE_DTYPE)
    for index, (plain, squeeze) in enumerate(zip(sections, wanted, strict=True)):
        if len(plain) > SECTION_BYTES_MAX:
            raise ValueError(f"a section of {len(plain)} bytes")
        body, flag = shared.compress(plain) if squeeze else (plain, PLAIN)
        stored.append(body)
        table[index] = (_NO_ID, len(body) + TAG_BYTES, len(plain), flag, 0)
    first = first_section(table, head)
    if len(first) > SECTION_BYTES_MAX or len(sections) > SECTIONS_MAX:
        raise ValueError(f"a first section of {len(first)} bytes for {len(sections)} others")
    hasher = blake3(first)
    for body in stored:
        hasher.update(body)
    sealer = Sealer.new(keys, kind, name, hasher.digest(), len(sections) + 1, len(first), LEVEL)
    output = bytearray(HEADER_BYTES + sum(len(body) + TAG_BYTES for body in (first, *stored)))
    output[:HEADER_BYTES] = sealer.header
    at = HEADER_BYTES
    with memoryview(output) as view:
        for index, body in enumerate((first, *stored)):
            plain_bytes = len(sections[index - 1]) if index else len(first)
            with view[at : at + len(body) + TAG_BYTES] as target:
                sealer.seal_into(index, body, plain_bytes, _NO_ID, target)
            at += len(body) + TAG_BYTES
    return bytes(output)


class SealedObject:
    """A sealed object to read from: its head at once, its sections one by one.

    Attributes:
        name: The object's name.
        head: The head, authenticated.
        header_digest: As `header_digest` of its bytes.
        table: Rows of `TABLE_DTYPE`, one for each section from 1.
        bytes_total: Length of the whole object, as its table says.
    """

    def __init__(
        self, keys: VaultKeys, kind: Kind, name: str, fetch: Callable[[int, int], Buffer], start: Buffer
    ) -> None:
        self.name = name
        self.fetch = fetch
        """Reads bytes of the object as stored: first byte, length."""
        self._sealer = Sealer.parse(keys, kind, name, start)
        self.header_digest = header_digest(self._sealer.header)
        count, first_bytes = struct.unpack_from("<II", self._sealer.header, 112)
        end = HEADER_BYTES + first_bytes
        sealed = memoryview(start)[HEADER_BYTES:end]
        if len(sealed) < first_bytes:
            rest = fetch(HEADER_BYTES + len(sealed), first_bytes - len(sealed))
            sealed = memoryview(b"".join((sealed, rest)))
        first = self._sealer.open(0, sealed, first_bytes - TAG_BYTES, _NO_ID, name)
        rows, head_bytes = _PREFACE.unpack_from(first)
        table_end = _PREFACE.size + ROW_BYTES * rows
        if rows != count - 1 or table_end + head_bytes != len(first):
            raise _damaged(name, f"{rows} rows and a head of {head_bytes} bytes in {len(first)}")
        self.table = np.frombuffer(first, TABLE_DTYPE, rows, _PREFACE.size)
        self.head = first[table_end:]
        # Python integers: numpy's would wrap at what a hostile table could claim.
        self._ends = list(accumulate(self.table["stored"].tolist(), initial=end))
        self.bytes_total = self._ends[-1]

    @classmethod
    def open(cls, store: Store, keys: VaultKeys, kind: Kind, name: str) -> "SealedObject":
        """Read header and section 0 from ``store``: one request, or two when there are many sections.

        Raises:
            NotFound: There is no such object.
            WrongKey, IntegrityError: As `Sealer.parse`.
        """

        def fetch(at: int, length: int) -> bytes:
            return store.get_range(name, at, length)

        return cls(keys, kind, name, fetch, fetch(0, _FIRST_READ_BYTES))

    @classmethod
    def parse(cls, keys: VaultKeys, kind: Kind, name: str, body: Buffer) -> "SealedObject":
        """Take the whole object from ``body``, which is kept. Raises WrongKey, IntegrityError."""
        view = memoryview(body)
        found = cls(keys, kind, name, lambda at, length: view[at : at + length], view)
        if found.bytes_total != len(view):
            raise _damaged(name, f"{len(view)} bytes, and its table says {found.bytes_total}")
        return found

    def __len__(self) -> int:
        """Return how many sections there are from 1 on."""
        return len(self.table)

    def section(self, index: int) -> bytes:
        """Return the plaintext of section ``index``, from 1: one ranged read.

        Raises:
            IntegrityError: Damaged, or there is no such section.
        """
        return self.section_in(index, self.fetch(*self.span(index)))

    def span(self, index: int) -> tuple[int, int]:
        """Return where section ``index`` lies: first byte and stored length. Raises IntegrityError."""
        if not 1 <= index <= len(self.table):
            raise _damaged(self.name, f"it has no section {index}")
        return self._ends[index - 1], self._ends[index] - self._ends[index - 1]

    def section_in(self, index: int, sealed: Buffer) -> bytes:
        """Return the plaintext of section ``index``, given its stored bytes. Raises IntegrityError."""
        id, stored_bytes, plain_bytes, flag, _ = self.table[index - 1].item()
        if len(sealed) != stored_bytes or plain_bytes > SECTION_BYTES_MAX:
            raise _damaged(self.name, f"section {index} has {len(sealed)} of {stored_bytes} bytes")
        stored = self._sealer.open(index, sealed, plain_bytes, bytes(id), self.name)
        return codec().expand(stored, plain_bytes, flag, self.name)


def header_digest(start: Buffer) -> bytes:
    """Return BLAKE3 of the header of an object that begins with ``start``: which object this is.

    Salt and content digest stand in it and all of it is authenticated with every section, so no two objects
    share one: it tells them apart for 128 bytes, where a digest of the whole takes all of them.
    """
    return blake3(memoryview(start)[:HEADER_BYTES]).digest()


def first_section(table: "np.ndarray[tuple[int], np.dtype[np.void]]", head: bytes) -> bytes:
    """Return the plaintext of section 0."""
    return _PREFACE.pack(len(table), len(head)) + table.tobytes() + head


def _object_key(
    keys: VaultKeys, name: str, salt: bytes, digest: bytes, header_parts: bytes
) -> tuple[bytes, bytes]:
    info = b"farshore object 1" + keys.vault_id + header_parts + name.encode("ascii")
    both = HKDF(algorithm=SHA256(), length=64, salt=salt + digest, info=info).derive(keys.seal_key)
    return both[:32], both[32:]


def _zstd_version() -> int:
    major, minor, release = ZSTD_VERSION
    return int(major * 10_000 + minor * 100 + release)


def _damaged(name: str, why: str) -> IntegrityError:
    return IntegrityError("cannot read the sealed object", where=name, why=why)
