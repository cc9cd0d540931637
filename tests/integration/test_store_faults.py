"""Real object stores behind a proxy that loses, cuts and refuses: what is told of it, and what never is."""

import json
import os
import threading
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from farshore.errors import NotFound, Unreachable
from process_server.vault.chain import Chain
from process_server.vault.commit import ROW_DTYPE, ZEROS, CommitVolume
from process_server.vault.control import Control, ControlStore, Machine
from process_server.vault.keys import VaultKeys, create_vault
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.store.address import parse_object_address
from process_server.vault.store.object import ObjectStore
from process_server.vault.store.probe import probe
from process_server.vault.store.protocol import AlreadyExists, Precondition, Store
from process_server.vault.store.retrying import RetryingStore
from process_server.vault.store.settle import put_same
from tests.harness.fault_proxy import FaultProxy, How, Storm, Trouble
from tests.harness.faults import Injected
from tests.harness.object_stores import Peer

pytestmark = pytest.mark.timeout(300)

FAULT = {"reset": "F18", "503": "F18", "slow": "F18", "lost": "F19", "cut": "F20"}
every_fault = pytest.mark.fault(*sorted(set(FAULT.values())))


@pytest.fixture(
    params=[
        pytest.param("seaweedfs", marks=pytest.mark.needs("weed")),
        pytest.param("azurite", marks=pytest.mark.needs("azurite-blob")),
    ]
)
def peer(request: pytest.FixtureRequest) -> Peer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Peer)
    return found


@pytest.fixture
def proxy(peer: Peer) -> Iterator[FaultProxy]:
    with FaultProxy(peer.port) as proxy:
        yield proxy


@pytest.fixture
def url(peer: Peer, proxy: FaultProxy) -> str:
    return peer.url(proxy.port)


@pytest.fixture
def store(url: str) -> Store:
    return patient(url)


def patient(url: str) -> Store:
    """As `open_store`, but with pauses that suit a store on this host, and time for a storm."""
    return RetryingStore(ObjectStore(parse_object_address(url)), total_s=120, pause_s=(0.01, 0.05))


def puts(proxy: FaultProxy) -> int:
    return sum(method == "PUT" for method, _ in proxy.requests)


def happened(proxy: FaultProxy, injected: Injected, *hows: How) -> None:
    """Count the faults that struck as those of the kinds that were planned."""
    count = proxy.clear()
    assert count, "nothing went wrong"
    for fault in {FAULT[how] for how in hows}:
        injected(fault, count)


@pytest.mark.fault("F18")
@pytest.mark.parametrize("how", ["reset", "503"])
def test_a_create_that_the_store_never_heard_of_is_made_again(
    store: Store, proxy: FaultProxy, how: How, injected: Injected
) -> None:
    proxy.plan(Trouble(how, "PUT", count=2))
    store.put_new("c/m/1", b"ours")
    happened(proxy, injected, how)
    assert store.get("c/m/1") == b"ours"
    assert puts(proxy) == 3


@every_fault
@pytest.mark.parametrize("how", ["lost", "cut"])
@pytest.mark.parametrize("length", [0, 1000, 3 * 2**20])
def test_a_create_whose_answer_is_lost_is_ours(
    store: Store, proxy: FaultProxy, how: How, length: int, injected: Injected
) -> None:
    body = os.urandom(length)
    proxy.plan(Trouble(how, "PUT", count=2))
    store.put_new("c/m/1", body)
    happened(proxy, injected, "lost", "cut", "reset")
    assert store.get("c/m/1") == body
    with pytest.raises(AlreadyExists):
        store.put_new("c/m/1", body)
    with pytest.raises(AlreadyExists):
        put_same(store, "c/m/1", body + b"x")


