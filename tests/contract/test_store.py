"""One suite for every store: in memory, in a directory, in real object stores, and through each wrapper."""

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from farshore.errors import FarshoreError, NotFound, Unreachable
from process_server.vault.store import open_store
from process_server.vault.store.file import FileStore
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.metered import Meter, MeteredStore
from process_server.vault.store.probe import probe
from process_server.vault.store.protocol import AlreadyExists, Body, Precondition, Store
from process_server.vault.store.retrying import RetryingStore
from process_server.vault.store.settle import put_same
from tests.fakes.store import Fault, FaultyStore, How

MAKERS: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: MemoryStore(),
    "file": lambda path: FileStore(path / "vault", create=True),
    "file, owned": lambda path: FileStore(path / "vault", owner=True, create=True),
    "faulty": lambda path: FaultyStore(MemoryStore()),
    "retrying and metered": lambda path: RetryingStore(MeteredStore(MemoryStore(), Meter())),
}
PEERS = {"seaweedfs": "weed", "azurite": "azurite-blob"}


@pytest.fixture(
    params=[*MAKERS, *(pytest.param(name, marks=pytest.mark.needs(need)) for name, need in PEERS.items())]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    name = request.param
    if name in PEERS:
        made = open_store(request.getfixturevalue(name).url())
    else:
        made = MAKERS[name](tmp_path)
    yield made
    made.close()


def test_what_is_put_is_read_whole_in_part_and_by_size(store: Store) -> None:
    store.put_new("c/a/1", b"0123456789")
    assert store.get("c/a/1") == b"0123456789"
    assert store.get_range("c/a/1", 2, 3) == b"234"
    assert store.size("c/a/1") == 10


@pytest.mark.parametrize(("at", "length", "read"), [(8, 5, b"89"), (10, 1, b""), (99, 1, b""), (3, 0, b"")])
def test_a_range_ends_where_the_object_ends(store: Store, at: int, length: int, read: bytes) -> None:
    store.put_new("x", b"0123456789")
    assert store.get_range("x", at, length) == read


def test_a_huge_range_allocates_no_more_than_there_is(store: Store) -> None:
    store.put_new("x", b"abc")
    assert store.get_range("x", 1, 2**62) == b"bc"


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        (b"", b""),
        (b"abc", b"abc"),
        (bytearray(b"abc"), b"abc"),
        (memoryview(b"abc"), b"abc"),
        ([b"a", memoryview(b"b"), bytearray(b"c")], b"abc"),
        ([], b""),
    ],
)
def test_bodies_come_in_one_piece_or_several(store: Store, body: Body, stored: bytes) -> None:
    store.put_new("x", body)
    assert store.get("x") == stored


def test_more_pieces_than_one_system_call_takes(store: Store) -> None:
    pieces = [bytes([number % 251]) * (number % 7) for number in range(3000)]
    store.put_new("x", pieces)
    assert store.get("x") == b"".join(pieces)


