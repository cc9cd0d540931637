"""A vault of format 1 opens and restores for ever, and no damage to it restores as something else."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from farshore.errors import FarshoreError, IntegrityError
from process_server.recovery.image import VolumeImage
from process_server.recovery.points import ChainReader, Cut, list_points
from process_server.vault.chain import Chain
from process_server.vault.commit import ZEROS, Commit
from process_server.vault.control import ControlStore
from process_server.vault.keys import VaultKeys, open_vault
from process_server.vault.pack import PackReader
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.store.file import FileStore
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.protocol import Store
from tests.golden.reader_v1 import Reader

HERE = Path(__file__).parent
VAULT = HERE / "vault-v1"
EXPECTED: dict[str, Any] = json.loads(VAULT.with_suffix(".json").read_text())
RECOVERY = RecoveryKey.parse(EXPECTED["recovery_key"])
MACHINE, VOLUME = b"golden machine 1", b"golden volume  1"
FLIPS_PER_OBJECT = 60


def volumes(store: Store, keys: VaultKeys) -> Iterator[tuple[int, bytes]]:
    """Yield the volume after each commit: by the rows alone, without maps."""
    packs = PackReader(store, keys)
    image = bytearray()
    for commit in Chain(store, keys, MACHINE).iterate():
        if volume := commit.volume(VOLUME):
            image = image[: volume.size_bytes].ljust(volume.size_bytes, b"\0")
            apply(image, commit, packs)
        yield commit.head.seq, bytes(image)


def apply(image: bytearray, commit: Commit, packs: PackReader) -> None:
    inline = commit.inline_reader()
    for offset, length, _, _, pack, chunk, start, _ in commit.rows_of(VOLUME).tolist():
        if pack == ZEROS:
            data = bytes(length)
        else:
            entry = commit.head.packs[pack]
            reader = packs if entry.inline is None else inline
            data = reader.read_chunk(entry.id, chunk)[start : start + length]
        image[offset : offset + length] = data


def restore(store: Store) -> dict[str, str]:
    """Open the vault, look at everything in it, and return the digest of the volume at each point."""
    keys = open_vault(store, RECOVERY)
    control = ControlStore(store, keys).load()
    assert [machine.name for machine in control.machines] == ["golden"]
    return {
        str(seq): blake3(image).hexdigest()
        for seq, image in volumes(store, keys)
        if str(seq) in EXPECTED["volume_at"]
    }


def in_memory() -> MemoryStore:
    store, golden = MemoryStore(), FileStore(VAULT)
    for name in golden.list(""):
        store.put_new(name, golden.get(name))
    return store


def test_it_opens_with_both_keys_and_restores_every_point() -> None:
    store = FileStore(VAULT)
    assert restore(store) == EXPECTED["volume_at"]
    assert len(EXPECTED["volume_at"]) == 3
    slot = bytes.fromhex(EXPECTED["server_slot"])
    assert open_vault(store, slot).to_bytes() == open_vault(store, RECOVERY).to_bytes()


def test_recovery_reads_it_too() -> None:
    """Commits of this vault do not name the header of the one before: they are read without that link."""
    store = FileStore(VAULT)
    keys = open_vault(store, RECOVERY)
    chain = ChainReader(store, keys, MACHINE)
    found = {}
    for point in list_points(chain):
        name = next(entry.name for entry in point.head.volumes if entry.id == VOLUME)
        image = VolumeImage(chain, Cut(point, None, point.is_fuzzy), name)
        found[str(point.seq)] = blake3(image.read(0, image.size_bytes)).hexdigest()
    assert found == EXPECTED["volume_at"]


def test_it_restores_by_the_page_alone() -> None:
    reader = Reader(VAULT, EXPECTED["recovery_key"])
    assert [machine["name"] for machine in reader.control["machines"]] == ["golden"]
    for seq, digest in EXPECTED["volume_at"].items():
        assert blake3(reader.volume_at(MACHINE, VOLUME, int(seq))).hexdigest() == digest


def test_what_its_commits_say() -> None:
    store = FileStore(VAULT)
    heads = [commit.head for commit in Chain(store, open_vault(store, RECOVERY), MACHINE).iterate()]
    assert [(head.kind, head.epoch, head.cut_seq, head.consistency, head.tag) for head in heads] == [
        ("fence", 1, None, "fuzzy", None),
        ("data", 1, 1, "fuzzy", None),
        ("data", 1, 2, "crash", None),
        ("fence", 2, None, "fuzzy", None),
        ("data", 2, 3, "app", "the end"),
    ]


@pytest.mark.parametrize("name", sorted(FileStore(VAULT).list("")))
def test_no_flipped_bit_restores_as_something_else(name: str) -> None:
    store = in_memory()
    body, etag = store.get_with_etag(name)
    draw = random.Random(name)
    bits = {*range(0, 8 * 160, 37), *(draw.randrange(8 * len(body)) for _ in range(FLIPS_PER_OBJECT))}
    for bit in bits:
        flipped = bytearray(body)
        flipped[bit // 8 % len(body)] ^= 1 << bit % 8
        etag = store.cas(name, flipped, etag)
        with pytest.raises(IntegrityError):
            restore(store)
    store.cas(name, body, etag)
    assert restore(store) == EXPECTED["volume_at"]


def test_no_object_passes_for_another_and_none_can_be_missing() -> None:
    names = sorted(FileStore(VAULT).list(""))
    for name in names:
        for other in names:
            if name == other:
                continue
            store = in_memory()
            store.cas(name, store.get(other), store.get_with_etag(name)[1])
            with pytest.raises(IntegrityError):
                restore(store)
        store = in_memory()
        store.delete(name)
        if name.endswith(f"{5:020}"):
            continue  # the newest commit: only somebody who has seen it can tell that it is gone
        with pytest.raises(FarshoreError):
            restore(store)


def test_the_vault_is_as_it_was_committed() -> None:
    """A test that changed it would make all of the above hold of something else."""
    names = sorted(FileStore(VAULT).list(""))
    assert len(names) == 9
    digests = "".join(blake3(FileStore(VAULT).get(name)).hexdigest() for name in names)
    assert blake3(digests.encode()).hexdigest(length=8) == EXPECTED["objects"]
