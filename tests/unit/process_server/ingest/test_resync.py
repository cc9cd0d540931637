"""SAME is said only of blocks that are exactly there."""

import random

import numpy as np
import numpy.typing as npt
import pytest

from process_server.ingest.ipc import OFFER_DTYPE
from process_server.ingest.resync import PACK_ROW, BlockTable
from process_server.vault.commit import ROW_DTYPE, ZEROS

BLOCK, COUNT = 4096, 40


def chunk_id(number: int) -> bytes:
    return number.to_bytes(4, "little") * 8


def lookup(pack: int, chunks: npt.NDArray[np.uint32]) -> npt.NDArray[np.void]:
    found = np.zeros(len(chunks), PACK_ROW)
    found["id"] = np.frombuffer(b"".join(chunk_id(int(chunk)) for chunk in chunks), "V32")
    found["length"] = BLOCK
    return found


@pytest.mark.parametrize("seed", range(30))
def test_the_table_agrees_with_a_byte_by_byte_model(seed: int) -> None:
    rng = random.Random(seed)
    model: list[object] = [0] * (BLOCK // 512 * COUNT)
    table = BlockTable(BLOCK, BLOCK * COUNT)
    for step in range(6):
        rows = np.zeros(rng.randrange(1, 12), ROW_DTYPE)
        for number, row in enumerate(rows):
            chunk = 1 + step * 100 + number
            if rng.random() < 0.6:
                offset, length = rng.randrange(COUNT) * BLOCK, BLOCK
            else:
                offset = rng.randrange(COUNT * 8 - 1) * 512
                length = min(rng.randrange(1, 20) * 512, BLOCK * COUNT - offset)
            zero = rng.random() < 0.3
            row["offset"], row["length"] = offset, length
            row["pack"], row["chunk"] = (ZEROS, 0) if zero else (0, chunk)
            for sector in range(length // 512):
                model[offset // 512 + sector] = 0 if zero else (chunk, sector)
        table.apply(rows, lookup)
    offers = np.zeros(COUNT, OFFER_DTYPE)
    for block in range(COUNT):
        sectors = model[block * 8 : block * 8 + 8]
        offers[block]["offset"], offers[block]["length"] = block * BLOCK, BLOCK
        chunks = {sector[0] for sector in sectors if isinstance(sector, tuple)}
        whole = len(chunks) == 1 and sectors == [(next(iter(chunks)), n) for n in range(8)]
        if whole:
            offers[block]["id"] = np.void(chunk_id(next(iter(chunks))))
        elif any(sectors):
            offers[block]["id"] = np.void(chunk_id(99_999))
    same = table.same(offers)
    for block in range(COUNT):
        sectors = model[block * 8 : block * 8 + 8]
        if same[block]:
            zero = bytes(offers[block]["id"]) == bytes(32)
            assert (not any(sectors)) if zero else all(isinstance(sector, tuple) for sector in sectors)
        assert not (same[block] and bytes(offers[block]["id"]) == chunk_id(99_999))
    # Another block's content, and a block of another length, are never the same.
    wrong = offers.copy()
    wrong["id"] = np.void(chunk_id(77_777))
    assert not table.same(wrong).any()
    short = offers.copy()
    short["length"] = 512
    assert not table.same(short)[[bytes(id) != bytes(32) for id in short["id"]]].any()


def test_beyond_the_size_that_a_volume_once_had_nothing_is_the_same() -> None:
    table = BlockTable(BLOCK, BLOCK * 4)
    rows = np.zeros(4, ROW_DTYPE)
    for number, row in enumerate(rows):
        row["offset"], row["length"], row["chunk"] = number * BLOCK, BLOCK, number + 1
    table.apply(rows, lookup)
    offers = np.zeros(4, OFFER_DTYPE)
    for number, offer in enumerate(offers):
        offer["offset"], offer["length"] = number * BLOCK, BLOCK
        offer["id"] = np.void(chunk_id(number + 1))
    assert table.same(offers).tolist() == [True] * 4
    table.cut_down(BLOCK * 2 + 512)
    assert table.same(offers).tolist() == [True, True, False, False]
    offers["id"] = np.void(bytes(32))
    assert not table.same(offers).any()
    table.apply(rows[3:], lookup)
    offers["id"][3] = np.void(chunk_id(4))
    assert table.same(offers).tolist() == [False, False, False, True]
