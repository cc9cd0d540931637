"""Claim: `recover` writes a volume to a raw file at least 1.5 times as fast as the better of restic and borg.

The same image goes into a vault (through the real encoders), a restic and a borg repository, each with
compression and encryption as they come. Then each writes it back to the same file system, in turns, with the
page cache dropped before each run. "durable" adds a sync of the file system, which `recover` has done itself.

    python -m bench.recover [--image FILE | --gib N] [--rounds N] [--folder DIR]
"""

import argparse
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from blake3 import blake3

from bench.harness import drop_caches, show, spread, version_of
from farshore.ids import new_id
from farshore.units import GIB, MIB
from process_server.config import IngestConfig
from process_server.vault.commit import (
    ROW_DTYPE,
    ZEROS,
    CommitHead,
    CommitVolume,
    Rows,
    Timeline,
    commit_name,
    encode_commit,
)
from process_server.vault.keys import VaultKeys, create_vault
from process_server.vault.map import write_map
from process_server.vault.pack import PackBuilder
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.root import ROOT, decode_root, encode_root
from process_server.vault.store import Store, open_store

CHUNK_BYTES: Final = IngestConfig().chunk_bytes
COMMIT_BYTES: Final = 256 * MIB
_PASSWORD: Final = "for this run only"


def make_image(path: Path, size_bytes: int) -> None:
    """An ext4 file system with what this host has installed, as large as asked for."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    # mke2fs stops when it is full: which files are in it does not matter, only that they are real ones.
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", "/usr", path], check=False, capture_output=True)


def add_chain(store: Store, keys: VaultKeys, machine: bytes) -> None:
    """Enter a machine in the root, as the server does at its first commit."""
    import msgspec

    body, etag = store.get_with_etag(ROOT)
    root = decode_root(body, keys.root_key)
    changed = msgspec.structs.replace(root, chains=(*root.chains, machine))
    store.cas(ROOT, encode_root(changed, keys.root_key), etag)


def make_vault(folder: Path, image: Path) -> Path:
    """Put the image into a new vault as a first copy; return the file with its recovery key."""
    store = open_store(f"file://{folder}", create=True)
    recovery = RecoveryKey.generate()
    keys = create_vault(store, recovery, secrets.token_bytes(32))
    key_file = folder.with_suffix(".key")
    key_file.touch(mode=0o600)
    key_file.write_text(recovery.format())
    machine, volume, size = new_id(), new_id(), image.stat().st_size
    add_chain(store, keys, machine)
    known: dict[bytes, tuple[bytes, int]] = {}
    builder = PackBuilder(keys)
    previous, seq = bytes(32), 0
    with image.open("rb") as file:
        for begin in range(0, size, COMMIT_BYTES):
            packs: list[bytes] = []
            rows: list[tuple[int, ...]] = []
            numbers: dict[bytes, int] = {}
            for at in range(begin, min(begin + COMMIT_BYTES, size), CHUNK_BYTES):
                plain = file.read(CHUNK_BYTES)
                if not plain.strip(b"\0"):
                    rows.append((at, len(plain), 0, 0, ZEROS, 0, 0, 0))
                    continue
                id = keys.chunk_id(blake3(plain).digest())
                if id not in known:
                    known[id] = (builder.pack_id, builder.add(id, plain))
                pack, index = known[id]
                number = numbers.setdefault(pack, len(numbers))
                rows.append((at, len(plain), 0, 0, number, index, 0, 0))
                if builder.is_full:
                    _store(builder, store)
            packs = list(numbers)
            if builder.count:
                _store(builder, store)
            seq += 1
            end = begin + COMMIT_BYTES >= size
            body = encode_commit(
                keys,
                _head(machine, volume, seq, size, previous, done=end),
                {volume: _table(rows)},
                packs,
            )
            store.put_new(commit_name(machine, seq), body)
            previous = blake3(body).digest()
    write_map(store, keys, machine, volume, seq, None)
    return key_file


def _store(builder: PackBuilder, store: Store) -> None:
    sealed = builder.build()
    sealed.put(store)
    sealed.release()


def _table(rows: list[tuple[int, ...]]) -> Rows:
    return np.array(rows, ROW_DTYPE)


def _head(machine: bytes, volume: bytes, seq: int, size: int, previous: bytes, *, done: bool) -> CommitHead:
    return CommitHead(
        machine=machine,
        machine_name="bench",
        seq=seq,
        kind="data",
        previous=previous,
        epoch=1,
        timeline=Timeline(id=bytes(16)),
        writer=bytes(16),
        nonce=new_id(),
        time_ns=time.time_ns(),
        cut_seq=seq,
        consistency="crash" if done else "fuzzy",
        volumes=(
            CommitVolume(
                id=volume,
                name="disk",
                size_bytes=size,
                incarnation=bytes(16),
                ordinal=1,
                lsn=0,
                digest=bytes(32),
                fuzzy=not done,
                copied=done,
                copy_end=0,
            ),
        ),
    )


class Run(NamedTuple):
    """Seconds to the end of a command, to the end of a sync after it, and of processor time."""

    ended: float
    durable: float
    cpu: float


def timed(command: list[str | Path], folder: Path, environment: dict[str, str]) -> Run:
    """Run a command with cold caches."""
    drop_caches()
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    ended = time.monotonic()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    os.sync()
    return Run(ended - started, time.monotonic() - started, used.ru_utime + used.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="farshore-bench-", dir=options.folder) as name:
        folder = Path(name)
        image = options.image or folder / "disk.img"
        if options.image is None:
            make_image(image, int(options.gib * GIB))
        environment = {
            **os.environ,
            "RESTIC_PASSWORD": _PASSWORD,
            "BORG_PASSPHRASE": _PASSWORD,
            "RESTIC_CACHE_DIR": str(folder / "restic-cache"),
            "BORG_BASE_DIR": str(folder / "borg-home"),
        }
        key_file = make_vault(folder / "vault", image)
        steps: tuple[list[str | Path], ...] = (
            ["restic", "-q", "-r", folder / "restic", "init"],
            ["restic", "-q", "-r", folder / "restic", "backup", image],
            ["borg", "init", "-e", "repokey-blake2", folder / "borg"],
            ["borg", "create", f"{folder / 'borg'}::disk", image],
        )
        for step in steps:
            subprocess.run(step, env=environment, check=True, stdout=subprocess.DEVNULL)
        out = folder / "out"
        commands: dict[str, list[str | Path]] = {
            "farshore": [
                *(sys.executable, "-m", "farshore", "recover", "bench", "--point", "latest"),
                *("--to", out / "disk.raw", "--vault", f"file://{folder / 'vault'}"),
                *("--recovery-key-file", key_file),
            ],
            "restic": ["restic", "-q", "-r", folder / "restic", "restore", "latest", "--target", out],
            "borg": ["borg", "extract", f"{folder / 'borg'}::disk"],
        }
        expected = _digest(image)
        size = image.stat().st_size
        results: dict[str, list[Run]] = {name: [] for name in commands}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        for number in range(options.rounds):
            for tool in sorted(commands, key=lambda each: (list(commands).index(each) + number) % 3):
                out.mkdir()
                results[tool].append(timed(commands[tool], out, environment))
                made = next(path for path in out.rglob("*") if path.is_file())
                if _digest(made) != expected:
                    raise SystemExit(f"{tool} did not give the image back")
                shutil.rmtree(out)
        _show(results, size, image)


def _digest(path: Path) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return hasher.hexdigest()


def _show(results: dict[str, list[Run]], size: int, image: Path) -> None:
    stored = image.stat().st_blocks * 512
    lines = [f"image: {size / GIB:.1f} GiB, {stored / GIB:.1f} GiB of it allocated"]
    lines += [version_of("restic", "version"), version_of("borg", "--version")]
    figures: dict[str, object] = {"image_bytes": size, "image_allocated_bytes": stored}
    picks: dict[str, Callable[[Run], float]] = {
        "to its end": lambda run: run.ended,
        "durable": lambda run: run.durable,
        "per CPU second": lambda run: run.cpu,
    }
    for label, pick in picks.items():
        rates = {tool: [size / pick(run) / 1e6 for run in runs] for tool, runs in results.items()}
        for tool, values in rates.items():
            lines.append(f"{label:14} {tool:9} {spread(values)} MB/s")
        best = max(statistics.median(rates["restic"]), statistics.median(rates["borg"]))
        ratio = statistics.median(rates["farshore"]) / best
        lines.append(f"{label:14} farshore / better of the others: {ratio:.2f}")
        figures[label] = {"mb_per_s": rates, "ratio": ratio}
    show("recover to a raw file", figures, lines)


if __name__ == "__main__":
    main()
