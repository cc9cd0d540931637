"""The chain: what the race in tests/property does not reach."""

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3

from farshore.errors import CapacityError, Conflict, Fenced, IntegrityError, Unreachable
from process_server.vault.chain import Chain
from process_server.vault.commit import (
    ROW_DTYPE,
    ZEROS,
    CommitVolume,
    Timeline,
    commit_name,
    decode_commit,
    encode_commit,
)
from process_server.vault.keys import VaultKeys
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.protocol import Store
from tests.fakes.store import Fault, FaultyStore, How, LaggingStore

KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
MACHINE, VOLUME = b"M" * 16, b"V" * 16
US, THEM = b"u" * 16, b"t" * 16


def volume(lsn: int) -> CommitVolume:
    return CommitVolume(
        id=VOLUME,
        name="data",
        size_bytes=2**30,
        incarnation=b"i" * 16,
        ordinal=1,
        lsn=lsn,
        digest=bytes(32),
        fuzzy=False,
        copied=True,
        copy_end=0,
    )


def append(chain: Chain, lsn: int, **more: Any) -> tuple[int, bytes]:
    table = np.zeros(1, ROW_DTYPE)
    table[0] = (0, 512, lsn, 0, ZEROS, 0, 0, 0)
    return chain.append(
        machine_name="db1",
        time_ns=lsn,
        cut_seq=lsn,
        tag=None,
        consistency="crash",
        volumes=[volume(lsn)],
        rows_by_volume={VOLUME: table},
        **more,
    )


def owned(store: Store, writer: bytes = US) -> Chain:
    chain = Chain(store, KEYS, MACHINE, writer)
    chain.fence(machine_name="db1", time_ns=0)
    return chain


def name(seq: int) -> str:
    return commit_name(MACHINE, seq)


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore())


def test_a_chain_begins_with_a_fence(store: FaultyStore) -> None:
    chain = Chain(store, KEYS, MACHINE, US)
    assert chain.load_head() is None
    assert (chain.seq, chain.epoch, chain.head) == (0, 0, None)
    assert chain.fence(machine_name="db1", time_ns=5) == (1, blake3(store.get(name(1))).digest())
    assert (chain.seq, chain.epoch, chain.is_owner) == (1, 1, True)
    commit = decode_commit(KEYS, name(1), store.get(name(1)))
    assert (commit.head.kind, commit.head.previous, commit.head.writer) == ("fence", bytes(32), US)


def test_commits_follow_each_other(store: FaultyStore) -> None:
    chain = owned(store)
    assert [append(chain, lsn)[0] for lsn in (1, 2, 3)] == [2, 3, 4]
    commits = list(Chain(store, KEYS, MACHINE).iterate())
    assert [commit.head.seq for commit in commits] == [1, 2, 3, 4]
    assert [commit.rows["lsn"].tolist() for commit in commits] == [[], [1], [2], [3]]
    for before, after in pairwise(commits):
        assert after.head.previous == before.digest == blake3(store.get(before.name)).digest()
        assert after.head.previous_header == blake3(store.get(before.name)[:128]).digest()
    assert commits[0].head.previous_header == bytes(32)
    assert [commit.head.seq for commit in chain.iterate(2, 3, previous=commits[0].digest)] == [2, 3]
    assert list(Chain(store, KEYS, b"?" * 16).iterate()) == []


def test_a_fence_repeats_the_volumes_and_the_timeline(store: FaultyStore) -> None:
    chain = owned(store)
    branch = Timeline(id=b"2" * 16, parent=b"1" * 16, parent_seq=1)
    append(chain, 7, timeline=branch)
    assert (chain.head,) == tuple(commit.head for commit in chain.iterate(2))
    later = owned(store, THEM)
    assert later.head is not None
    assert (later.head.volumes, later.head.timeline, later.epoch) == ((volume(7),), branch, 2)
    assert later.head.previous_header == blake3(store.get(name(2))[:128]).digest()


def test_without_a_fence_nothing_is_added(store: FaultyStore) -> None:
    owned(store)
    chain = Chain(store, KEYS, MACHINE, US)
    chain.load_head()
    for _ in range(2):
        with pytest.raises(Fenced, match="does not own it"):
            append(chain, 1)
    with pytest.raises(ValueError, match="a reader"):
        Chain(store, KEYS, MACHINE).fence(machine_name="db1", time_ns=0)


def test_the_old_owner_meets_the_new_ones_fence(store: FaultyStore) -> None:
    old = owned(store)
    new = owned(store, THEM)
    with pytest.raises(Fenced, match="another server wrote this commit"):
        append(old, 1)
    assert not old.is_owner
    assert not old.is_pending
    assert append(new, 1)[0] == 3
    assert old.fence(machine_name="db1", time_ns=0)[0] == 4
    assert old.epoch == 3


@pytest.mark.parametrize("how", ["refused", "applied", "full"])
def test_a_body_once_sent_is_frozen(store: FaultyStore, how: How) -> None:
    chain = owned(store)
    store.plan(Fault("put_new", how))
    with pytest.raises((Unreachable, CapacityError)):
        append(chain, 1)
    for _ in range(2):
        with pytest.raises(Conflict, match="outcome of this commit is unknown"):
            append(chain, 2)
    for call in (chain.load_head, lambda: chain.fence(machine_name="db1", time_ns=0)):
        with pytest.raises(Conflict, match="settle it first"):
            call()
    assert chain.settle()[0] == 2
    with pytest.raises(ValueError, match="no commit is pending"):
        chain.settle()
    assert [commit.rows["lsn"].tolist() for commit in chain.iterate()] == [[], [1]]
    store.assert_all_hit()


