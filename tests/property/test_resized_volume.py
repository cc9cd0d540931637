"""A volume that becomes smaller and larger, read back at every point, held against an array."""

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from farshore.units import MIB
from process_server.recovery.image import VolumeImage
from process_server.recovery.points import ChainReader, Cut, Point
from process_server.vault.chain import Chain
from process_server.vault.commit import ROW_DTYPE, ZEROS, CommitVolume
from process_server.vault.keys import VaultKeys
from process_server.vault.map import newest_map, write_map
from process_server.vault.rows import REGION_BYTES
from process_server.vault.store.memory import MemoryStore

KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
MACHINE, VOLUME, SERVER, PACK = b"M" * 16, b"V" * 16, b"s" * 16, b"p" * 16
UNITS_MAX = 3 * REGION_BYTES // MIB

# Size, (offset, length, zeros?) of each record, and is a map written behind it; in MiB. Few places, near the
# edges of regions, so that what was written is often beyond the next size.
_PLACES = st.sampled_from([0, 1, 100, 255, 256, 257, 400, 512, 513, 600, UNITS_MAX - 1])
_RECORD = st.tuples(_PLACES, st.integers(1, UNITS_MAX), st.booleans())
_COMMIT = st.tuples(_PLACES.map(lambda place: place + 1), st.lists(_RECORD, max_size=6), st.booleans())


def painted(image: VolumeImage) -> npt.NDArray[np.int64]:
    """Per MiB of the volume the chunk that lies there, 0 for zeros."""
    units = np.zeros(image.size_bytes // MIB, np.int64)
    for region in image.regions():
        for row in image.rows(region):
            assert row["length"] == MIB
            units[int(row["offset"]) // MIB] = row["chunk"]
    return units


@given(st.lists(_COMMIT, min_size=1, max_size=8))
def test_what_a_volume_lost_when_it_was_smaller_reads_as_zeros(
    drawn: list[tuple[int, list[tuple[int, int, bool]], bool]],
) -> None:
    store = MemoryStore()
    owner = Chain(store, KEYS, MACHINE, SERVER)
    owner.fence(machine_name="web1", time_ns=0)
    model, lsn, states = np.zeros(0, np.int64), 0, {}
    for size, records, mapped in drawn:
        model = np.concatenate((model[:size], np.zeros(max(0, size - len(model)), np.int64)))
        rows = []
        for offset, length, zeros in records:
            if offset >= size:
                continue
            lsn += 1
            length = min(length if zeros else 1, size - offset)
            rows.append(
                (offset * MIB, length * MIB, lsn, 0, ZEROS if zeros else 0, 0 if zeros else lsn, 0, 0)
            )
            model[offset : offset + length] = 0 if zeros else lsn
        entry = CommitVolume(
            id=VOLUME,
            name="data",
            size_bytes=size * MIB,
            incarnation=b"i" * 16,
            ordinal=1,
            lsn=lsn,
            digest=bytes(32),
            fuzzy=False,
            copied=True,
            copy_end=0,
        )
        seq, _ = owner.append(
            machine_name="web1",
            time_ns=0,
            cut_seq=lsn,
            tag=None,
            consistency="crash",
            volumes=[entry],
            rows_by_volume={VOLUME: np.array(rows, ROW_DTYPE)},
            pack_ids=[PACK],
        )
        states[seq] = model.copy()
        if mapped:
            base = newest_map(store, KEYS, MACHINE, VOLUME, seq)
            write_map(store, KEYS, MACHINE, VOLUME, seq, base)
    for seq, expected in states.items():
        chain = ChainReader(store, KEYS, MACHINE)
        image = VolumeImage(chain, Cut(Point(MACHINE, chain.head(seq)), None, False), "data")
        assert (painted(image) == expected).all()
