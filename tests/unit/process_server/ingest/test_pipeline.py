"""What a worker refuses: blocks that are not what their hashes say, gaps, and repeats that are none."""

import random

import msgspec
import numpy as np
import pytest
import zstandard
from blake3 import blake3

from farshore.clock import SystemClock
from farshore.hrl.batch import RECORD, WRITE, RunningDigest, encode_head, padded
from farshore.wire import messages as m
from process_server.ingest import ipc
from process_server.ingest.known import KnownChunks
from process_server.ingest.pipeline import SessionPipeline
from process_server.ingest.stream import Refused
from process_server.vault.dedup import DedupIndex
from process_server.vault.keys import VaultKeys
from process_server.vault.store.memory import MemoryStore
from tests.harness.copies import copied, plaintext

KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
VOLUME, KEY, BLOCK = b"V" * 16, b"k" * 32, 65536


def pipeline() -> SessionPipeline:
    made = SessionPipeline(b"M" * 16, KEYS, chunk_bytes=BLOCK, pack_bytes=1 << 24, level=1)
    made.sizes[VOLUME] = 1 << 20
    made.start(VOLUME, b"i" * 16, KEY, 0, bytes(32))
    return made


def batches(*values: int, chain: RunningDigest | None = None, first_lsn: int = 1) -> list[memoryview]:
    """Batches of one write each, one value per batch, chained one behind the other."""
    chain = chain or RunningDigest(KEY, bytes(32))
    made = []
    for lsn, value in enumerate(values, first_lsn):
        payload = bytes([value]) * 512
        table = RECORD.pack(lsn * 512, 512, WRITE, 0, 0, 512)
        raw = encode_head(chain, lsn, 7, 1, table, payload) + table + payload
        made.append(memoryview(raw.ljust(padded(len(raw)), b"\0")))
    return made


def send(here: SessionPipeline, batch: memoryview, lsn: int) -> list[int]:
    found: list[int] = here.check_data(m.Data(VOLUME, lsn, lsn), batch).rows["lsn"].tolist()
    return found


def test_a_copied_block_is_held_against_its_hash() -> None:
    here, block = pipeline(), b"q" * BLOCK
    chunk = m.CopyChunk(0, BLOCK, m.COPY_DATA, blake3(block).digest())
    assert len(here.check_copy(m.Copy(1, VOLUME, 0, (chunk,)), memoryview(block)).ids) == 1
    with pytest.raises(Refused) as refused:
        here.check_copy(m.Copy(2, VOLUME, 0, (chunk,)), memoryview(b"r" + block[1:]))
    assert refused.value.code == "corrupt"


@pytest.mark.parametrize("compress", [False, True])
def test_a_copied_block_comes_in_any_form(compress: bool) -> None:
    here = pipeline()
    blocks = [b"q" * BLOCK, random.Random(5).randbytes(BLOCK), bytes(BLOCK), b"p" * 512]
    parts = [copied(n * BLOCK, block, compress=compress) for n, block in enumerate(blocks)]
    raw = memoryview(b"".join(body for _, body in parts))
    checked = here.check_copy(m.Copy(1, VOLUME, 0, tuple(chunk for chunk, _ in parts)), raw)
    held = [
        plaintext(piece) if id else bytes(BLOCK)
        for id, piece in zip(checked.ids, checked.pieces, strict=True)
    ]
    assert held == blocks
    assert len(here.finish(checked, [None] * len(checked.ask)).rows) == len(blocks)
    assert here.plain_bytes == 2 * BLOCK + 512


def test_a_frame_is_held_against_the_hash_of_what_it_expands_to() -> None:
    chunk, frame = copied(0, b"q" * BLOCK, compress=True)
    _, other = copied(0, b"r" * BLOCK, compress=True)
    assert len(frame) == len(other)
    _, longer = copied(0, b"q" * BLOCK * 2, compress=True)
    damaged = frame[:-1] + bytes([frame[-1] ^ 1])
    for came in (other, damaged, longer.ljust(len(frame))[: len(frame)]):
        with pytest.raises(Refused) as refused:
            pipeline().check_copy(m.Copy(1, VOLUME, 0, (chunk,)), memoryview(came))
        assert refused.value.code == "corrupt"


