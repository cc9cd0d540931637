"""Control state: no update is lost or made twice by accident, and nothing but the named object counts."""

import threading
from collections.abc import Callable

import msgspec
import pytest

from farshore.errors import AuthError, Conflict, IntegrityError, Unreachable
from farshore.failpoints import InjectedFault, arm, disarm
from process_server.vault.control import (
    KEPT,
    Control,
    ControlStore,
    Machine,
    ServerIdentity,
    Token,
    control_name,
)
from process_server.vault.keys import VaultKeys, create_vault
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.root import ROOT
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.protocol import Body, Precondition
from tests.fakes.store import Fault, FaultyStore


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore())


@pytest.fixture
def keys(store: FaultyStore) -> VaultKeys:
    return create_vault(store, RecoveryKey.generate(), bytes(32))


@pytest.fixture
def control(store: FaultyStore, keys: VaultKeys) -> ControlStore:
    return ControlStore(store, keys)


def enrol(number: int) -> Callable[[Control], Control]:
    machine = Machine(id=bytes([number]) * 16, name=f"m{number}", public_key=b"k", created_ns=number)
    return lambda now: msgspec.structs.replace(now, machines=(*now.machines, machine))


def names(control: ControlStore) -> list[str]:
    return [machine.name for machine in control.load().machines]


def test_a_new_vault_has_an_empty_state(control: ControlStore) -> None:
    assert control.load() == Control()
    assert control.root().control == 0


def test_what_is_updated_is_loaded(control: ControlStore) -> None:
    stored = control.update(enrol(1))
    assert control.load() == stored
    assert stored.machine(b"\1" * 16) == stored.machine_named("m1") == stored.machines[0]
    assert stored.machine(b"\2" * 16) is stored.machine_named("m2") is None
    assert control.root().chains == (b"\1" * 16,)


def test_a_machine_removed_keeps_its_chain_on_the_list(control: ControlStore) -> None:
    control.update(enrol(1))
    control.update(lambda now: msgspec.structs.replace(now, machines=()))
    assert control.root().chains == (b"\1" * 16,)


def test_of_updates_at_once_none_is_lost(control: ControlStore, store: FaultyStore, keys: VaultKeys) -> None:
    threads = [
        threading.Thread(target=lambda n=n: ControlStore(store, keys).update(enrol(n))) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names(control)) == sorted(f"m{n}" for n in range(12))


def test_a_token_is_spent_once(control: ControlStore) -> None:
    token = Token(id=b"t", hash=bytes(32), machine="m1", expires_ns=10)

    def spend(now: Control) -> Control:
        if now.tokens[0].used_ns is not None:
            raise AuthError("the token was used")
        return msgspec.structs.replace(now, tokens=(msgspec.structs.replace(token, used_ns=1),))

    control.update(lambda now: msgspec.structs.replace(now, tokens=(token,)))
    control.update(spend)
    before = control.root()
    with pytest.raises(AuthError):
        control.update(spend)
    assert control.root() == before


def test_a_lost_reply_of_the_swap_is_found_out(control: ControlStore, store: FaultyStore) -> None:
    store.plan(Fault("cas", "applied", prefix=ROOT))
    control.update(enrol(1))
    store.assert_all_hit()
    assert names(control) == ["m1"]


def test_a_lost_reply_is_found_out_when_others_came_after_it(
    control: ControlStore, store: FaultyStore, keys: VaultKeys
) -> None:
    class Busy(FaultyStore):
        def cas(self, name: str, body: Body, expected: str | None) -> str:
            super().cas(name, body, expected)
            ControlStore(store, keys).update(enrol(2))
            raise Unreachable("the reply was lost", where=name)

    busy = ControlStore(Busy(store), keys)
    busy.update(enrol(1))
    assert names(control) == ["m1", "m2"]


def test_a_swap_that_never_arrived_is_not_called_done(control: ControlStore, store: FaultyStore) -> None:
    store.plan(Fault("cas", "refused", prefix=ROOT))
    with pytest.raises(Unreachable):
        control.update(enrol(1))
    assert names(control) == []
    control.update(enrol(2))
    assert names(control) == ["m2"]


@pytest.mark.parametrize("place", ["vault.control.before_root", "vault.control.after_root"])
def test_a_crash_leaves_the_old_state_or_the_new_one(control: ControlStore, place: str) -> None:
    control.update(enrol(1))
    arm(f"{place}=raise")
    try:
        with pytest.raises(InjectedFault):
            control.update(enrol(2))
    finally:
        disarm()
    assert names(control) == (["m1"] if place.endswith("before_root") else ["m1", "m2"])
    control.update(enrol(3))
    assert names(control)[-1] == "m3"


def test_old_objects_are_dropped_and_the_newest_never(control: ControlStore, store: FaultyStore) -> None:
    for number in range(KEPT + 10):
        control.update(enrol(number))
    kept = sorted(store.list("control/"))
    assert len(kept) == KEPT + 1
    assert kept[-1] == control_name(control.root().control)
    assert len(names(control)) == KEPT + 10


def test_a_reader_with_an_old_root_reads_again(store: FaultyStore, keys: VaultKeys) -> None:
    control = ControlStore(store, keys)
    control.update(enrol(1))

    class Slow(FaultyStore):
        def get(self, name: str) -> bytes:
            if not self.calls.count(("get", name)) and name == control_name(1):
                for number in range(2, KEPT + 5):
                    control.update(enrol(number))
            return super().get(name)

    assert len(ControlStore(Slow(store), keys).load().machines) == KEPT + 4


def test_another_object_than_root_names_is_damage(control: ControlStore, store: FaultyStore) -> None:
    control.update(enrol(1))
    old = store.get(control_name(1))
    control.update(enrol(2))
    store.cas(control_name(2), old, store.get_with_etag(control_name(2))[1])
    with pytest.raises(IntegrityError, match="not the object that root names"):
        control.load()
    store.delete(control_name(2))
    with pytest.raises(IntegrityError, match="missing"):
        control.load()


def test_others_that_keep_coming_first_end_in_a_conflict(store: FaultyStore, keys: VaultKeys) -> None:
    class Unlucky(FaultyStore):
        def cas(self, name: str, body: Body, expected: str | None) -> str:
            raise Precondition("it has changed", where=name)

    with pytest.raises(Conflict, match="kept changing"):
        ControlStore(Unlucky(store), keys).update(enrol(1))


def test_no_secret_shows() -> None:
    server = ServerIdentity(id=bytes(16), certificate=b"C", key=b"SECRET")
    shown = repr(Control(ca_key=b"SECRET", server=server)) + repr(server)
    assert "SECRET" not in shown
