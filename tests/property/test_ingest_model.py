"""Random journals, copies and cuts against a byte array: what commits say is what the disk was."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from farshore.hrl.batch import (
    MARK,
    RECORD,
    RESIZE,
    WRITE,
    ZERO,
    RunningDigest,
    encode_head,
    first_digest,
    incarnation_key,
    padded,
)
from farshore.units import KIB
from farshore.wire import messages as m
from process_server.ingest.pipeline import SessionPipeline
from process_server.ingest.session import Session
from process_server.ingest.stream import CopiedRows, Position, assemble, merge
from process_server.vault.commit import ROW_DTYPE, ZEROS, Rows
from process_server.vault.keys import VaultKeys
from tests.harness.copies import copied, plaintext

MACHINE, VOLUME, INCARNATION = bytes([1]) * 16, bytes([2]) * 16, bytes([3]) * 16
KEYS = VaultKeys(bytes(16), 1, bytes(32))
KEY = incarnation_key(MACHINE, VOLUME, INCARNATION)
SIZE = 1024 * KIB
BLOCK = 16 * KIB


@dataclass
class Journal:
    """What a tap would write, and the disk beside it."""

    disk: bytearray = field(default_factory=lambda: bytearray(SIZE))
    lsn: int = 0
    chain: RunningDigest = field(
        default_factory=lambda: RunningDigest(KEY, first_digest(KEY, bytes(16), 0, bytes(32)))
    )
    history: dict[int, bytes] = field(default_factory=dict)

    def batch(self, records: list[tuple[int, int, int, bytes]]) -> bytes:
        """Append records (type, offset, length, payload); return the batch's bytes."""
        table, payload = b"", b""
        first = self.lsn + 1
        for kind, offset, length, data in records:
            table += RECORD.pack(offset, length, kind, 0, 0, len(data))
            payload += data
            if kind == WRITE:
                self.disk[offset : offset + length] = data
            elif kind == ZERO:
                self.disk[offset : offset + length] = bytes(length)
            elif kind == RESIZE:
                kept = self.disk[:offset]
                self.disk = kept + bytearray(max(0, offset - len(kept)))
            self.lsn += 1
            self.history[self.lsn] = bytes(self.disk)
        head = encode_head(self.chain, first, 7, len(records), table, payload)
        whole = head + table + payload
        return whole.ljust(padded(len(whole)), b"\0")

    def random_records(self, rng: random.Random, count: int) -> list[tuple[int, int, int, bytes]]:
        records: list[tuple[int, int, int, bytes]] = []
        for _ in range(count):
            offset = rng.randrange(0, SIZE // 512) * 512
            length = min(rng.choice([512, 4096, 4096, 12288, 40960, 81920, 300 * 512]), SIZE - offset)
            kind = rng.choices([WRITE, ZERO, MARK], [10, 2, 1])[0]
            if kind == MARK:
                records.append((MARK, 0, 0, b"cut"))
            elif kind == ZERO:
                records.append((ZERO, offset, length, b""))
            else:
                data = bytes(length) if rng.random() < 0.1 else rng.randbytes(length)
                if rng.random() < 0.3:
                    data = (rng.choice([b"A", b"B"]) * length)[:length]
                records.append((WRITE, offset, length, data))
        return records


class Link:
    def __init__(self) -> None:
        self.sent: list[m.Message] = []

    def send(self, message: m.Message) -> None:
        self.sent.append(message)

    def position(self, volume: bytes, key: bytes, incarnation: bytes, position: Position) -> None:
        self.where = (volume, key, incarnation, position)


def apply(image: bytearray, rows: Rows, packs: list[bytes], plain: dict[tuple[bytes, int], bytes]) -> None:
    for offset, length, _, _, pack, chunk, start, _ in rows.tolist():
        if pack == ZEROS:
            image[offset : offset + length] = bytes(length)
        else:
            data = plain[packs[pack], chunk][start : start + length]
            assert len(data) == length
            image[offset : offset + length] = data


@pytest.mark.parametrize("seed", range(40))
def test_commits_rebuild_every_cut_exactly(seed: int) -> None:
    rng = random.Random(seed)
    journal, link = Journal(), Link()
    pipeline = SessionPipeline(MACHINE, KEYS, chunk_bytes=BLOCK, pack_bytes=2**20, level=1)
    pipeline.sizes[VOLUME] = SIZE
    session = Session(MACHINE, "host", "1", link, 1)
    session.add_volume(m.VolumeHello(VOLUME, "disk", SIZE, 512, "protected", "data"), None)
    session.start(m.IncarnationStart(VOLUME, INCARNATION, 1, bytes(16), 0, bytes(32), 1, False))
    volume, key, incarnation, position = link.where
    pipeline.start(volume, incarnation, key, position.lsn, position.digest)
    plain: dict[tuple[bytes, int], bytes] = {}
    image, token = bytearray(SIZE), 0
    pending: list[tuple[int, int]] = []
    touched: list[tuple[int, int, int]] = []
    cuts = []
    last_cut = 0

    for step in range(30):
        for _ in range(rng.randrange(0, 3)):
            records = journal.random_records(rng, rng.randrange(1, 12))
            first = journal.lsn + 1
            raw = journal.batch(records)
            touched += [
                (first + n, offset, length) for n, (_, offset, length, _) in enumerate(records) if length
            ]
            checked = pipeline.check_data(m.Data(VOLUME, first, journal.lsn), memoryview(raw))
            finished = pipeline.finish(checked, [None] * len(checked.ask))
            for id, piece in zip(checked.ids, checked.pieces, strict=True):
                if id:
                    where = pipeline._recent[id]
                    plain[where] = plaintext(piece)
            rows = np.frombuffer(bytearray(finished.rows.tobytes()), ROW_DTYPE)
            session.packs.adopt(rows, finished.packs)
            stream = session.volumes[VOLUME]
            stream.append(incarnation, checked.first_lsn, rows, checked.batches, checked.tail)
        if rng.random() < 0.5:
            # A copy of what the disk has now; later records until the next cut are cut out or lie over it.
            offset = rng.randrange(0, SIZE // BLOCK) * BLOCK
            length = min(rng.choice([1, 3]) * BLOCK, SIZE - offset)
            token += 1
            data = bytes(journal.disk[offset : offset + length])
            parts = [
                copied(offset + at, data[at : at + BLOCK], compress=rng.random() < 0.5)
                for at in range(0, length, BLOCK)
            ]
            raw = b"".join(body for _, body in parts)
            message = m.Copy(token, VOLUME, journal.lsn, tuple(chunk for chunk, _ in parts))
            copy = pipeline.check_copy(message, memoryview(raw))
            done = pipeline.finish(copy, [None] * len(copy.ask))
            for id, piece in zip(copy.ids, copy.pieces, strict=True):
                if id:
                    plain[pipeline._recent[id]] = plaintext(piece)
            rows = np.frombuffer(bytearray(done.rows.tobytes()), ROW_DTYPE)
            session.packs.adopt(rows, done.packs)
            session.tokens[token] = CopiedRows(VOLUME, journal.lsn, rows)
            pending.append((token, journal.lsn))
        if rng.random() < 0.6:
            named = tuple(
                m.CopyInCut(
                    number,
                    tuple((o, n) for lsn, o, n in touched if applied < lsn <= last_cut),
                )
                for number, applied in pending
            )
            mark = m.Mark(
                step + 1,
                0,
                None,
                (m.VolumeMark(VOLUME, incarnation, journal.lsn, False, True, 0, named),),
            )
            cuts.append((session.mark(mark, 0, 0.0), bytes(journal.disk), bool(named)))
            pending.clear()
            last_cut = journal.lsn
        if cuts and rng.random() < 0.6:
            group = [cuts.pop(0)]
            while cuts and not cuts[0][2] and rng.random() < 0.7:
                group.append(cuts.pop(0))
            volumes = group[0][0].volumes
            for cut, _, _ in group[1:]:
                volumes = merge(volumes, cut.volumes)
            tables, packs = assemble(volumes, session.packs.ids)
            rows = tables[VOLUME]
            assert (rows["lsn"][1:] >= rows["lsn"][:-1]).all()
            apply(image, rows, packs, plain)
            assert image == group[-1][1], f"seed {seed}, step {step}"