def test_a_frame_that_expands_to_more_is_never_unpacked() -> None:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 30))[: BLOCK - 1]
    chunk = m.CopyChunk(0, BLOCK, m.COPY_ZSTD, blake3(b"q").digest(), len(bomb))
    with pytest.raises(Refused, match="does not expand") as refused:
        pipeline().check_copy(m.Copy(1, VOLUME, 0, (chunk,)), memoryview(bomb))
    assert refused.value.code == "corrupt"


@pytest.mark.parametrize("frame_bytes", [-1, 0, 5, BLOCK + 1])
def test_a_frame_of_another_length_than_announced_is_refused(frame_bytes: int) -> None:
    chunk, frame = copied(0, b"q" * BLOCK, compress=True)
    wrong = msgspec.structs.replace(chunk, frame_bytes=frame_bytes)
    with pytest.raises(Refused):
        pipeline().check_copy(m.Copy(1, VOLUME, 0, (wrong,)), memoryview(frame + bytes(2 * BLOCK)))


def test_a_gap_is_refused_and_the_stream_stays_where_it_was() -> None:
    here = pipeline()
    first, second, third = batches(1, 2, 3)
    assert send(here, first, 1) == [1]
    with pytest.raises(Refused) as refused:
        send(here, third, 3)
    assert refused.value.code == "gap"
    assert send(here, second, 2) == [2]
    assert send(here, third, 3) == [3]


def test_a_repeat_has_no_rows() -> None:
    here = pipeline()
    first, second = batches(1, 2)
    for lsn, batch in ((1, first), (2, second)):
        assert send(here, batch, lsn) == [lsn]
    for lsn, batch in ((1, first), (2, second), (1, first)):
        assert send(here, batch, lsn) == []
    assert here.streams[VOLUME].lsn == 2


def test_other_records_under_the_same_lsn_are_no_repeat() -> None:
    here = pipeline()
    first, second = batches(1, 2)
    send(here, first, 1)
    send(here, second, 2)
    (other,) = batches(9)
    with pytest.raises(Refused) as refused:
        send(here, other, 1)
    assert refused.value.code == "conflict"
    assert here.streams[VOLUME].lsn == 2


def test_a_chunk_that_two_bring_at_once_is_stored_by_both_and_later_by_none() -> None:
    """An answer names a pack only when it is stored: nobody's commit waits for another session's pack."""
    known = KnownChunks(MemoryStore(), KEYS, SystemClock(), DedupIndex())
    chunk, frame = copied(0, random.Random(3).randbytes(BLOCK), compress=True)

    def bring(here: SessionPipeline) -> tuple[bytes, ...]:
        checked = here.check_copy(m.Copy(1, VOLUME, 0, (chunk,)), memoryview(frame))
        ids = b"".join(checked.ids[number] for number in checked.ask)
        rows = np.frombuffer(known.locate(here.machine, ids, own=False), ipc.FOUND_DTYPE)
        found = [(bytes(row["pack"]), int(row["chunk"])) if row["found"] else None for row in rows]
        return here.finish(checked, found).packs

    one, two, three = pipeline(), pipeline(), pipeline()
    (first,), (second,) = bring(one), bring(two)
    assert first in one.unstored
    assert second in two.unstored
    assert first != second
    for here, pack in ((two, second), (one, first)):
        here.seal()
        (sealed,) = here.sealed
        assert sealed.id == pack
        known.add(pack, b"".join(sealed.ids), here.machine)
        here.stored(pack)
        sealed.release()
    assert bring(three) == (second,)
    assert not three.unstored