@pytest.mark.parametrize("length", [2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 4095, 3 * 2**20 + 4097])
def test_large_bodies_in_aligned_memory_keep_every_byte(store: Store, length: int) -> None:
    pattern = os.urandom(4099) * (length // 4099 + 1)
    with mmap.mmap(-1, length) as memory:
        memory[:] = pattern[:length]
        with memoryview(memory) as view:
            store.put_new("p/aa/x", view)
            store.put_new("p/aa/unaligned", view[1:])
    assert store.get("p/aa/x") == pattern[:length]
    assert store.get("p/aa/unaligned") == pattern[1:length]
    assert store.size("p/aa/x") == length


def test_a_create_never_replaces(store: Store) -> None:
    store.put_new("x", b"first")
    with pytest.raises(AlreadyExists):
        store.put_new("x", b"second")
    assert store.get("x") == b"first"


def test_of_many_creators_one_wins(store: Store) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        try:
            store.put_new("d/e/f", str(number).encode() * 1000)
        except AlreadyExists:
            return
        won.append(number)

    _run_together([partial(create, number) for number in range(16)])
    assert len(won) == 1
    assert store.get("d/e/f") == str(won[0]).encode() * 1000


def test_compare_and_swap_replaces_only_what_it_expects(store: Store) -> None:
    with pytest.raises(Precondition):
        store.cas("root", b"0", "no such etag")
    first = store.cas("root", b"1", None)
    assert store.get_with_etag("root") == (b"1", first)
    with pytest.raises(Precondition):
        store.cas("root", b"2", None)
    second = store.cas("root", b"2", first)
    with pytest.raises(Precondition):
        store.cas("root", b"3", first)
    assert store.get_with_etag("root") == (b"2", second)


def test_of_many_swaps_none_is_lost(store: Store) -> None:
    store.cas("root", b"0", None)

    def add() -> None:
        for _ in range(10):
            while True:
                body, etag = store.get_with_etag("root")
                try:
                    store.cas("root", str(int(body) + 1).encode(), etag)
                except Precondition:
                    continue
                break

    _run_together([add] * 4)
    assert store.get("root") == b"40"


def test_what_is_not_there_is_not_found(store: Store) -> None:
    store.put_new("a/b", b"")
    calls: list[Callable[[], object]] = [
        lambda: store.get("x"),
        lambda: store.get_with_etag("x"),
        lambda: store.get_range("x", 0, 1),
        lambda: store.get_range("x", 0, 0),
        lambda: store.size("x"),
        lambda: store.modified_s("x"),
        lambda: store.get("a/b/c"),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            call()


def test_listing_yields_the_names_with_a_prefix(store: Store) -> None:
    names = {"root", "p/aa/1", "p/aa/2", "p/ab/3", "c/m/1", "c/m2/1"}
    for name in names:
        store.put_new(name, b"")
    assert set(store.list("")) == names
    assert set(store.list("p/")) == {"p/aa/1", "p/aa/2", "p/ab/3"}
    assert set(store.list("p/aa/")) == {"p/aa/1", "p/aa/2"}
    assert set(store.list("p/a")) == {"p/aa/1", "p/aa/2", "p/ab/3"}
    assert set(store.list("c/m")) == {"c/m/1", "c/m2/1"}
    assert set(store.list("ro")) == {"root"}
    assert set(store.list("nothing/here/")) == set()


def test_deleting_twice_is_success_and_frees_the_name(store: Store) -> None:
    store.put_new("x", b"1")
    store.delete("x")
    store.delete("x")
    store.delete("never/was")
    assert list(store.list("")) == []
    store.put_new("x", b"2")
    assert store.get("x") == b"2"


@pytest.mark.parametrize(
    "name",
    ["", "/x", "x/", "a//b", "../x", "a/../b", ".owner", "a/.tmp", "-x", "A", "ä", "a b", "a\0b", "x" * 600],
)
def test_names_that_are_none_are_our_own_mistake(store: Store, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put_new(name, b""),
        lambda: store.cas(name, b"", None),
        lambda: store.delete(name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="not the name"):
            call()


def test_an_object_is_as_old_as_the_store_says(store: Store) -> None:
    before_s = time.time()
    store.put_new("x", b"1")
    # Some say it to the second only, and what a minute hides is no matter to anybody.
    assert before_s - 60 < store.modified_s("x") < time.time() + 60


def test_a_range_before_the_object_is_our_own_mistake(store: Store) -> None:
    store.put_new("x", b"1")
    for at, length in ((-1, 1), (0, -1)):
        with pytest.raises(ValueError, match="no range"):
            store.get_range("x", at, length)


def test_the_probe_is_content_and_leaves_nothing(store: Store) -> None:
    probe(store)
    assert list(store.list("")) == []


def test_the_same_bytes_again_are_success(store: Store) -> None:
    put_same(store, "x", [b"a", b"bc"])
    put_same(store, "x", b"abc")
    for other in (b"abd", b"ab", b"abcd"):
        with pytest.raises(AlreadyExists):
            put_same(store, "x", other)


@pytest.mark.parametrize("how", ["refused", "applied"])
def test_a_lost_reply_is_settled_by_asking_again(how: How) -> None:
    with FaultyStore(MemoryStore(), Fault("put_new", how)) as store:
        with pytest.raises(Unreachable):
            put_same(store, "x", b"abc")
        put_same(store, "x", b"abc")
        assert store.get("x") == b"abc"


def test_a_planned_fault_that_is_never_hit_is_a_failure() -> None:
    with (
        pytest.raises(AssertionError, match="never hit"),
        FaultyStore(MemoryStore(), Fault("get", "refused")),
    ):
        pass


def _run_together(calls: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], None]) -> None:
        barrier.wait()
        try:
            call()
        except FarshoreError as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
