"""What a worker refuses: blocks that are not what their hashes say, gaps, and repeats that are none."""

import pytest
from blake3 import blake3

from farshore.hrl.batch import RECORD, WRITE, RunningDigest, encode_head, padded
from farshore.wire import messages as m
from process_server.ingest.pipeline import SessionPipeline
from process_server.ingest.stream import Refused
from process_server.vault.keys import VaultKeys

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
