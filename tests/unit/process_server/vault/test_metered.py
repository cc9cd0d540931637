"""What the store is asked is counted where it is asked, and shown in one place."""

import contextlib

from prometheus_client import CollectorRegistry, generate_latest

from farshore.errors import FarshoreError
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.metered import Meter, MeteredStore
from tests.fakes.store import Fault, FaultyStore


def scrape(meter: Meter) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(meter)
    lines = generate_latest(registry).decode().splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")
    }


def use(meter: Meter) -> None:
    store = MeteredStore(FaultyStore(MemoryStore(), Fault("put_new", "refused", hit=2)), meter)
    store.put_new("x", [b"abc", b"de"])
    for call in (
        lambda: store.put_new("y", b"lost"),
        lambda: store.put_new("x", b"again"),
        lambda: store.get("nothing"),
        lambda: store.cas("x", b"1", "another"),
    ):
        with contextlib.suppress(FarshoreError):
            call()
    store.get_range("x", 1, 2)
    store.get("x")
    assert list(store.list("")) == ["x"]


def test_requests_are_counted_by_operation_and_outcome() -> None:
    meter = Meter()
    use(meter)
    shown = scrape(meter)
    assert shown['farshore_blob_requests_total{code="ok",op="put"}'] == 1
    assert shown['farshore_blob_requests_total{code="unreachable",op="put"}'] == 1
    assert shown['farshore_blob_requests_total{code="exists",op="put"}'] == 1
    assert shown['farshore_blob_requests_total{code="not_found",op="get"}'] == 1
    assert shown['farshore_blob_requests_total{code="precondition",op="cas"}'] == 1
    assert shown["farshore_blob_cas_conflicts_total"] == 1
    assert shown['farshore_blob_bytes_total{op="put"}'] == 5
    assert shown['farshore_blob_bytes_total{op="get_range"}'] == 2
    assert shown['farshore_blob_request_seconds_count{op="put"}'] == 3
    assert shown['farshore_blob_request_seconds_bucket{le="+Inf",op="put"}'] == 3


def test_what_workers_counted_is_added_once() -> None:
    alone, workers, shown = Meter(), Meter(), Meter()
    use(alone)
    use(workers)
    shown.add(workers.take())
    assert workers.take() == ()
    counts = {name: value for name, value in scrape(shown).items() if "seconds" not in name}
    assert counts == {name: value for name, value in scrape(alone).items() if "seconds" not in name}


def test_a_slow_request_is_in_the_buckets_above_its_time() -> None:
    meter = Meter()
    meter.note("get", "ok", 0, 0.3)
    meter.note("get", "ok", 0, 1000.0)
    shown = scrape(meter)
    assert shown['farshore_blob_request_seconds_bucket{le="0.25",op="get"}'] == 0
    assert shown['farshore_blob_request_seconds_bucket{le="0.5",op="get"}'] == 1
    assert shown['farshore_blob_request_seconds_bucket{le="60.0",op="get"}'] == 1
    assert shown['farshore_blob_request_seconds_bucket{le="+Inf",op="get"}'] == 2
