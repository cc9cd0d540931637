"""A store that asks again: what it takes for its own write, and what it never does."""

from collections.abc import Callable

import pytest

from farshore.errors import CapacityError, ConfigError, NotFound, Unreachable
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.protocol import AlreadyExists, Body, Precondition, Store
from process_server.vault.store.retrying import RetryingStore
from tests.fakes.store import Fault, FaultyStore, How


def patient(store: Store) -> RetryingStore:
    return RetryingStore(store, total_s=60, pause_s=(0.001, 0.002))


@pytest.mark.parametrize("how", ["refused", "applied"])
def test_a_create_whose_answer_was_lost_succeeds_and_is_there_once(how: How) -> None:
    with FaultyStore(MemoryStore(), Fault("put_new", how)) as faulty:
        patient(faulty).put_new("x", [b"a", b"bc"])
        assert faulty.get("x") == b"abc"


@pytest.mark.parametrize("there", [b"abd", b"ab", b"abcd", b""])
def test_a_create_that_meets_other_bytes_fails_though_an_answer_was_lost(there: bytes) -> None:
    with FaultyStore(MemoryStore(), Fault("put_new", "refused")) as faulty:
        faulty.cas("x", there, None)
        with pytest.raises(AlreadyExists):
            patient(faulty).put_new("x", b"abc")
        assert faulty.get("x") == there


def test_of_two_that_create_equal_bytes_one_is_told_that_it_exists() -> None:
    store = MemoryStore()
    patient(store).put_new("x", b"abc")
    with pytest.raises(AlreadyExists):
        patient(store).put_new("x", b"abc")


@pytest.mark.parametrize("how", ["refused", "applied"])
def test_a_swap_whose_answer_was_lost_succeeds_with_the_etag_that_is_there(how: How) -> None:
    store = MemoryStore()
    first = store.cas("root", b"1", None)
    with FaultyStore(store, Fault("cas", how)) as faulty:
        etag = patient(faulty).cas("root", b"2", first)
    assert store.get_with_etag("root") == (b"2", etag)


@pytest.mark.parametrize("how", ["refused", "applied"])
def test_a_first_swap_whose_answer_was_lost_succeeds(how: How) -> None:
    with FaultyStore(MemoryStore(), Fault("cas", how)) as faulty:
        etag = patient(faulty).cas("root", b"1", None)
        assert faulty.get_with_etag("root") == (b"1", etag)


@pytest.mark.parametrize("how", ["refused", "applied"])
def test_the_comparison_after_a_lost_answer_is_asked_again_without_another_create(how: How) -> None:
    faults = [Fault("put_new", "applied"), Fault("get", how), Fault("get", how, hit=2)]
    with FaultyStore(MemoryStore(), *faults) as faulty:
        patient(faulty).put_new("x", b"abc")
        assert [method for method, _ in faulty.calls] == ["put_new", "put_new", "get", "get", "get"]


def test_a_refusal_after_a_lost_answer_is_no_proof_that_nothing_was_made() -> None:
    faults = [Fault("put_new", "applied"), Fault("put_new", "full", hit=2)]
    with FaultyStore(MemoryStore(), *faults) as faulty:
        patient(faulty).put_new("x", b"abc")
        assert faulty.get("x") == b"abc"
    store = MemoryStore()
    first = store.cas("root", b"1", None)
    with FaultyStore(store, Fault("cas", "applied"), Fault("cas", "full", hit=2)) as faulty:
        etag = patient(faulty).cas("root", b"2", first)
    assert store.get_with_etag("root") == (b"2", etag)


def test_a_refusal_for_good_after_a_lost_answer_leaves_the_outcome_unknown() -> None:
    class Expired(MemoryStore):
        """Creates once, does not say so, and then refuses the credentials."""

        asked = 0

        def put_new(self, name: str, body: Body) -> None:
            self.asked += 1
            if self.asked > 1:
                raise ConfigError("the store refuses the credentials")
            super().put_new(name, body)
            raise Unreachable("lost", where=name)

    with pytest.raises(Unreachable, match="the store refuses the credentials"):
        RetryingStore(Expired(), total_s=0.1, pause_s=(0.01, 0.02)).put_new("x", b"abc")


