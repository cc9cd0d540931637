"""The dedup index against a dictionary, and who may learn what."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from process_server.vault import dedup as module
from process_server.vault.dedup import DedupIndex
from process_server.vault.keys import VaultKeys
from process_server.vault.pack import PackBuilder, PackReader, pack_name
from process_server.vault.store.memory import MemoryStore

M1, M2 = b"1" * 16, b"2" * 16


def id_of(number: int) -> bytes:
    return random.Random(number).randbytes(32)


def pack(number: int) -> bytes:
    return number.to_bytes(16, "big")


@given(st.lists(st.lists(st.integers(0, 300), max_size=40), max_size=30))
def test_it_answers_as_a_dictionary_would(packs: list[list[int]]) -> None:
    index, model = DedupIndex(), dict[int, tuple[bytes, int]]()
    for number, chunks in enumerate(packs, start=1):
        index.add(pack(number), [id_of(chunk) for chunk in chunks])
        for place, chunk in enumerate(chunks):
            model.setdefault(chunk, (pack(number), place))
    assert len(index) == len(model)
    assert index.lookup([id_of(chunk) for chunk in range(301)]) == [model.get(chunk) for chunk in range(301)]


def test_it_grows_and_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Table.__init__, "__kwdefaults__", {"values": True, "buckets": 1})
    index = DedupIndex()
    for number in range(1, 60):
        index.add(pack(number), [id_of(number * 1000 + chunk) for chunk in range(50)], M1)
        for earlier in range(1, number + 1):
            assert index.lookup([id_of(earlier * 1000 + 7)]) == [(pack(earlier), 7)]
    assert len(index) == 59 * 50
    assert index.memory_bytes / len(index) < 64


def test_crowded_buckets_and_ids_that_begin_with_zeros() -> None:
    index = DedupIndex()
    # All in one bucket of a table of 1,024: the low halves are multiples of it, the first is 0.
    ids = [(n * 1024).to_bytes(8, "little") + bytes([n]) * 24 for n in range(50)]
    index.add(pack(1), ids, M1)
    assert index.lookup(ids) == [(pack(1), place) for place in range(50)]
    assert all(index.have(M1, ids))
    absent = [(n * 1024).to_bytes(8, "little") + bytes([n + 1]) * 24 for n in range(50)]
    assert not any(index.lookup(absent))


def test_a_machine_learns_only_of_what_it_sent() -> None:
    index = DedupIndex()
    index.add(pack(1), [id_of(1), id_of(2)], M1)
    assert index.have(M1, [id_of(1), id_of(2), id_of(3)]) == [True, True, False]
    assert index.have(M2, [id_of(1), id_of(2), id_of(3)]) == [False] * 3
    assert (index.has_sent(M1), index.has_sent(M2)) == (True, False)
    index.note(M2, [id_of(2)])
    assert index.have(M2, [id_of(1), id_of(2)]) == [False, True]


def test_condemned_packs_are_forgotten() -> None:
    index = DedupIndex()
    index.add(pack(1), [id_of(1), id_of(2)], M1)
    index.add(pack(2), [id_of(3)], M1)
    index.drop_packs([pack(1), pack(9)])
    assert index.lookup([id_of(1), id_of(2), id_of(3)]) == [None, None, (pack(2), 0)]
    assert index.have(M1, [id_of(1), id_of(3)]) == [False, True]
    index.add(pack(3), [id_of(1)], M1)
    assert index.lookup([id_of(1)]) == [(pack(3), 0)]


def test_a_full_index_takes_no_more_and_says_so() -> None:
    index = DedupIndex(entries_max=3)
    index.add(pack(1), [id_of(1), id_of(2)])
    index.add(pack(2), [id_of(3), id_of(4)])
    assert index.lookup([id_of(3), id_of(4)]) == [(pack(2), 0), None]
    index.add(pack(3), [id_of(5)])
    assert (len(index), index.refused_total) == (3, 2)


def test_nothing_asked_nothing_answered() -> None:
    index = DedupIndex()
    index.add(pack(1), [], M1)
    index.note(M1, [])
    assert (index.lookup([]), index.have(M1, [])) == ([], [])


def test_it_is_rebuilt_from_packs_and_names_the_bad_ones() -> None:
    keys, store = VaultKeys(b"v" * 16, 1, b"m" * 32), MemoryStore()
    builder, made = PackBuilder(keys), []
    for number in range(3):
        for chunk in range(4):
            builder.add(id_of(number * 10 + chunk), bytes([number, chunk]))
        sealed = builder.build()
        sealed.put(store)
        made.append(sealed.id)
    body, etag = store.get_with_etag(pack_name(made[1]))
    store.cas(pack_name(made[1]), b"x" + body[1:], etag)
    index = DedupIndex()
    bad = index.rebuild(M1, [*made, pack(7)], PackReader(store, keys))
    assert [id for id, _ in bad] == [made[1], pack(7)]
    assert index.lookup([id_of(0), id_of(11), id_of(23)]) == [(made[0], 0), None, (made[2], 3)]
    assert index.have(M1, [id_of(0), id_of(11)]) == [True, False]
    small = DedupIndex(entries_max=4)
    assert small.rebuild(M1, [made[0], pack(7)], PackReader(store, keys)) == []