@pytest.mark.parametrize("how", ["refused", "applied"])
def test_a_fence_with_a_lost_reply_is_made_once(store: FaultyStore, how: How) -> None:
    chain = Chain(store, KEYS, MACHINE, US)
    store.plan(Fault("put_new", how))
    with pytest.raises(Unreachable):
        chain.fence(machine_name="db1", time_ns=0)
    assert chain.fence(machine_name="db1", time_ns=0)[0] == 1
    assert chain.is_owner
    assert len(list(store.list("c/"))) == 1


def test_a_clone_that_drew_the_same_nonce_is_fenced(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("process_server.vault.chain.new_id", lambda: b"n" * 16)
    first = owned(store)
    clone = Chain(store, KEYS, MACHINE, US)
    clone.head, clone.digest, clone.is_owner = first.head, first.digest, True
    append(first, 1)
    with pytest.raises(Fenced):
        append(clone, 2)


def test_a_listing_is_only_a_hint(store: FaultyStore) -> None:
    chain = owned(store)
    for lsn in (1, 2, 3):
        append(chain, lsn)
    for hidden in ([4], [3, 4], [1, 2, 3, 4], [2]):
        lagging = Chain(LaggingStore(store, *map(name, hidden)), KEYS, MACHINE)
        head = lagging.load_head()
        assert head is not None
        assert (head.head.seq, lagging.seq) == (4, 4)


def test_strays_in_the_chains_folder_are_ignored(store: FaultyStore) -> None:
    owned(store)
    folder = name(1).rpartition("/")[0]
    for stray in ("x", "1", "00000000000000000000", "99999999999999999999", f"{name(2)}.bak"):
        store.put_new(stray if "/" in stray else f"{folder}/{stray}", b"stray")
    head = Chain(store, KEYS, MACHINE).load_head()
    assert head is not None
    assert head.head.seq == 1


def test_a_gap_is_never_written_into(store: FaultyStore) -> None:
    chain = owned(store)
    for lsn in (1, 2, 3):
        append(chain, lsn)
    store.delete(name(2))
    with pytest.raises(IntegrityError, match="a commit is missing"):
        list(Chain(store, KEYS, MACHINE).iterate())
    assert owned(store, THEM).seq == 5


def test_a_sleeper_does_not_take_a_retired_chain_for_its_own(store: FaultyStore) -> None:
    """What it knew is deleted, and what came next too: only a look at the whole chain tells."""
    sleeper = owned(store)
    other = owned(store, THEM)
    for lsn in range(1, 6):
        append(other, lsn)
    for seq in (1, 2, 3, 4):
        store.delete(name(seq))
    assert sleeper.fence(machine_name="db1", time_ns=0)[0] == 8


def test_a_damaged_head_stops_everything(store: FaultyStore) -> None:
    owned(store)
    body, etag = store.get_with_etag(name(1))
    store.cas(name(1), body[:-1] + bytes([body[-1] ^ 1]), etag)
    for call in (
        Chain(store, KEYS, MACHINE).load_head,
        lambda: owned(store, THEM),
        lambda: list(Chain(store, KEYS, MACHINE).iterate()),
    ):
        with pytest.raises(IntegrityError, match=r"c/4d4d"):
            call()


def test_a_commit_put_back_from_another_history_is_noticed(store: FaultyStore) -> None:
    """Every commit is authentic, and yet they are not one chain: somebody rolled part of it back."""
    elsewhere = FaultyStore(MemoryStore())
    chain, other = owned(store), owned(elsewhere)
    for lsn in (1, 2):
        append(chain, lsn)
        append(other, lsn)
    store.cas(name(2), elsewhere.get(name(2)), store.get_with_etag(name(2))[1])
    with pytest.raises(IntegrityError, match="digest of the commit before it"):
        list(Chain(store, KEYS, MACHINE).iterate())
    with pytest.raises(IntegrityError, match="digest of the commit before it"):
        list(Chain(store, KEYS, MACHINE).iterate(3, 3, previous=blake3(store.get(name(2))).digest()))


@pytest.mark.parametrize(("kind", "epoch"), [("data", 2), ("fence", 1), ("fence", 3)])
def test_an_epoch_changes_by_a_fence_and_by_one(store: FaultyStore, kind: Any, epoch: int) -> None:
    chain = owned(store)
    assert chain.head is not None
    head = msgspec.structs.replace(
        chain.head,
        seq=2,
        kind=kind,
        epoch=epoch,
        previous=chain.digest,
        cut_seq=1 if kind == "data" else None,
    )
    store.put_new(name(2), encode_commit(KEYS, head, {}))
    with pytest.raises(IntegrityError, match="epoch"):
        list(Chain(store, KEYS, MACHINE).iterate())


def test_rows_that_break_a_rule_leave_the_chain_usable(store: FaultyStore) -> None:
    chain = owned(store)
    with pytest.raises(ValueError, match="pack"):
        append(chain, 1, pack_ids=[b"p" * 16, b"p" * 16])
    assert not chain.is_pending
    assert append(chain, 1)[0] == 2
