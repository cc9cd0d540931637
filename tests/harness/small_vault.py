"""A vault in a directory, written by the real encoders, beside the bytes that it should give back."""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from blake3 import blake3

from farshore.ids import new_id
from process_server.vault.commit import (
    ROW_DTYPE,
    ZEROS,
    CommitHead,
    CommitVolume,
    Timeline,
    commit_name,
    encode_commit,
)
from process_server.vault.keys import VaultKeys, create_vault
from process_server.vault.pack import PackBuilder
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.root import ROOT, Root, decode_root, encode_root
from process_server.vault.seal import header_digest
from process_server.vault.store import Store, open_store

SECTOR = 512
START_NS = 1_763_000_000_000_000_000


@dataclass
class SmallVolume:
    """A volume and its states: ``states[lsn]`` is what it held when that record had been applied."""

    name: str
    size_bytes: int
    id: bytes = field(default_factory=new_id)
    lsn: int = 0
    fuzzy: bool = False
    copy_end: int = 0

    def __post_init__(self) -> None:
        self.content = bytearray(self.size_bytes)
        self.states: dict[int, bytes] = {0: bytes(self.content)}
        self.pending: list[tuple[int, int, int, bytes | None]] = []

    def write(self, offset: int, data: bytes) -> None:
        """Write, as one record."""
        self.lsn += 1
        self.content[offset : offset + len(data)] = data
        self.pending.append((offset, len(data), self.lsn, data))
        self.states[self.lsn] = bytes(self.content)

    def zero(self, offset: int, length: int) -> None:
        """Make a range zeros, as one record."""
        self.lsn += 1
        self.content[offset : offset + length] = bytes(length)
        self.pending.append((offset, length, self.lsn, None))
        self.states[self.lsn] = bytes(self.content)

    def copy(self, offset: int, data: bytes) -> None:
        """Take an extent into the stream as the first copy does; before any write of the same commit."""
        self.content[offset : offset + len(data)] = data
        self.pending.append((offset, len(data), 0, data))
        self.states[self.lsn] = bytes(self.content)


