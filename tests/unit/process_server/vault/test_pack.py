"""Packs: chunks come back as they went in, whatever is read of them, and no damage passes."""

import os
import random
import secrets
import threading

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from farshore.compression import PLAIN, ZSTD, codec
from farshore.errors import IntegrityError, NotFound, Unreachable
from process_server.vault import pack as module
from process_server.vault.keys import VaultKeys
from process_server.vault.pack import (
    CHUNK_BYTES_MAX,
    PackBuilder,
    PackReader,
    SealedPack,
    Stored,
    chunk_id,
    pack_name,
)
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.protocol import AlreadyExists
from tests.fakes.store import Fault, FaultyStore

KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
CHUNKS = [os.urandom(700) * n for n in range(1, 40)] + [os.urandom(5000), b"x"]


def build(chunks: list[bytes], builder: PackBuilder | None = None) -> SealedPack:
    builder = builder or PackBuilder(KEYS)
    for index, chunk in enumerate(chunks):
        assert builder.add(chunk_id(KEYS, blake3(chunk).digest()), memoryview(chunk)) == index
    return builder.build()


def stored(chunks: list[bytes]) -> tuple[FaultyStore, bytes]:
    store = FaultyStore(MemoryStore())
    pack = build(chunks)
    pack.put(store)
    store.calls.clear()
    return store, pack.id


def test_other_frames_of_the_same_chunks_have_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_bytes", lambda length: bytes(length))
    bodies = [b"frame A", b"frame B"]  # as long as each other
    packs = []
    for body in bodies:
        builder = PackBuilder(KEYS)
        builder.add(chunk_id(KEYS, blake3(b"plaintext").digest()), Stored(body, 9, ZSTD))
        packs.append(bytes(builder.build().body))
    salts, commitments = {pack[16:48] for pack in packs}, {pack[80:112] for pack in packs}
    assert len(salts) == 1
    assert len(commitments) == 2


def test_a_chunk_in_its_stored_form_comes_back() -> None:
    store, plain = FaultyStore(MemoryStore()), b"p" * 9000
    frame = codec().shrink(plain)
    assert frame is not None
    builder = PackBuilder(KEYS)
    builder.add(chunk_id(KEYS, blake3(plain).digest()), Stored(frame, len(plain), ZSTD))
    builder.add(chunk_id(KEYS, blake3(b"dense").digest()), Stored(b"dense", 5, PLAIN))
    pack = builder.build()
    assert pack.plain_bytes == 9005
    pack.put(store)
    assert PackReader(store, KEYS).read_chunks(pack.id, (0, 1)) == [plain, b"dense"]


@given(st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=12))
def test_chunks_come_back_as_they_went_in(chunks: list[bytes]) -> None:
    store, id = stored(chunks)
    reader = PackReader(store, KEYS)
    assert reader.read_chunks(id, range(len(chunks))) == chunks
    assert reader.index(id).ids == [chunk_id(KEYS, blake3(chunk).digest()) for chunk in chunks]
    assert reader.index(id).plain_bytes == [len(chunk) for chunk in chunks]


def test_the_builder_says_what_the_object_will_be() -> None:
    builder = PackBuilder(KEYS)
    id = builder.pack_id
    for chunk in CHUNKS:
        builder.add(chunk_id(KEYS, blake3(chunk).digest()), chunk)
    length, plain = builder.stored_bytes, builder.plain_bytes
    assert (builder.count, plain) == (len(CHUNKS), sum(map(len, CHUNKS)))
    pack = builder.build()
    assert (pack.id, len(pack.body), pack.plain_bytes) == (id, length, plain)
    assert (builder.count, builder.plain_bytes) == (0, 0)
    assert builder.pack_id != id


def test_the_callers_buffer_is_free_again_at_once() -> None:
    builder = PackBuilder(KEYS)
    buffer = bytearray(os.urandom(4096))  # does not shrink, so it is stored as it is
    kept = bytes(buffer)
    builder.add(chunk_id(KEYS, blake3(kept).digest()), memoryview(buffer))
    buffer[:] = bytes(4096)
    assert (
        PackReader.from_inline(KEYS, {(pack := builder.build()).id: pack.body}).read_chunk(pack.id, 0) == kept
    )


def test_memory_is_reused_once_released_and_never_before() -> None:
    builder = PackBuilder(KEYS, target_bytes=2**20)
    first = build(CHUNKS, builder)
    kept = bytes(first.body)
    second = build([os.urandom(100)], builder)
    assert bytes(first.body) == kept
    address = first.body.obj
    first.release()
    first.release()
    with pytest.raises(ValueError, match="released"):
        bytes(first.body)
    third = build(CHUNKS, builder)
    assert third.body.obj is address
    assert PackReader.from_inline(KEYS, {third.id: third.body}).read_chunks(third.id, [0, 5]) == [
        CHUNKS[0],
        CHUNKS[5],
    ]
    second.release()
    third.release()


def test_a_builder_tells_when_it_is_full() -> None:
    builder = PackBuilder(KEYS, target_bytes=10_000)
    while not builder.is_full:
        builder.add(bytes(32), os.urandom(999))
    assert 9 <= builder.count <= 10


