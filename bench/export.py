"""Claim: `export` gives the first 4 KiB of a 1 TiB volume within a second of the start of its command.

The volume has a million extents from 50,000 commits, made by the real encoders. Measured is the worst moment
that the rule of `map_due` allows: as many commits behind the newest map as there can be, from the start of
the Python process to the answer to a read in a region that none has read, page cache dropped or warm.

    python -m bench.export [--commits N] [--rounds N] [--folder DIR]
"""

import argparse
import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3

from bench.harness import drop_caches, show, spread
from bench.recover import add_chain
from farshore.ids import new_id
from farshore.nbd.client import connect
from farshore.units import KIB, TIB
from process_server.vault.commit import (
    ROW_DTYPE,
    CommitHead,
    CommitVolume,
    Timeline,
    commit_name,
    encode_commit,
)
from process_server.vault.keys import VaultKeys, create_vault
from process_server.vault.map import MAP_COMMITS_MAX, MAP_COMMITS_MIN, write_map
from process_server.vault.pack import PackBuilder
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.store import Store, open_store

SIZE: Final = TIB
ROWS: Final = 20
WRITE_BYTES: Final = 4 * KIB
PACKS: Final = 16
GROUPS: Final = 64
GROUP_WRITES: Final = 32


def make_packs(store: Store, keys: VaultKeys) -> list[bytes]:
    """Store packs of groups of small writes; every row will point into one of them."""
    packs = []
    for _ in range(PACKS):
        builder = PackBuilder(keys)
        packs.append(builder.pack_id)
        for _ in range(GROUPS):
            plain = os.urandom(GROUP_WRITES * WRITE_BYTES // 2) + bytes(GROUP_WRITES * WRITE_BYTES // 2)
            builder.add(keys.chunk_id(blake3(plain).digest()), plain)
        sealed = builder.build()
        sealed.put(store)
        sealed.release()
    return packs


class History:
    """A chain that is made commit by commit, without a sync for each."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(f"file://{folder}", create=True)
        self.recovery_key = RecoveryKey.generate()
        self.keys = create_vault(self.store, self.recovery_key, secrets.token_bytes(32))
        self.machine, self.volume = new_id(), new_id()
        add_chain(self.store, self.keys, self.machine)
        self._folder = folder
        self._packs = make_packs(self.store, self.keys)
        self._random = np.random.default_rng(1)
        self._previous, self._lsn, self.seq = bytes(32), 0, 0
        (folder / commit_name(self.machine, 1)).parent.mkdir(parents=True)

    def extend(self, commits: int) -> None:
        """Add commits of `ROWS` small writes each, all over the volume."""
        for _ in range(commits):
            self.seq += 1
            rows = np.zeros(ROWS, ROW_DTYPE)
            rows["offset"] = self._random.integers(0, SIZE // WRITE_BYTES, ROWS) * WRITE_BYTES
            rows["length"] = WRITE_BYTES
            rows["lsn"] = np.arange(self._lsn + 1, self._lsn + 1 + ROWS)
            rows["time_ns"] = self.seq
            rows["chunk"] = self._random.integers(0, GROUPS)
            rows["start"] = np.arange(ROWS) * WRITE_BYTES
            self._lsn += ROWS
            head = CommitHead(
                machine=self.machine,
                machine_name="bench",
                seq=self.seq,
                kind="data",
                previous=self._previous,
                epoch=1,
                timeline=Timeline(id=bytes(16)),
                writer=bytes(16),
                nonce=new_id(),
                time_ns=time.time_ns(),
                cut_seq=self.seq,
                consistency="crash",
                volumes=(
                    CommitVolume(
                        id=self.volume,
                        name="disk",
                        size_bytes=SIZE,
                        incarnation=bytes(16),
                        ordinal=1,
                        lsn=self._lsn,
                        digest=bytes(32),
                        fuzzy=False,
                        copied=True,
                        copy_end=0,
                    ),
                ),
            )
            pack = self._packs[self.seq % PACKS]
            body = encode_commit(self.keys, head, {self.volume: rows}, [pack])
            # 50,000 syncs are not what is measured here; the object is the same.
            (self._folder / commit_name(self.machine, self.seq)).write_bytes(body)
            self._previous = blake3(body).digest()


async def first_block(command: list[str], socket: Path, offset: int) -> tuple[float, float]:
    """Start the export; return seconds to its ready line and to the first 4 KiB."""
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if json.loads(line or b"{}").get("event") != "ready":
            raise SystemExit("the export did not become ready")
        ready = time.monotonic() - started
        async with connect(socket, "disk") as client:
            await client.read(offset, WRITE_BYTES)
            return ready, time.monotonic() - started
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commits", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    lines: list[str] = []
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="farshore-bench-", dir=options.folder) as name:
        folder = Path(name)
        history = History(folder / "vault")
        key_file, socket = folder / "key", folder / "nbd.sock"
        key_file.touch(mode=0o600)
        key_file.write_text(history.recovery_key.format())
        command = [
            *(sys.executable, "-m", "farshore", "export", "bench", "--volume", "disk", "--point", "latest"),
            *("--nbd", f"unix:{socket}", "--vault", f"file://{folder / 'vault'}"),
            *("--recovery-key-file", str(key_file)),
        ]
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        mapped = options.commits - MAP_COMMITS_MAX + 1
        history.extend(mapped)
        started = time.monotonic()
        made = write_map(history.store, history.keys, history.machine, history.volume, mapped, None)
        figures["map_bytes"], figures["map_seconds"] = made.bytes_total, time.monotonic() - started
        lines.append(
            f"map of {mapped} commits: {made.bytes_total / 1e6:.1f} MB in {time.monotonic() - started:.1f} s"
        )
        for behind in (MAP_COMMITS_MIN - 1, MAP_COMMITS_MAX - 1):
            history.extend(mapped + behind - history.seq)
            for cold in (True, False):
                runs = []
                for number in range(options.rounds):
                    if cold:
                        drop_caches()
                    offset = (number * 2654435761 % (SIZE // WRITE_BYTES)) * WRITE_BYTES
                    runs.append(asyncio.run(first_block(command, socket, offset)))
                label = f"{behind} commits behind the map, {'cold' if cold else 'warm'}"
                lines.append(
                    f"{label}: ready {spread([run[0] for run in runs], 3)} s, "
                    f"first block {spread([run[1] for run in runs], 3)} s"
                )
                figures[label] = runs
    show("export: time to the first block", figures, lines)


if __name__ == "__main__":
    main()
