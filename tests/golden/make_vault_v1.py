"""Made ``vault-v1`` once. Run again it makes another vault of the same content: salts and ids are random.

python3 -m tests.golden.make_vault_v1 DIRECTORY

Never replace the vault that is there: it stands for those that people have.
"""

import json
import sys
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3

from process_server.vault.chain import Chain
from process_server.vault.commit import ROW_DTYPE, ZEROS, CommitVolume, Rows, Timeline
from process_server.vault.control import ControlStore, Machine
from process_server.vault.keys import create_vault
from process_server.vault.pack import PackBuilder
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.store import open_store

MACHINE, VOLUME, SERVER = b"golden machine 1", b"golden volume  1", b"golden server  1"
RECOVERY, SLOT = RecoveryKey(bytes(range(32))), bytes(range(32, 64))
SIZE = 1024 * 1024


def content(number: int, length: int) -> bytes:
    """Return data of its own for each number; half of it can be compressed."""
    return blake3(b"golden %d" % number).digest(length=length // 2) + bytes([number]) * (length - length // 2)


def rows(*values: tuple[int, int, int, int, int, int]) -> Rows:
    """offset, length, lsn, pack, chunk, start"""
    table = np.zeros(len(values), ROW_DTYPE)
    for index, (offset, length, lsn, pack, chunk, start) in enumerate(values):
        table[index] = (offset, length, lsn, 1_700_000_000_000_000_000 + lsn, pack, chunk, start, 0)
    return table


def main(target: Path) -> None:
    store = open_store(f"file://{target.resolve()}", owner=True, create=True)
    keys = create_vault(store, RECOVERY, SLOT)
    machine = Machine(id=MACHINE, name="golden", public_key=b"none", created_ns=1_700_000_000_000_000_000)
    ControlStore(store, keys).update(lambda now: msgspec.structs.replace(now, machines=(machine,)))
    builder = PackBuilder(keys)

    def chunk(number: int, length: int) -> int:
        data = content(number, length)
        return builder.add(keys.chunk_id(blake3(data).digest()), data)

    def volume(lsn: int, *, copied: bool) -> CommitVolume:
        return CommitVolume(
            id=VOLUME,
            name="data",
            size_bytes=SIZE,
            incarnation=b"golden incarn. 1" if lsn else bytes(16),
            ordinal=1 if lsn else 0,
            lsn=lsn,
            digest=bytes([lsn]) * 32,
            fuzzy=not copied,
            copied=copied,
            copy_end=0,
        )

    image = bytearray(SIZE)
    digests = {}
    chain = Chain(store, keys, MACHINE, SERVER)
    chain.fence(machine_name="golden", time_ns=1, timeline=Timeline(id=b"golden timeline1"))

    for number, place in enumerate((0, 65_536, 524_288)):
        chunk(number, 65_536)
        image[place : place + 65_536] = content(number, 65_536)
    pack = builder.build()
    pack.put(store)
    first = rows((0, 65_536, 0, 0, 0, 0), (65_536, 65_536, 0, 0, 1, 0), (524_288, 65_536, 0, 0, 2, 0))
    first["time_ns"] = 0
    seq, _ = chain.append(
        machine_name="golden",
        tag=None,
        time_ns=2,
        cut_seq=1,
        consistency="fuzzy",
        volumes=[volume(0, copied=True)],
        rows_by_volume={VOLUME: first},
        pack_ids=[pack.id],
    )
    digests[seq] = blake3(image).hexdigest()

    chunk(10, 4096)
    chunk(11, 8192)
    inline = builder.build()
    second = rows(
        (4096, 4096, 1, 0, 0, 0),  # over copied data
        (61_440, 8192, 2, 0, 1, 0),  # across two chunks
        (65_536, 4096, 3, ZEROS, 0, 0),  # a discard over half of it
        (8192, 512, 4, 1, 2, 1024),  # a part of a chunk that was there
    )
    image[4096:8192] = content(10, 4096)
    image[61_440:69_632] = content(11, 8192)
    image[65_536:69_632] = bytes(4096)
    image[8192:8704] = content(2, 65_536)[1024:1536]
    seq, _ = chain.append(
        machine_name="golden",
        tag=None,
        time_ns=3,
        cut_seq=2,
        consistency="crash",
        volumes=[volume(4, copied=True)],
        rows_by_volume={VOLUME: second},
        pack_ids=[inline.id, pack.id],
        inline_packs={inline.id: inline.body},
    )
    digests[seq] = blake3(image).hexdigest()

    chain.fence(machine_name="golden", time_ns=4)
    image[-512:] = bytes(512)
    seq, _ = chain.append(
        machine_name="golden",
        tag="the end",
        time_ns=5,
        cut_seq=3,
        consistency="app",
        volumes=[volume(5, copied=True)],
        rows_by_volume={VOLUME: rows((SIZE - 512, 512, 5, ZEROS, 0, 0))},
    )
    digests[seq] = blake3(image).hexdigest()
    objects = "".join(blake3(store.get(name)).hexdigest() for name in sorted(store.list("")))
    store.close()
    for lock in (".owner", ".lock"):
        (target / lock).unlink()
    (target / ".tmp").rmdir()
    expected = {
        "recovery_key": RECOVERY.format(),
        "server_slot": SLOT.hex(),
        "volume_at": digests,
        "objects": blake3(objects.encode()).hexdigest(length=8),
    }
    target.with_suffix(".json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