@pytest.mark.fault("F18", "F19")
@pytest.mark.parametrize("how", ["reset", "lost"])
def test_a_create_that_meets_another_s_object_is_never_called_ours(
    store: Store, proxy: FaultProxy, how: How, injected: Injected
) -> None:
    store.put_new("c/m/1", b"theirs")
    proxy.plan(Trouble(how, "PUT", count=2))
    with pytest.raises(AlreadyExists):
        store.put_new("c/m/1", b"ours!!")
    happened(proxy, injected, "reset", "lost")
    assert store.get("c/m/1") == b"theirs"


@every_fault
@pytest.mark.parametrize("how", ["lost", "cut", "reset"])
def test_a_swap_whose_answer_is_lost_is_done_once(
    store: Store, proxy: FaultProxy, how: How, injected: Injected
) -> None:
    first = store.cas("root", b"1", None)
    proxy.plan(Trouble(how, "PUT", count=1))
    second = store.cas("root", b"2", first)
    assert store.get_with_etag("root") == (b"2", second)
    proxy.plan(Trouble(how, "PUT", count=1))
    with pytest.raises(Precondition):
        store.cas("root", b"3", first)
    happened(proxy, injected, "lost", "cut", "reset")
    assert store.get("root") == b"2"


@every_fault
@pytest.mark.parametrize("seed", [1, 2])
def test_of_many_swaps_in_a_storm_none_is_lost_and_none_done_twice(
    url: str, store: Store, proxy: FaultProxy, seed: int, injected: Injected
) -> None:
    store.cas("root", b"[]", None)
    proxy.plan(Storm(seed, 0.2, "reset", "lost", "503", "cut"))

    def add(writer: int) -> None:
        mine = patient(url)
        for number in range(8):
            token = f"{writer}-{number}"
            while True:
                body, etag = mine.get_with_etag("root")
                there = json.loads(body)
                if token in there:  # ours, overtaken before we heard of it
                    break
                try:
                    mine.cas("root", json.dumps([*there, token]).encode(), etag)
                except Precondition:
                    continue
                break

    run_together([lambda writer=writer: add(writer) for writer in range(4)])  # type: ignore[misc]
    happened(proxy, injected, "reset", "lost", "cut")
    there = json.loads(store.get("root"))
    assert sorted(there) == sorted(f"{writer}-{number}" for writer in range(4) for number in range(8))
    for writer in range(4):  # each writer's in its order: none came late a second time
        assert [token for token in there if token.startswith(f"{writer}-")] == [
            f"{writer}-{number}" for number in range(8)
        ]


@pytest.mark.fault("F20")
@pytest.mark.parametrize("length", [1, 2, 1000, 5 * 2**20])
def test_half_an_answer_is_never_taken_for_the_object(
    peer: Peer, proxy: FaultProxy, length: int, injected: Injected
) -> None:
    url, body = peer.url(proxy.port), os.urandom(length)
    once, again = ObjectStore(parse_object_address(url)), patient(url)
    again.put_new("x", body)
    reads: list[Callable[[Store], bytes]] = [
        lambda store: store.get("x"),
        lambda store: store.get_with_etag("x")[0],
        lambda store: store.get_range("x", 0, length),
    ]
    for read in reads:
        proxy.plan(Trouble("cut", "GET"))
        with pytest.raises(Unreachable):
            read(once)
        proxy.plan(Trouble("cut", "GET", count=2))
        assert read(again) == body
    happened(proxy, injected, "cut")


@pytest.mark.fault("F18", "F20")
@pytest.mark.parametrize("how", ["reset", "503", "cut"])
def test_a_listing_that_breaks_off_is_begun_again_and_says_no_name_twice(
    store: Store, proxy: FaultProxy, how: How, injected: Injected
) -> None:
    names = {f"p/aa/{number}" for number in range(20)}
    for name in names:
        store.put_new(name, b"")
    proxy.plan(Trouble(how, "GET", count=2))
    assert sorted(store.list("p/")) == sorted(names)
    happened(proxy, injected, "reset", "cut")