class SmallVault:
    """One machine, any volumes. Every commit ends at a cut one second after the one before."""

    def __init__(self, folder: Path, *volumes: SmallVolume, machine_name: str = "web1") -> None:
        self.folder, self.url = folder, f"file://{folder}"
        self.machine, self.machine_name, self.volumes = new_id(), machine_name, list(volumes)
        self.store: Store = open_store(self.url, create=True)
        self.recovery_key = RecoveryKey.generate()
        self.keys: VaultKeys = create_vault(self.store, self.recovery_key, os.urandom(32))
        self.key_file = folder.with_suffix(".key")
        self.key_file.touch(mode=0o600)
        self.key_file.write_text(self.recovery_key.format() + "\n")
        self.seq, self.epoch, self._digest, self._header_digest = 0, 1, bytes(32), bytes(32)
        self._history = [self._state()]
        self.timeline = Timeline(id=new_id())
        self.packs: list[bytes] = []
        self._register()

    def _register(self) -> None:
        body, etag = self.store.get_with_etag(ROOT)
        root = decode_root(body, self.keys.root_key)
        chains = (*root.chains, self.machine)
        changed = Root(vault=root.vault, key_generation=root.key_generation, chains=chains)
        self.store.cas(ROOT, encode_root(changed, self.keys.root_key), etag)

    def commit(self, *, tag: str | None = None, inline: bool = False, groups: int = 1) -> int:
        """Store what is pending as one commit, its data in one pack; return its number.

        Args:
            inline: The pack travels inside of the commit.
            groups: So many neighbouring small writes share a chunk.
        """
        builder = PackBuilder(self.keys)
        pack_id = builder.pack_id
        tables = {}
        for volume in self.volumes:
            rows = np.zeros(len(volume.pending), ROW_DTYPE)
            waiting: list[tuple[int, bytes]] = []

            def store(rows: np.ndarray, waiting: list[tuple[int, bytes]]) -> None:
                plain = b"".join(data for _, data in waiting)
                if not plain:
                    return
                chunk = builder.add(self.keys.chunk_id(blake3(plain).digest()), plain)
                start = 0
                for index, data in waiting:
                    rows[index]["chunk"], rows[index]["start"] = chunk, start
                    start += len(data)
                waiting.clear()

            for index, (offset, length, lsn, data) in enumerate(
                sorted(volume.pending, key=lambda each: each[2])
            ):
                time_ns = START_NS + self.seq if lsn else 0
                rows[index] = (offset, length, lsn, time_ns, ZEROS if data is None else 0, 0, 0, 0)
                if data is not None:
                    waiting.append((index, data))
                if len(waiting) >= groups or sum(len(each) for _, each in waiting) > 512 * 1024:
                    store(rows, waiting)
            store(rows, waiting)
            tables[volume.id] = rows
            volume.pending.clear()
        packs: list[bytes] = []
        carried: dict[bytes, bytes] = {}
        if builder.count:
            packs.append(pack_id)
            sealed = builder.build()
            if inline:
                carried[pack_id] = bytes(sealed.body)
            else:
                sealed.put(self.store)
                self.packs.append(pack_id)
            sealed.release()
        return self._append(tables, packs, carried, kind="data", tag=tag)

    def fence(self) -> int:
        """Store a change of owner; return its number."""
        self.epoch += 1
        return self._append({}, [], {}, kind="fence", tag=None)

    def roll_back(self, seq: int) -> dict[str, bytes]:
        """Take away the commits and maps after ``seq``, as if they had never been; return what they were."""
        taken = {}
        names = [*self.store.list("c/"), *self.store.list("m/")]
        for name in (name for name in names if int(name.rpartition("/")[2]) > seq):
            taken[name] = self.store.get(name)
            (self.folder / name).unlink()
        del self._history[seq + 1 :]
        self.seq, self.epoch, self._digest, self._header_digest, volumes = self._history[seq]
        for volume, (lsn, content) in zip(self.volumes, volumes, strict=True):
            volume.lsn, volume.content = lsn, bytearray(content)
        return taken

    def put_back(self, name: str, body: bytes) -> None:
        """Store an object whatever has its name, as whoever holds the disk of the vault can."""
        (self.folder / name).write_bytes(body)

    def _state(self) -> tuple[int, int, bytes, bytes, list[tuple[int, bytes]]]:
        volumes = [(volume.lsn, bytes(volume.content)) for volume in self.volumes]
        return self.seq, self.epoch, self._digest, self._header_digest, volumes

    def _append(
        self,
        tables: dict[bytes, np.ndarray],
        packs: list[bytes],
        carried: dict[bytes, bytes],
        *,
        kind: str,
        tag: str | None,
    ) -> int:
        self.seq += 1
        fuzzy = any(volume.fuzzy for volume in self.volumes)
        head = CommitHead(
            machine=self.machine,
            machine_name=self.machine_name,
            seq=self.seq,
            kind="data" if kind == "data" else "fence",
            previous=self._digest,
            previous_header=self._header_digest,
            epoch=self.epoch,
            timeline=self.timeline,
            writer=bytes(16),
            nonce=new_id(),
            time_ns=self.time_ns(self.seq),
            cut_seq=self.seq if kind == "data" else None,
            tag=tag,
            consistency="fuzzy" if fuzzy or kind == "fence" else "crash",
            volumes=tuple(
                CommitVolume(
                    id=volume.id,
                    name=volume.name,
                    size_bytes=volume.size_bytes,
                    incarnation=bytes(16),
                    ordinal=1,
                    lsn=volume.lsn,
                    digest=bytes(32),
                    fuzzy=volume.fuzzy,
                    copied=not volume.fuzzy,
                    copy_end=volume.copy_end,
                )
                for volume in self.volumes
            ),
        )
        body = encode_commit(self.keys, head, tables, packs, carried)
        self.store.put_new(commit_name(self.machine, self.seq), body)
        self._digest, self._header_digest = blake3(body).digest(), header_digest(body)
        self._history.append(self._state())
        return self.seq

    @staticmethod
    def time_ns(seq: int) -> int:
        """Return the server's time of a commit."""
        return START_NS + seq * 1_000_000_000


def scribble(volume: SmallVolume, random_: random.Random, count: int) -> None:
    """Write ``count`` random records: small and large, overlapping, some of zeros."""
    sectors = volume.size_bytes // SECTOR
    for _ in range(count):
        length = min(random_.choice((1, 8, 8, 8, 64, 256)), sectors)
        offset = random_.randrange(sectors - length + 1) * SECTOR
        if random_.random() < 0.15:
            volume.zero(offset, length * SECTOR)
        else:
            volume.write(offset, random_.randbytes(length * SECTOR // 2) * 2)
