"""A create of unknown outcome is success only when exactly our bytes are there."""

import pytest

from farshore.errors import Unreachable
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.protocol import AlreadyExists
from process_server.vault.store.settle import put_same
from tests.fakes.store import Fault, FaultyStore


def test_our_own_bytes_are_success_and_any_others_are_not() -> None:
    store = MemoryStore()
    store.put_new("p/1", b"0123456789")
    put_same(store, "p/1", [b"01234", b"56789"])
    for other in (b"0123456780", b"01234567890", b"012345678", b""):
        with pytest.raises(AlreadyExists):
            put_same(store, "p/1", other)
    assert store.get("p/1") == b"0123456789"


def test_a_lost_reply_is_settled_by_reading_back() -> None:
    with FaultyStore(MemoryStore(), Fault("put_new", "applied")) as store:
        with pytest.raises(Unreachable):
            put_same(store, "p/1", b"ours")
        put_same(store, "p/1", b"ours")
        assert store.get("p/1") == b"ours"
