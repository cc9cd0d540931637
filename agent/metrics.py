"""What an agent shows on port 9105, and the one place where it is counted."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from agent.journal.state import DATA
from agent.link import REASONS
from agent.replicate.replica import Replica

STATES = (
    "initial-replication",
    "protected",
    "resync-required",
    "resync",
    "paused",
    "degraded",
    "failed",
)


class Metrics:
    """Counters of the replicating process; the gauges of volumes are taken when somebody looks."""

    def __init__(self, registry: CollectorRegistry, replicas: Callable[[], Iterable[Replica]]) -> None:
        self._sent = Counter(
            "farshore_sent_bytes_total",
            "Bytes sent to the process server: data before compression and TLS, and everything on the wire.",
            ["stage"],
            registry=registry,
        )
        self._reconnects = Counter(
            "farshore_reconnects_total", "Links that ended, by reason.", ["reason"], registry=registry
        )
        self._connected = Gauge(
            "farshore_agent_connected", "1 while HELLO was answered with WELCOME.", registry=registry
        )
        self._copied = Counter(
            "farshore_agent_copied_bytes_total",
            "Bytes of disks that copiers dealt with: sent, referenced (the server had them), zero, same.",
            ["result"],
            registry=registry,
        )
        self._points = Counter(
            "farshore_agent_cuts_vaulted_total", "Acknowledgements of vaulted cuts.", registry=registry
        )
        self._tap_restarts = Counter(
            "farshore_agent_tap_restarts_total",
            "Taps started after one ended unexpectedly.",
            registry=registry,
        )
        for stage in ("raw", "wire"):
            self._sent.labels(stage)
        for reason in REASONS:
            self._reconnects.labels(reason)
        for result in ("sent", "referenced", "zero", "same"):
            self._copied.labels(result)
        registry.register(_Volumes(replicas))

    def sent(self, stage: str, count: int) -> None:
        self._sent.labels(stage).inc(count)

    def record(self, what: str, count: int) -> None:
        """Count something of a session: ``points`` or ``<result>_bytes``."""
        if what == "points":
            self._points.inc(count)
        else:
            self._copied.labels(what.removesuffix("_bytes")).inc(count)

    def connected(self) -> None:
        self._connected.set(1)

    def disconnected(self, reason: str) -> None:
        self._connected.set(0)
        self._reconnects.labels(reason if reason in REASONS else "internal").inc()

    def tap_restarted(self) -> None:
        self._tap_restarts.inc()


class _Volumes(Collector):
    """Per volume, straight from the tap's state pages at the moment of the scrape."""

    def __init__(self, replicas: Callable[[], Iterable[Replica]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, text, labels=["volume"])

        lsns = {
            "captured_lsn": gauge("farshore_agent_captured_lsn", "Highest LSN given to a record."),
            "durable_lsn": gauge("farshore_agent_durable_lsn", "Highest LSN that is durable in the journal."),
            "applied_lsn": gauge("farshore_agent_applied_lsn", "Highest LSN written to the disk."),
            "stable_lsn": gauge("farshore_agent_stable_lsn", "LSN up to which the disk itself is durable."),
        }
        vaulted = gauge("farshore_agent_vaulted_lsn", "Highest LSN known to be vaulted.")
        backlog = gauge("farshore_agent_log_backlog_bytes", "Journal that is not vaulted, whole segments.")
        dirty = gauge("farshore_agent_dirty_regions", "Regions of the dirty map that are set.")
        mode = gauge("farshore_agent_data_mode", "1 while every write is logged with its data.")
        scan_age = gauge(
            "farshore_agent_scan_age_seconds", "Since the newest whole pass over a scanned disk began."
        )
        remaining = gauge("farshore_resync_remaining_bytes", "Still to copy or compare.")
        state_family = GaugeMetricFamily(
            "farshore_replication_state", "1 for the state a volume is in.", labels=["volume", "state"]
        )
        for replica in list(self._replicas()):
            labels = [replica.spec.name]
            here = replica.name_state()
            for state in STATES:
                state_family.add_metric([*labels, state], float(state == here))
            vaulted.add_metric(labels, replica.vaulted_lsn)
            remaining.add_metric(labels, replica.unsynced_bytes())
            if (age_s := replica.scan_age_s()) is not None:
                scan_age.add_metric(labels, age_s)
            page = replica.state_or_none()
            if page is None:
                continue
            for field, family in lsns.items():
                family.add_metric(labels, getattr(page, field))
            backlog.add_metric(labels, replica.backlog_bytes())
            dirty.add_metric(labels, page.dirty_regions)
            mode.add_metric(labels, float(page.capture_mode == DATA))
        yield from (*lsns.values(), vaulted, backlog, dirty, mode, scan_age, remaining, state_family)