@pytest.mark.fault("F18", "F19")
def test_deleting_and_asking_for_what_is_not_there_are_the_same_in_a_storm(
    store: Store, proxy: FaultProxy, injected: Injected
) -> None:
    store.put_new("x", b"1")
    proxy.plan(Trouble("lost", "DELETE|POST"), Trouble("503", "GET"))
    store.delete("x")
    with pytest.raises(NotFound):
        store.get("x")
    happened(proxy, injected, "lost", "reset")


@pytest.mark.fault("F18")
def test_a_store_that_is_busy_is_asked_little_more_than_once_for_each_refusal(
    store: Store, proxy: FaultProxy, injected: Injected
) -> None:
    proxy.plan(Trouble("503", count=3))
    store.put_new("x", b"1")
    happened(proxy, injected, "503")
    assert len(proxy.requests) == 4


@pytest.mark.fault("F18")
def test_a_slow_answer_is_waited_for(store: Store, proxy: FaultProxy, injected: Injected) -> None:
    proxy.plan(Trouble("slow", "PUT"))
    store.put_new("x", b"1")
    happened(proxy, injected, "slow")
    assert len(proxy.requests) == 1


@every_fault
def test_the_probe_is_content_in_a_storm(store: Store, proxy: FaultProxy, injected: Injected) -> None:
    proxy.plan(Storm(4, 0.3, "reset", "lost", "503", "cut"))
    probe(store)
    happened(proxy, injected, "reset", "lost", "cut")


KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
MACHINE, VOLUME = b"M" * 16, b"V" * 16


def append(chain: Chain, lsn: int) -> tuple[int, bytes]:
    table = np.zeros(1, ROW_DTYPE)
    table[0] = (0, 512, lsn, 0, ZEROS, 0, 0, 0)
    volume = CommitVolume(
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
    return chain.append(
        machine_name="db1",
        time_ns=lsn,
        cut_seq=lsn,
        tag=None,
        consistency="crash",
        volumes=[volume],
        rows_by_volume={VOLUME: table},
    )


@every_fault
@pytest.mark.parametrize("seed", [5, 6])
def test_no_owner_is_fenced_by_its_own_commits(
    store: Store, proxy: FaultProxy, seed: int, injected: Injected
) -> None:
    chain = Chain(store, KEYS, MACHINE, b"u" * 16)
    proxy.plan(Storm(seed, 0.3, "reset", "lost", "503", "cut"))
    chain.fence(machine_name="db1", time_ns=0)
    for lsn in range(1, 31):
        append(chain, lsn)
    happened(proxy, injected, "reset", "lost", "cut")
    assert chain.is_owner
    commits = list(Chain(store, KEYS, MACHINE).iterate())
    assert [commit.head.seq for commit in commits] == list(range(1, 32))
    assert [commit.head.volumes[0].lsn for commit in commits[1:]] == list(range(1, 31))


@every_fault
def test_no_change_of_the_settings_is_lost_or_made_twice(
    url: str, store: Store, proxy: FaultProxy, injected: Injected
) -> None:
    keys = create_vault(store, RecoveryKey.generate(), bytes(32))
    proxy.plan(Storm(7, 0.15, "reset", "lost", "503", "cut"))

    def enrol(number: int) -> Callable[[Control], Control]:
        machine = Machine(id=bytes([number + 1]) * 16, name=f"m{number}", public_key=b"k", created_ns=1)

        def change(control: Control) -> Control:
            assert control.machine(machine.id) is None, "made twice"
            return msgspec.structs.replace(control, machines=(*control.machines, machine))

        return change

    def work(first: int) -> None:
        mine = ControlStore(patient(url), keys)
        for number in range(first, first + 4):
            mine.update(enrol(number))

    run_together([lambda first=first: work(first) for first in (0, 4, 8)])  # type: ignore[misc]
    happened(proxy, injected, "reset", "lost", "cut")
    control = ControlStore(store, keys).load()
    assert sorted(machine.name for machine in control.machines) == sorted(
        f"m{number}" for number in range(12)
    )


def run_together(calls: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
