"""The catalog says what the chain says, however it was filled, and notices a chain that is another one."""

from pathlib import Path

import pytest

from farshore.errors import Failed
from process_server.catalog import Catalog, CatalogKeeper, open_catalog
from process_server.recovery.points import ChainReader, list_points
from process_server.vault.chain import Chain
from process_server.vault.commit import CommitVolume
from process_server.vault.keys import VaultKeys
from process_server.vault.store.memory import MemoryStore

MACHINE, WRITER = b"m" * 16, b"w" * 16


def make(commits: int, keys: VaultKeys, store: MemoryStore) -> Chain:
    chain = Chain(store, keys, MACHINE, WRITER)
    chain.fence(machine_name="host", time_ns=1)
    for number in range(commits):
        extend(chain, number)
    return chain


def extend(chain: Chain, number: int) -> None:
    volume = CommitVolume(
        id=b"v" * 16,
        name="disk",
        size_bytes=4096,
        incarnation=b"i" * 16,
        ordinal=1,
        lsn=number + 1,
        digest=bytes(32),
        fuzzy=number == 0,
        copied=True,
        copy_end=0,
    )
    chain.append(
        machine_name="host",
        time_ns=100 + number,
        cut_seq=number + 1,
        tag="first" if number == 0 else None,
        consistency="fuzzy" if number == 0 else "crash",
        volumes=[volume],
        rows_by_volume={},
    )


def test_following_step_by_step_and_all_at_once_gives_the_same(tmp_path: Path) -> None:
    keys, store = VaultKeys(bytes(16), 1, bytes(32)), MemoryStore()
    chain = make(2, keys, store)
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(path)
    assert catalog.follow(chain, MACHINE) == 3
    for number in range(2, 6):
        extend(chain, number)
        assert chain.head is not None
        assert catalog.add(chain.head, chain.digest)
        assert not catalog.add(chain.head, chain.digest)
    rebuilt = Catalog(None)
    assert rebuilt.follow(chain, MACHINE) == 7
    assert rebuilt.points(MACHINE) == catalog.points(MACHINE)
    catalog.close()
    again = Catalog(path)
    assert again.follow(chain, MACHINE) == 0
    points = again.points(MACHINE)
    assert [point.volumes["disk"] for point in points] == [(n + 1, 4096) for n in range(6)]
    assert (points[0].tag, points[0].consistency, points[1].consistency) == ("first", "fuzzy", "crash")
    again.close()
    rebuilt.close()


def test_a_catalog_of_another_history_is_filled_anew() -> None:
    keys = VaultKeys(bytes(16), 1, bytes(32))
    one, other = make(5, keys, MemoryStore()), make(3, keys, MemoryStore())
    catalog = Catalog(None)
    catalog.follow(one, MACHINE)
    assert catalog.follow(other, MACHINE) == 4
    assert len(catalog.points(MACHINE)) == 3
    catalog.close()


def test_a_damaged_file_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(Failed, match="remove it"):
        Catalog(path)


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    catalog = open_catalog(path)
    assert catalog is not None
    assert catalog.position(MACHINE) is None
    catalog.close()


def test_without_a_place_for_it_there_is_no_catalog(tmp_path: Path) -> None:
    assert open_catalog(tmp_path / "no such directory" / "catalog.sqlite") is None


def test_the_keeper_shows_what_the_chain_says() -> None:
    keys, store = VaultKeys(bytes(16), 1, bytes(32)), MemoryStore()
    chain = make(3, keys, store)
    keeper = CatalogKeeper(Catalog(None))
    keeper.follow(chain, MACHINE)
    for number in range(3, 6):
        extend(chain, number)
        assert chain.head is not None
        keeper.note(chain.head, chain.digest, chain)
    shown = keeper.points(MACHINE, chain.seq)
    assert shown is not None
    assert [row.as_dict() for row in shown] == [
        point.as_dict() for point in list_points(ChainReader(store, keys, MACHINE))
    ]
    keeper.close()


def test_a_keeper_that_is_behind_says_so_and_catches_up() -> None:
    keys, store = VaultKeys(bytes(16), 1, bytes(32)), MemoryStore()
    chain = make(3, keys, store)
    keeper = CatalogKeeper(Catalog(None))
    keeper.follow(chain, MACHINE)
    assert keeper.points(MACHINE, chain.seq) is not None
    extend(chain, 3)
    assert keeper.points(MACHINE, chain.seq) is None
    extend(chain, 4)  # the one before was never noted
    assert chain.head is not None
    keeper.note(chain.head, chain.digest, chain)
    shown = keeper.points(MACHINE, chain.seq)
    assert shown is not None
    assert len(shown) == 5
    keeper.close()
