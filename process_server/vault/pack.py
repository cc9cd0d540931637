"""Packs: the objects that hold chunks. One builder per worker; a reader for whoever restores."""

import mmap
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np
from blake3 import blake3

from farshore.compression import Codec
from farshore.errors import IntegrityError, NotFound
from farshore.ids import ID_BYTES, id_to_hex
from farshore.units import KIB, MIB
from process_server.vault.keys import VaultKeys
from process_server.vault.seal import (
    HEADER_BYTES,
    TABLE_DTYPE,
    TAG_BYTES,
    Kind,
    SealedObject,
    Sealer,
    first_section,
)
from process_server.vault.store.protocol import Buffer, Store
from process_server.vault.store.settle import put_same

CHUNK_BYTES_MAX: Final = MIB
PACK_BYTES_MAX: Final = 64 * MIB
PACK_BYTES_TARGET: Final = 16 * MIB
CHUNK_LEVEL: Final = 1
"""zstd level of chunks: 2.4 ns per byte less than the default level, for 4% more stored (PERFORMANCE)."""
GAP_BYTES_MAX: Final = 64 * KIB
"""Chunks this far apart are read in one request: what is read in vain costs less than another request."""
RUN_BYTES_MAX: Final = 8 * MIB
_ROW_BYTES: Final = 48

K = TypeVar("K")
V = TypeVar("V")
_FREE_BUFFERS_MAX: Final = 3


def chunk_id(keys: VaultKeys, digest: bytes) -> bytes:
    """Return the id (32 bytes) of the chunk whose plaintext has this BLAKE3 digest (32 bytes)."""
    return keys.chunk_id(digest)


def pack_name(pack_id: bytes) -> str:
    """Return the object name of a pack."""
    text = id_to_hex(pack_id)
    return f"p/{text[:2]}/{text}"


class Stored(NamedTuple):
    """A chunk in the form that it is stored in; whoever makes one has seen that it holds what its id says.

    Attributes:
        body: Its own copy of the bytes.
        plain_bytes: What they expand to.
        flag: `ZSTD` or `PLAIN` (`farshore.compression`).
    """

    body: bytes
    plain_bytes: int
    flag: int