@pytest.mark.parametrize("length", [0, CHUNK_BYTES_MAX + 1])
def test_chunks_have_a_length(length: int) -> None:
    with pytest.raises(ValueError, match="no chunk"):
        PackBuilder(KEYS).add(bytes(32), bytes(length))


def test_an_empty_pack_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="empty"):
        PackBuilder(KEYS).build()


def test_neighbours_are_read_in_one_request() -> None:
    store, id = stored([os.urandom(50_000) for _ in range(60)])
    reader = PackReader(store, KEYS)
    reader.index(id)
    store.calls.clear()
    reader.read_chunks(id, [3, 5, 4, 40, 41, 59])
    assert [method for method, _ in store.calls] == ["get_range"] * 3


def test_a_run_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RUN_BYTES_MAX", 120_000)
    store, id = stored([os.urandom(50_000) for _ in range(10)])
    reader = PackReader(store, KEYS)
    reader.index(id)
    store.calls.clear()
    reader.read_chunks(id, range(10))
    assert len(store.calls) == 5


def test_what_was_read_is_kept_up_to_a_bound() -> None:
    chunks = [os.urandom(1000) for _ in range(20)]
    store, id = stored(chunks)
    reader = PackReader(store, KEYS, cache_bytes=2 * 6000)
    assert reader.read_chunks(id, range(20)) == chunks
    store.calls.clear()
    assert reader.read_chunk(id, 19) == chunks[19]
    assert store.calls == []
    assert reader.read_chunk(id, 0) == chunks[0]
    assert len(store.calls) == 1


def test_a_chunk_asked_for_twice_is_given_twice() -> None:
    store, id = stored(CHUNKS)
    assert PackReader(store, KEYS).read_chunks(id, [2, 0, 2]) == [CHUNKS[2], CHUNKS[0], CHUNKS[2]]


def test_threads_share_a_reader() -> None:
    store, id = stored(CHUNKS)
    reader = PackReader(store, KEYS, cache_bytes=60_000)
    wrong: list[int] = []

    def read(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(30):
            indexes = draw.choices(range(len(CHUNKS)), k=7)
            if reader.read_chunks(id, indexes) != [CHUNKS[index] for index in indexes]:
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_packs_and_chunks_that_are_not_there() -> None:
    store, id = stored(CHUNKS)
    reader = PackReader(store, KEYS)
    with pytest.raises(NotFound):
        reader.read_chunk(b"n" * 16, 0)
    for index in (-1, len(CHUNKS)):
        with pytest.raises(IntegrityError, match="no section"):
            reader.read_chunk(id, index)
    with pytest.raises(NotFound, match="no such pack in this commit"):
        PackReader.from_inline(KEYS, {}).read_chunk(id, 0)


def test_every_flipped_bit_of_a_pack_is_damage() -> None:
    pack = build([b"a" * 100, os.urandom(40)])
    body = bytes(pack.body)
    for bit in range(8 * len(body)):
        flipped = bytearray(body)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            PackReader.from_inline(KEYS, {pack.id: bytes(flipped)}).read_chunks(pack.id, [0, 1])


def test_a_truncated_pack_is_damage_where_it_is_read() -> None:
    store, id = stored([os.urandom(100_000) for _ in range(3)])
    body, etag = store.get_with_etag(pack_name(id))
    store.cas(pack_name(id), body[:-1], etag)
    reader = PackReader(store, KEYS)
    reader.read_chunks(id, [0, 1])
    with pytest.raises(IntegrityError, match="section 3"):
        reader.read_chunk(id, 2)


def test_a_chunk_that_is_not_what_its_id_says_is_refused() -> None:
    builder = PackBuilder(KEYS)
    builder.add(chunk_id(KEYS, blake3(b"what the agent sent").digest()), b"what was packed")
    pack = builder.build()
    with pytest.raises(IntegrityError, match="not what its id says"):
        PackReader.from_inline(KEYS, {pack.id: pack.body}).read_chunk(pack.id, 0)


def test_a_pack_under_another_packs_id_is_damage() -> None:
    first, second = build([b"1"]), build([b"2"])
    with pytest.raises(IntegrityError):
        PackReader.from_inline(KEYS, {first.id: second.body}).read_chunk(first.id, 0)


def test_a_put_with_a_lost_reply_is_repeated() -> None:
    pack = build(CHUNKS)
    with FaultyStore(MemoryStore(), Fault("put_new", "applied"), Fault("put_new", "refused", hit=2)) as store:
        for _ in range(2):
            with pytest.raises(Unreachable):
                pack.put(store)
        pack.put(store)
        pack.put(store)
    assert PackReader(store, KEYS).read_chunks(pack.id, range(len(CHUNKS))) == CHUNKS


def test_a_pack_never_overwrites_another() -> None:
    pack = build(CHUNKS)
    store = MemoryStore()
    store.put_new(pack.name, b"something else")
    with pytest.raises(AlreadyExists):
        pack.put(store)


def test_chunk_ids_need_the_vaults_key() -> None:
    digest = blake3(b"data").digest()
    other = VaultKeys(b"v" * 16, 1, b"n" * 32)
    assert chunk_id(KEYS, digest) == KEYS.chunk_id(digest) == blake3(digest, key=KEYS.id_key).digest()
    assert chunk_id(KEYS, digest) != chunk_id(other, digest)
