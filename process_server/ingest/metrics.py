"""Metrics of ingest. Lag is computed at the scrape, so it goes on growing when nothing arrives."""

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from process_server.ingest import ipc
from process_server.vault.store.metered import Meter


class StatusSource(Protocol):
    def status(self) -> dict[str, object]: ...


class IngestMetrics:
    """Counters that the service adds to, and gauges read from ``source.status()`` at each scrape.

    ``store`` counts what the main process asks of the store; the workers' counts are added to it.
    """

    def __init__(self, registry: CollectorRegistry, source: StatusSource, store: Meter) -> None:
        self.store = store
        self.received_bytes = Counter(
            "farshore_received_bytes_total", "Bytes of frames from agents, after TLS.", registry=registry
        )
        self.chunks = Counter(
            "farshore_chunks_total", "Chunks by what became of them.", ["result"], registry=registry
        )
        self.packed_bytes = Counter(
            "farshore_packed_bytes_total", "Plain bytes of new chunks.", registry=registry
        )
        self.stored_bytes = Counter(
            "farshore_stored_bytes_total", "Bytes of packs stored.", ["kind"], registry=registry
        )
        self.pack_uploads = Counter(
            "farshore_pack_uploads_total", "Packs stored or not.", ["result"], registry=registry
        )
        self.pack_upload_seconds = Histogram(
            "farshore_pack_upload_seconds", "Time to store a pack.", registry=registry
        )
        self.ack_seconds = Histogram(
            "farshore_ack_latency_seconds",
            "From the arrival of a MARK to its vaulted acknowledgement.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )
        self.commits = Counter("farshore_commits_total", "Commits created.", registry=registry)
        self.repeats = Counter(
            "farshore_repeated_batches_total",
            "Batches that had come before and were ignored.",
            registry=registry,
        )
        self.refused_frames = Counter(
            "farshore_corrupt_frames_total", "Frames refused, by ERROR code.", ["source"], registry=registry
        )
        self.auth_failures = Counter(
            "farshore_auth_failures_total", "Identities refused.", ["reason"], registry=registry
        )
        self.worker_deaths = Counter(
            "farshore_ingest_worker_deaths_total", "Workers that died and were replaced.", registry=registry
        )
        registry.register(_Gauges(source))
        registry.register(store)

    def count(self, counts: ipc.Counts) -> None:
        self.received_bytes.inc(counts.wire_bytes)
        self.chunks.labels("new").inc(counts.chunks_new)
        self.chunks.labels("dup").inc(counts.chunks_found)
        self.chunks.labels("zero").inc(counts.chunks_zero)
        self.packed_bytes.inc(counts.plain_bytes)
        self.repeats.inc(counts.repeats)

    def pack_stored(self, stored: ipc.PackStored) -> None:
        self.pack_uploads.labels("failed" if stored.error else "stored").inc()
        if not stored.error:
            self.stored_bytes.labels("data").inc(stored.bytes)
            self.pack_upload_seconds.observe(stored.duration_s)


class _Gauges(Collector):
    def __init__(self, source: StatusSource) -> None:
        self._source = source

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        connected = GaugeMetricFamily(
            "farshore_agent_connected", "1 while HELLO stands answered.", labels=["machine"]
        )
        rpo = GaugeMetricFamily(
            "farshore_rpo_seconds",
            "Age of the newest state that could be recovered; absent when it is not known.",
            labels=["machine"],
        )
        backlog = GaugeMetricFamily(
            "farshore_agent_log_backlog_bytes",
            "Journal bytes not yet vaulted, as the agent said last.",
            labels=["machine", "volume"],
        )
        machines = self._source.status()["machines"]
        assert isinstance(machines, list)
        for machine in machines:
            name = machine["name"]
            connected.add_metric([name], float(machine["state"] != "disconnected"))
            if machine["rpo_seconds"] is not None:
                rpo.add_metric([name], machine["rpo_seconds"])
            for volume in machine["volumes"]:
                if volume["backlog_bytes"] is not None:
                    backlog.add_metric([name, volume["name"]], volume["backlog_bytes"])
        yield connected
        yield rpo
        yield backlog