class SealedPack:
    """A pack, ready to be stored, in memory of its builder.

    Attributes:
        id: The pack's id.
        name: Its object name.
        body: The whole object, in page-aligned memory; use it no more after `release`.
        ids: The chunk ids, in order of their indexes.
        plain_bytes: What the chunks hold, uncompressed.
    """

    __slots__ = ("_give_back", "body", "id", "ids", "name", "plain_bytes")

    def __init__(
        self, id: bytes, body: memoryview, ids: list[bytes], plain_bytes: int, give_back: Callable[[], None]
    ) -> None:
        self.id, self.name, self.body, self.ids, self.plain_bytes = id, pack_name(id), body, ids, plain_bytes
        self._give_back: Callable[[], None] | None = give_back

    def put(self, store: Store) -> None:
        """Store the pack; again, unchanged, after Unreachable. Raises as `put_same`."""
        put_same(store, self.name, self.body)

    def release(self) -> None:
        """Give the memory back to the builder, from any thread. A second call does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            self.body.release()
            give_back()


class PackBuilder:
    """Collects chunks and seals them as a pack. One thread at a time; after `build` it takes the next pack.

    Args:
        keys: Of the vault.
        level: zstd level.
        target_bytes: `is_full` from here on.
    """

    def __init__(
        self, keys: VaultKeys, *, level: int = CHUNK_LEVEL, target_bytes: int = PACK_BYTES_TARGET
    ) -> None:
        if not 0 < target_bytes <= PACK_BYTES_MAX - 2 * CHUNK_BYTES_MAX:
            raise ValueError(f"a pack of {target_bytes} bytes")
        self._keys, self._codec, self._target_bytes = keys, Codec(level), target_bytes
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self.pack_id = secrets.token_bytes(ID_BYTES)
        """Id of the pack being built: what locators of the chunks added will name."""
        self.plain_bytes = 0
        """Plain bytes added."""
        self.stored_bytes = HEADER_BYTES + TAG_BYTES + 8
        """Length that the object would have now."""
        self._ids: list[bytes] = []
        self._bodies: list[bytes] = []
        self._digests: list[bytes] = []
        self._shapes: list[tuple[int, int]] = []

    @property
    def count(self) -> int:
        """Chunks added."""
        return len(self._ids)

    @property
    def is_full(self) -> bool:
        """It is time to `build`."""
        return self.stored_bytes >= self._target_bytes

    def add(self, id: bytes, chunk: Buffer | Stored) -> int:
        """Take a chunk and return its index; a buffer is the caller's again on return.

        Args:
            id: `chunk_id` of the plaintext: recomputed by the caller from these very bytes.
            chunk: The plaintext, 1 byte to 1 MiB, or its stored form.

        Raises:
            IntegrityError: It does not survive compression (see `Codec.compress`).
            ValueError: Too long or empty, or the pack cannot take more.
        """
        length = chunk.plain_bytes if isinstance(chunk, Stored) else len(chunk)
        if not 0 < length <= CHUNK_BYTES_MAX or len(id) != 32:
            raise ValueError(f"no chunk: {length} bytes, id of {len(id)}")
        if self.stored_bytes + CHUNK_BYTES_MAX + _ROW_BYTES + TAG_BYTES > PACK_BYTES_MAX:
            raise ValueError("the pack is full")
        stored = chunk if isinstance(chunk, Stored) else self._compressed(chunk)
        self._ids.append(id)
        self._bodies.append(stored.body)
        # Now, while it lies in the processor's cache. One update() after the other would take three times as
        # long: pieces of odd lengths leave BLAKE3 nothing to do side by side.
        self._digests.append(blake3(stored.body).digest())
        self._shapes.append((length, stored.flag))
        self.plain_bytes += length
        self.stored_bytes += len(stored.body) + TAG_BYTES + _ROW_BYTES
        return len(self._ids) - 1

    def _compressed(self, plain: Buffer) -> Stored:
        body, flag = self._codec.compress(plain)
        return Stored(body if isinstance(body, bytes) else bytes(body), len(plain), flag)

    def build(self) -> SealedPack:
        """Seal what was added, and start the next pack.

        The body lies in memory that is reused once the pack is released; a pack that never is released only
        costs fresh memory for a later one.

        Raises:
            ValueError: Nothing was added.
        """
        count = len(self._ids)
        if not count:
            raise ValueError("an empty pack")
        pack_id, ids, name = self.pack_id, self._ids, pack_name(self.pack_id)
        table = np.zeros(count, TABLE_DTYPE)
        table["id"] = np.frombuffer(b"".join(ids), "V32")
        table["stored"] = [len(body) + TAG_BYTES for body in self._bodies]
        shapes = np.array(self._shapes, np.uint32)
        table["plain"], table["flag"] = shapes[:, 0], shapes[:, 1]
        first = first_section(table, b"")
        # Of the bodies too: one chunk has many compressed forms, and agents choose among them.
        content = blake3(first + b"".join(self._digests)).digest()
        sealer = Sealer.new(self._keys, Kind.PACK, name, content, count + 1, len(first), self._codec.level)
        memory = self._take_memory(self.stored_bytes)
        body = memoryview(memory)[: self.stored_bytes]
        body[:HEADER_BYTES] = sealer.header
        at = HEADER_BYTES + len(first) + TAG_BYTES
        sealer.seal_into(0, first, len(first), bytes(32), body[HEADER_BYTES:at])
        for index, (stored, (plain_bytes, _), id) in enumerate(
            zip(self._bodies, self._shapes, ids, strict=True), start=1
        ):
            end = at + len(stored) + TAG_BYTES
            sealer.seal_into(index, stored, plain_bytes, id, body[at:end])
            at = end
        assert at == self.stored_bytes, "the pack's length was miscounted"
        sealed = SealedPack(pack_id, body, ids, self.plain_bytes, lambda: self._return_memory(memory))
        self._start()
        return sealed

    def _take_memory(self, length: int) -> mmap.mmap:
        with self._lock:
            for index, memory in enumerate(self._free):
                if len(memory) >= length:
                    return self._free.pop(index)
        # One size for all but outliers, so that they can take each other's place.
        return mmap.mmap(-1, max(length, self._target_bytes + 2 * CHUNK_BYTES_MAX))

    def _return_memory(self, memory: mmap.mmap) -> None:
        with self._lock:
            if len(self._free) < _FREE_BUFFERS_MAX:
                self._free.append(memory)


class PackIndex:
    """What a pack holds.

    Attributes:
        ids: Chunk ids, in order.
        plain_bytes: Plain length of each chunk.
        bytes_total: Length of the whole object.
    """

    __slots__ = ("bytes_total", "ids", "plain_bytes", "sealed")

    def __init__(self, sealed: SealedObject) -> None:
        self.sealed = sealed
        raw = sealed.table["id"].tobytes()
        self.ids = [raw[at : at + 32] for at in range(0, len(raw), 32)]
        self.plain_bytes: list[int] = sealed.table["plain"].tolist()
        self.bytes_total = sealed.bytes_total
        if sealed.head or not self.ids or max(self.plain_bytes) > CHUNK_BYTES_MAX:
            raise IntegrityError("not a pack", where=sealed.name, why="a chunk is longer than chunks are")

    def __len__(self) -> int:
        return len(self.ids)


class PackReader:
    """Reads chunks, each authenticated and checked against its id. May be used by several threads.

    Args:
        store: Where the packs lie.
        keys: Of the vault.
        cache_bytes: Bound on the plaintext and the indexes kept, each half.
    """

    def __init__(self, store: Store, keys: VaultKeys, cache_bytes: int = 64 * MIB) -> None:
        self._store: Store | None = store
        self._keys = keys
        self._inline: Mapping[bytes, Buffer] = {}
        self._lock = threading.Lock()
        self._indexes: _Cache[bytes, PackIndex] = _Cache(cache_bytes // 2)
        self._chunks: _Cache[tuple[bytes, int], bytes] = _Cache(cache_bytes // 2)

    @classmethod
    def from_inline(
        cls, keys: VaultKeys, packs: Mapping[bytes, Buffer], cache_bytes: int = 64 * MIB
    ) -> "PackReader":
        """Return a reader of packs that travelled inside a commit: pack id to its bytes, which are kept."""
        reader = cls.__new__(cls)
        reader._store, reader._keys, reader._inline = None, keys, packs
        reader._lock = threading.Lock()
        reader._indexes, reader._chunks = _Cache(cache_bytes // 2), _Cache(cache_bytes // 2)
        return reader

    def index(self, pack_id: bytes) -> PackIndex:
        """Return what the pack holds.

        Raises:
            NotFound: There is no such pack.
            WrongKey, IntegrityError: It is damaged or not one of ours.
        """
        with self._lock:
            found = self._indexes.get(pack_id)
        if found is None:
            found = PackIndex(self._open(pack_id))
            with self._lock:
                # A row costs its 48 bytes, and as Python objects about 110 more.
                self._indexes.put(pack_id, found, 1024 + 160 * len(found))
        return found

    def read_chunk(self, pack_id: bytes, index: int) -> bytes:
        """Return the plaintext of one chunk. Raises as `read_chunks`."""
        return self.read_chunks(pack_id, (index,))[0]

    def read_chunks(self, pack_id: bytes, indexes: Sequence[int]) -> list[bytes]:
        """Return the plaintext of several chunks, in the order asked for; neighbours in one request.

        Raises:
            NotFound: There is no such pack.
            IntegrityError: The pack is damaged, has no such chunk, or the chunk is not what its id says.
            WrongKey: The pack is not one of ours.
        """
        with self._lock:
            kept = {index: self._chunks.get((pack_id, index)) for index in indexes}
        missing = sorted(index for index, plain in kept.items() if plain is None)
        if missing:
            pack = self.index(pack_id)
            for run in _runs(pack.sealed, missing):
                for index, chunk in self._read_run(pack, run):
                    kept[index] = chunk
                    with self._lock:
                        self._chunks.put((pack_id, index), chunk, len(chunk) + 200)
        return [plain for index in indexes if (plain := kept[index]) is not None]

    def _open(self, pack_id: bytes) -> SealedObject:
        name = pack_name(pack_id)
        if self._store is not None:
            return SealedObject.open(self._store, self._keys, Kind.PACK, name)
        body = self._inline.get(pack_id)
        if body is None:
            raise NotFound("no such pack in this commit", where=name)
        return SealedObject.parse(self._keys, Kind.PACK, name, body)

    def _read_run(self, pack: PackIndex, run: list[int]) -> list[tuple[int, bytes]]:
        sealed = pack.sealed
        start = sealed.span(run[0] + 1)[0]
        last_at, last_bytes = sealed.span(run[-1] + 1)
        with memoryview(sealed.fetch(start, last_at + last_bytes - start)) as view:
            read = []
            for index in run:
                at, length = sealed.span(index + 1)
                plain = sealed.section_in(index + 1, view[at - start : at - start + length])
                # The seal proves who wrote it; the id, that it is what was hashed when the agent sent it.
                if self._keys.chunk_id(blake3(plain).digest()) != pack.ids[index]:
                    raise IntegrityError(
                        "a chunk is not what its id says", where=sealed.name, why=f"chunk {index}"
                    )
                read.append((index, plain))
        return read


def _runs(sealed: SealedObject, indexes: Sequence[int]) -> list[list[int]]:
    """Return sorted chunk indexes grouped so that each group is worth one ranged read."""
    runs: list[list[int]] = []
    start = end = 0
    for index in indexes:
        at, length = sealed.span(index + 1)
        if runs and at - end <= GAP_BYTES_MAX and at + length - start <= RUN_BYTES_MAX:
            runs[-1].append(index)
        else:
            runs.append([index])
            start = at
        end = at + length
    return runs


class _Cache(Generic[K, V]):
    """Keeps what was used last, up to a bound in bytes. Its user holds the lock."""

    def __init__(self, bytes_max: int) -> None:
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes_max, self._bytes = bytes_max, 0

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, cost_bytes: int) -> None:
        if cost_bytes > self._bytes_max:
            return
        if old := self._entries.pop(key, None):
            self._bytes -= old[1]
        self._entries[key] = (value, cost_bytes)
        self._bytes += cost_bytes
        while self._bytes > self._bytes_max:
            self._bytes -= self._entries.popitem(last=False)[1][1]