class Swapping(MemoryStore):
    """Another writer swaps right after each reading; the answer to the first swap is lost."""

    answers = 0

    def cas(self, name: str, body: Body, expected: str | None) -> str:
        etag = super().cas(name, body, expected)
        self.answers += 1
        if self.answers == 2:
            raise Unreachable("the answer was lost", where=name)
        return etag

    def get_with_etag(self, name: str) -> tuple[bytes, str]:
        found = super().get_with_etag(name)
        super().cas(name, b"theirs", found[1])
        return found


def test_the_etag_that_a_settled_swap_returns_is_never_another_s() -> None:
    store = Swapping()
    first = store.cas("root", b"1", None)
    etag = patient(store).cas("root", b"ours", first)
    assert store.get("root") == b"theirs"
    with pytest.raises(Precondition):
        store.cas("root", b"next, over theirs", etag)


class Overtaken(MemoryStore):
    """After the first swap that has its effect another writer swaps, and the answer is lost."""

    def cas(self, name: str, body: Body, expected: str | None) -> str:
        etag = super().cas(name, body, expected)
        if body == b"ours":
            super().cas(name, b"theirs", etag)
            raise Unreachable("the answer was lost", where=name)
        return etag


def test_a_swap_that_another_writer_overtook_is_never_done_twice() -> None:
    store = Overtaken()
    first = store.cas("root", b"1", None)
    with pytest.raises(Precondition):
        patient(store).cas("root", b"ours", first)
    assert store.get("root") == b"theirs"


@pytest.mark.parametrize(
    "method", ["get", "get_with_etag", "get_range", "size", "modified_s", "list", "delete"]
)
def test_what_changes_nothing_is_asked_again_as_it_is(method: str) -> None:
    store = MemoryStore()
    store.put_new("x", b"abc")
    faults = [Fault(method, "refused", hit=hit) for hit in (1, 2)]
    with FaultyStore(store, *faults) as faulty:
        asked = patient(faulty)
        answers: dict[str, Callable[[], bool]] = {
            "get": lambda: asked.get("x") == b"abc",
            "get_with_etag": lambda: asked.get_with_etag("x")[0] == b"abc",
            "get_range": lambda: asked.get_range("x", 1, 1) == b"b",
            "size": lambda: asked.size("x") == 3,
            "modified_s": lambda: asked.modified_s("x") > 0,
            "list": lambda: list(asked.list("")) == ["x"],
        }
        if method == "delete":
            asked.delete("x")
            assert list(store.list("")) == []
        else:
            assert answers[method]()


def test_nobody_asks_for_ever() -> None:
    class Silent(MemoryStore):
        asked = 0

        def get(self, name: str) -> bytes:
            self.asked += 1
            raise Unreachable("no answer", where=name)

    store = Silent()
    with pytest.raises(Unreachable, match="no answer"):
        RetryingStore(store, total_s=0.2, pause_s=(0.01, 0.02)).get("x")
    assert store.asked > 1


@pytest.mark.parametrize("error", [NotFound, CapacityError, ConfigError])
def test_what_another_try_cannot_mend_is_not_tried_again(error: type[Exception]) -> None:
    class Refusing(MemoryStore):
        asked = 0

        def get(self, name: str) -> bytes:
            self.asked += 1
            raise error("no")

    store = Refusing()
    with pytest.raises(error):
        patient(store).get("x")
    assert store.asked == 1


def test_a_store_that_says_both_yes_and_no_is_asked_until_it_decides() -> None:
    class Undecided(MemoryStore):
        """Says once that an object exists that is not there, as a store does while it settles."""

        wrong = 2

        def put_new(self, name: str, body: Body) -> None:
            if self.wrong:
                self.wrong -= 1
                raise Unreachable("lost") if self.wrong else AlreadyExists("it exists")
            super().put_new(name, body)

    store = Undecided()
    patient(store).put_new("x", b"abc")
    assert store.get("x") == b"abc"
