"""One machine in the main process: its chain, the cuts that wait, and the one commit that is on its way.

Commits of a chain are created strictly one after another, each from the oldest cuts that wait. The session
may end, and a new one begin, while a cut still waits: what its MARK covered is complete, so it is committed
all the same; the next WELCOME comes after it.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from farshore.clock import Clock
from farshore.errors import Failed, FarshoreError, Fenced
from farshore.failpoints import failpoint
from farshore.telemetry import get_logger
from farshore.units import MIB
from farshore.wire import messages as m
from process_server.ingest import stream
from process_server.ingest.resync import BlockTable
from process_server.ingest.rpo import MachineRpo
from process_server.ingest.session import VOLUMES_MAX, Cut, Session
from process_server.ingest.stream import VolumeCut
from process_server.vault.chain import Chain
from process_server.vault.commit import CommitHead, CommitVolume, Consistency, Rows, point_id

COMMIT_BYTES: Final = 8 * MIB
INLINE_BYTES_MAX: Final = MIB
"""Packs of one commit that travel inside it: one PUT for light churn, at the price of no dedup on them."""
CUTS_MAX: Final = 256
RETRY_S: Final = (0.2, 10.0)
RECENT_POINTS: Final = 256

log = get_logger()


class PacksLost(Failed):
    """A pack that rows point into was not stored: its session starts again from what is vaulted."""


@dataclass(frozen=True, slots=True)
class InlinePack:
    """A small pack that a worker handed over instead of storing it."""

    id: bytes
    body: bytes
    ids: bytes


class Sessions(Protocol):
    """What a machine says of its sessions; `process_server.ingest.sessions` answers."""

    def forget(self, session: Session) -> None:
        """Nothing of ``session`` waits any more."""
        ...

    def end_session(self, session: Session, code: str, text: str) -> None:
        """End ``session`` with ERROR ``code``."""
        ...


class Packs(Protocol):
    """What a machine asks of the workers and the store; `PacksUnderWay` answers."""

    async def flush(self, session: Session, inline_bytes: int) -> list[InlinePack]:
        """Seal every open pack of ``session``. Raises PacksLost."""
        ...

    async def store(self, session: Session, pack: InlinePack) -> None:
        """Store a pack that cannot lie inside a commit. Raises FarshoreError."""
        ...

    async def stored(self, session: Session, packs: set[bytes]) -> None:
        """Wait until none of ``packs`` is on its way any more. Raises PacksLost."""
        ...


@dataclass(frozen=True, slots=True)
class Committed:
    """A cut's outcome: the point, new or the one that already has this very state."""

    seq: int
    point: str
    consistency: str
    new: bool


@dataclass(slots=True)
class Head:
    """Where the vault stands with the machine.

    Attributes:
        seq: Of the newest commit of kind ``data``, 0 without one; a fence repeats its volumes.
    """

    seq: int = 0
    time_ns: int = 0
    volumes: dict[bytes, CommitVolume] = field(default_factory=dict)

    @property
    def consistency(self) -> Consistency:
        fuzzy = not self.seq or any(volume.fuzzy for volume in self.volumes.values())
        return "fuzzy" if fuzzy else "crash"


class Machine:
    """Everything the server keeps of one machine while it runs.

    Args:
        committed: Called with each new commit's head and rows, after the agent was told.
        pace_s: A cut without a tag waits until that long after the commit before.
    """

    def __init__(
        self,
        id: bytes,
        name: str,
        chain: Chain,
        head: Head,
        packs: Packs,
        sessions: Sessions,
        clock: Clock,
        *,
        pace_s: float,
        committed: Callable[["Machine", CommitHead, dict[bytes, Rows]], Awaitable[None]],
        generation: int = 0,
    ) -> None:
        self.id, self.name = id, name
        self.chain, self.head = chain, head
        self.session: Session | None = None
        self.rpo = MachineRpo()
        self.fenced = False
        self.denied = False
        self.connected_at: float | None = None
        self.outcomes: dict[tuple[bytes, int], Committed] = {}
        self.changed = asyncio.Condition()
        self.cuts: deque[Cut] = deque()
        self.tables: dict[bytes, asyncio.Task[BlockTable | None]] = {}
        self._packs, self._sessions = packs, sessions
        self._clock, self._pace_s, self._committed = clock, pace_s, committed
        self._wake = asyncio.Event()
        self._committing: list[Cut] = []
        self._last_commit = -1e9
        self._idle_since_ns: int | None = None
        self._generation = generation
        self._removed: set[bytes] = set()
        self._note_rpo()

    async def own(self, epoch_seen: int) -> None:
        """Own the chain: with a fence, unless it is ours already. Nothing waits when this is called.

        Raises:
            Fenced: The agent has seen a newer owner than the chain shows us.
            FarshoreError: Of the store.
        """
        if self.chain.is_pending:
            await asyncio.to_thread(self.chain.settle)
            self.head = await asyncio.to_thread(read_head, self.chain)
        if not self.chain.is_owner or epoch_seen > self.chain.epoch:
            await asyncio.to_thread(self.chain.load_head)
            if epoch_seen > self.chain.epoch:
                raise Fenced("the agent has seen a newer owner of this chain", where=self.name)
            failpoint("ingest.before_fence")
            await asyncio.to_thread(
                self.chain.fence,
                machine_name=self.name,
                time_ns=self._clock.wall_ns(),
                generation=self._generation,
            )
            self.head = await asyncio.to_thread(read_head, self.chain)
            self.fenced = False
            log.info("chain_owned", machine=self.name, epoch=self.chain.epoch, seq=self.chain.seq)
        self._note_rpo()

    def _note_rpo(self) -> None:
        fuzzy = {id for id, entry in self.head.volumes.items() if entry.fuzzy}
        self.rpo.vaulted(self.positions(), offerable=self.head.consistency == "crash", fuzzy=fuzzy)

    def positions(self) -> dict[bytes, tuple[bytes, int, int]]:
        return {id: (entry.incarnation, entry.ordinal, entry.lsn) for id, entry in self.head.volumes.items()}

    def position(self, volume: bytes) -> m.VolumePosition | None:
        """Return what WELCOME says of ``volume``, or None when the vault has nothing of it."""
        entry = self.head.volumes.get(volume)
        if entry is None:
            return None
        return m.VolumePosition(
            volume,
            entry.incarnation,
            entry.ordinal,
            entry.lsn,
            entry.digest,
            entry.copied,
            entry.copy_end,
            empty=False,
        )

    def protects(self, named: Collection[bytes], protected: Collection[bytes] | None) -> None:
        """HELLO came: what else the vault has of this machine is protected no more.

        Args:
            named: Volumes that it introduced.
            protected: All that it protects; None: it did not say, so nothing is given up.
        """
        if protected is not None:
            self._removed |= self.head.volumes.keys() - set(protected)
        self._removed -= set(named)

    def add_volume(self, volume: bytes) -> None:
        """A volume is protected, from now on or again."""
        self._removed.discard(volume)

    def remove_volume(self, volume: bytes) -> None:
        """A volume is protected no more: cuts from here on are whole without it."""
        if volume in self.head.volumes or volume in self._queued():
            self._removed.add(volume)

    def kept(self, named: Mapping[bytes, str]) -> list[CommitVolume]:
        """Return the volumes that a cut over others leaves out though they are protected.

        A point of a machine has all its volumes, and the newest commit alone says where each stands: left
        out, a volume would be missing in every recovery from here on, and be compared as a whole when it is
        back. So it stays where it was, fuzzy, since beside newer states of the others that never was so.

        Args:
            named: Ids and names of the cut's volumes. A name that another volume has now was given up.
        """
        names = set(named.values())
        kept = [
            msgspec.structs.replace(entry, fuzzy=True, extents=0)
            for id, entry in self.head.volumes.items()
            if id not in named and id not in self._removed and entry.name not in names
        ]
        # As many as a session may introduce: one after another, with others each time, must not add up.
        return kept[: max(0, VOLUMES_MAX - len(named))]

    def add(self, cut: Cut) -> None:
        """Queue a cut for its commit."""
        self.cuts.append(cut)
        self._wake.set()

    @property
    def busy(self) -> bool:
        return bool(self.cuts or self._committing)

    def waiting(self) -> list[Cut]:
        return [*self._committing, *self.cuts]

    def _queued(self) -> set[bytes]:
        return {volume.volume for cut in self.waiting() for volume in cut.volumes}

    async def settled(self) -> None:
        """Wait until no cut waits: then the head is all that a new session can build on."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self.busy)

    async def run(self) -> None:
        """Commit what comes, until cancelled. A commit under way when cancelled may or may not happen."""
        while True:
            await self._due()
            group = self._committing = self._group()
            session = group[-1].session
            try:
                await self._commit(group)
            except Fenced as exc:
                self.fenced = True
                log.error("machine_superseded", machine=self.name, error=str(exc))
                self._drop(session, "superseded", str(exc))
            except PacksLost as exc:
                log.warning("packs_lost", machine=self.name, error=str(exc))
                self._drop(session, "retry", exc.what)
            except FarshoreError as exc:
                log.error("commit_failed", machine=self.name, error=str(exc))
                self._drop(session, "retry" if exc.retryable else "internal", exc.what)
            except Exception as exc:
                log.exception("commit_failed", machine=self.name)
                self._drop(session, "internal", f"the server failed on this commit: {type(exc).__name__}")
            finally:
                self._committing = []
                if session.ended:
                    self.forget(session)
                async with self.changed:
                    self.changed.notify_all()

    def _drop(self, session: Session, code: str, text: str) -> None:
        """Forget the cuts of a session that cannot be committed, and end it."""
        self.cuts = deque(cut for cut in self.cuts if cut.session is not session)
        self._sessions.end_session(session, code, text)

    async def _due(self) -> None:
        """Wait until the oldest cuts are worth, or old enough for, a commit."""
        while True:
            self._wake.clear()
            if self.cuts:
                now = self._clock.monotonic()
                wait_s = self._last_commit + self._pace_s - now
                waiting_bytes = sum(cut.record_bytes for cut in self.cuts)
                urgent = any(cut.tag is not None or cut.copies or cut.session.ended for cut in self.cuts)
                if wait_s <= 0 or urgent or waiting_bytes >= COMMIT_BYTES:
                    return
                try:
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()
                except TimeoutError:
                    return
            else:
                await self._wake.wait()

    def _group(self) -> list[Cut]:
        """Take the cuts of the next commit: up to a tag, and never a copy behind somebody's records.

        A copy may stand for writes that no record carries (bitmap mode, a resync). Records from before those
        writes would lie over it if they were in one commit.
        """
        group = [self.cuts.popleft()]
        while self.cuts and group[-1].tag is None:
            following = self.cuts[0]
            if following.copies or following.session is not group[0].session:
                break
            if any(
                cut.position.incarnation != before.position.incarnation
                for cut in following.volumes
                for before in group[-1].volumes
                if before.volume == cut.volume
            ):
                break
            group.append(self.cuts.popleft())
        return group

    async def _commit(self, group: Sequence[Cut]) -> None:
        last = group[-1]
        session = last.session
        volumes: list[VolumeCut] = list(group[0].volumes)
        for cut in group[1:]:
            volumes = stream.merge(volumes, cut.volumes)
        entries = [_entry(cut) for cut in volumes]
        consistency = stream.consistency(volumes)
        if kept := self.kept({entry.id: entry.name for entry in entries}):
            if not all(self.head.volumes[entry.id].fuzzy for entry in kept):
                names = [entry.name for entry in kept]
                log.warning("volumes_left_out", machine=self.name, volumes=names)
            entries += kept
            consistency = "fuzzy"
        if last.tag is None and not any(cut.rows() for cut in volumes) and self._same(entries):
            self._idle_since_ns = last.time_ns
            self._finished(group, Committed(self.head.seq, self._point(), self.head.consistency, new=False))
            return
        inline: list[InlinePack] = []
        if session.unstored:
            inline = await self._packs.flush(session, INLINE_BYTES_MAX)
        tables, packs = stream.assemble(volumes, session.packs.ids)
        inside = await self._place(session, inline, set(packs))
        failpoint("ingest.before_packs_stored")
        await self._packs.stored(session, set(packs) - {pack.id for pack in inside})
        failpoint("ingest.before_commit")
        await self._append(last, consistency, entries, tables, packs, inside)
        failpoint("ingest.after_commit")
        head = self.chain.head
        assert head is not None
        for pack in inside:
            session.unstored.discard(pack.id)
        self._idle_since_ns = None
        self._last_commit = self._clock.monotonic()
        self.head = Head(head.seq, head.time_ns, {volume.id: volume for volume in head.volumes})
        self._removed &= self.head.volumes.keys() | self._queued()
        self._finished(group, Committed(head.seq, self._point(), consistency, new=True))
        await self._committed(self, head, tables)

    async def _place(
        self, session: Session, inline: Sequence[InlinePack], named: set[bytes]
    ) -> list[InlinePack]:
        """Decide which handed-over packs lie inside the commit; store those that other rows need too."""
        elsewhere = session.remaining_packs()
        for cut in self.cuts:
            if cut.session is session:
                elsewhere |= session.packs_of(table for volume in cut.volumes for table in volume.rows())
        inside: list[InlinePack] = []
        room = INLINE_BYTES_MAX
        for pack in inline:
            if pack.id in named and pack.id not in elsewhere and len(pack.body) <= room:
                room -= len(pack.body)
                inside.append(pack)
            elif pack.id in named or pack.id in elsewhere:
                await self._packs.store(session, pack)
            else:
                session.unstored.discard(pack.id)
        return inside

    async def _append(
        self,
        cut: Cut,
        consistency: Consistency,
        entries: Sequence[CommitVolume],
        tables: dict[bytes, Rows],
        packs: Sequence[bytes],
        inside: Sequence[InlinePack],
    ) -> None:
        """Create the commit; while the store does not answer, ask again with the very same bytes."""

        def append() -> None:
            self.chain.append(
                machine_name=self.name,
                time_ns=cut.time_ns,
                cut_seq=cut.cut_seq,
                tag=cut.tag,
                consistency=consistency,
                volumes=entries,
                rows_by_volume=tables,
                pack_ids=packs,
                inline_packs={pack.id: pack.body for pack in inside},
                idle_since_ns=self._idle_since_ns,
                generation=self._generation,
            )

        pause_s, longest_s = RETRY_S
        step: Callable[[], object] = append
        while True:
            try:
                await asyncio.to_thread(step)
                return
            except FarshoreError as exc:
                if not self.chain.is_pending:
                    raise
                log.warning("commit_not_answered", machine=self.name, error=str(exc), pause_s=pause_s)
            step = self.chain.settle
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, longest_s)

    def _finished(self, group: Sequence[Cut], outcome: Committed) -> None:
        """Tell the agent, and everybody who waits for a cut. Synchronous: vaulted and told are one step."""
        last = group[-1]
        session = last.session
        for cut in group:
            self.outcomes[session.id, cut.cut_seq] = outcome
        while len(self.outcomes) > RECENT_POINTS:
            del self.outcomes[next(iter(self.outcomes))]
        self._note_rpo()
        session.count_rows(cut for cut in self.cuts if cut.session is session)
        if not session.ended:
            session.link.send(
                m.Ack(
                    "vaulted",
                    last.cut_seq,
                    outcome.seq,
                    outcome.point,
                    outcome.consistency,
                    tuple(
                        m.Vaulted(id, entry.incarnation, entry.lsn, entry.digest)
                        for id, entry in self.head.volumes.items()
                    ),
                )
            )

    def _same(self, entries: Sequence[CommitVolume]) -> bool:
        """Tell whether the newest commit already has exactly this cut."""
        here = self.head.volumes
        return (
            bool(self.head.seq)
            and len(entries) == len(here)
            and all(
                entry.id in here and msgspec.structs.replace(here[entry.id], extents=0) == entry
                for entry in entries
            )
        )

    def forget(self, session: Session) -> None:
        """``session`` ended. Its cuts are complete and stay; once none waits, the workers may forget it."""
        if not any(cut.session is session for cut in self.waiting()):
            self._sessions.forget(session)
        self._wake.set()

    def status(self, now: float, point_interval_s: float) -> dict[str, object]:
        """Return the machine's part of ``farshore status --json``. Called in the metrics thread, too."""
        session = self.session
        rpo_s = self.rpo.rpo_s(now)
        usual_s = max(RPO_TARGET_MIN_S, 10 * point_interval_s)
        target_s = usual_s
        volumes: list[dict[str, object]] = []
        states: list[str] = []
        late: list[tuple[str, float, float]] = []
        fuzzy: list[str] = []
        failed: list[tuple[str, str]] = []
        ids = list(session.volumes if session is not None else self.head.volumes)
        left_out: list[CommitVolume] = []
        if session is not None:
            left_out = self.kept({id: session.volumes[id].name for id in ids})
        for id in [*ids, *(entry.id for entry in left_out)]:
            entry = self.head.volumes.get(id)
            stream = session.volumes.get(id) if session is not None else None
            status = session.status.get(id) if session is not None else None
            states.append(stream.state if stream is not None else "unknown")
            if stream is not None and stream.state == "failed":
                failed.append((stream.name, stream.problem))
            volume_rpo_s = self.rpo.volume_rpo_s(id, now)
            volume_target_s = usual_s
            if stream is not None and stream.capture_mode == "scan":
                # Just before a pass is vaulted, the one before began one cycle and one pass ago.
                volume_target_s += 2 * status.cycle_s if status is not None else 0.0
                target_s = max(target_s, volume_target_s)
                if stream.copied and entry is not None and entry.fuzzy:
                    fuzzy.append(stream.name)
            if stream is not None and volume_rpo_s is not None and volume_rpo_s > volume_target_s:
                late.append((stream.name, volume_rpo_s, volume_target_s))
            volumes.append(
                {
                    "name": stream.name if stream is not None else entry.name if entry else "",
                    "size_bytes": stream.size_bytes
                    if stream is not None
                    else entry.size_bytes
                    if entry
                    else 0,
                    "state": stream.state if stream is not None else None,
                    "capture_mode": stream.capture_mode if stream is not None else None,
                    "captured_lsn": status.captured_lsn if status is not None else None,
                    "received_lsn": stream.received.lsn if stream is not None else None,
                    "vaulted_lsn": entry.lsn if entry is not None else None,
                    "backlog_bytes": status.backlog_bytes if status is not None else None,
                    "rpo_seconds": round(volume_rpo_s, 3) if volume_rpo_s is not None else None,
                }
            )
        health, reasons = judge(
            connected=session is not None,
            denied=self.denied,
            fenced=self.fenced,
            states=states,
            rpo_s=rpo_s,
            target_s=target_s,
            has_point=self.head.consistency == "crash",
            failed=failed,
            left_out=[entry.name for entry in left_out],
            late=late,
            scanned_fuzzy=fuzzy,
        )
        return {
            "name": self.name,
            "state": _worst(states) if session is not None else "disconnected",
            "health": health,
            "reasons": reasons,
            "rpo_seconds": round(rpo_s, 3) if rpo_s is not None else None,
            "volumes": volumes,
        }

    def _point(self) -> str:
        return point_id(self.id, self.head.seq)


def _entry(cut: VolumeCut) -> CommitVolume:
    return CommitVolume(
        id=cut.volume,
        name=cut.name,
        size_bytes=cut.size_bytes,
        incarnation=cut.position.incarnation,
        ordinal=cut.position.ordinal,
        lsn=cut.position.lsn,
        digest=cut.position.digest,
        fuzzy=stream.is_fuzzy(cut),
        copied=cut.copied,
        copy_end=cut.copy_end,
    )


def read_head(chain: Chain) -> Head:
    """Return where ``chain``, whose head is loaded, stands. Blocking: reads back over fences.

    Raises:
        FarshoreError: Of the store, or the chain is damaged.
    """
    head = chain.head
    if head is None:
        return Head()
    volumes = {volume.id: volume for volume in head.volumes}
    while head.kind == "fence" and head.seq > 1:
        head = next(chain.iterate(head.seq - 1, head.seq - 1)).head
    if head.kind == "fence":
        return Head(volumes=volumes)
    return Head(head.seq, head.time_ns, volumes)


RPO_TARGET_MIN_S: Final = 15.0
# Worst first; what is not here is as bad as nothing known.
_STATES: Final = (
    "failed",
    "resync-required",
    "degraded",
    "resync",
    "initial-replication",
    "paused",
    "protected",
)


def _worst(states: Sequence[str]) -> str:
    return next((state for state in _STATES if state in states), "unknown")


def judge(
    *,
    connected: bool,
    denied: bool,
    fenced: bool,
    states: Sequence[str],
    rpo_s: float | None,
    target_s: float,
    has_point: bool,
    failed: Sequence[tuple[str, str]] = (),
    left_out: Sequence[str] = (),
    late: Sequence[tuple[str, float, float]] = (),
    scanned_fuzzy: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """Return health (``ok``, ``warning``, ``critical``) and the reasons for anything but ``ok``. Pure.

    Args:
        rpo_s, target_s: Of a state of all volumes.
        failed: Volumes that failed: name, and why as far as the agent said.
        left_out: Volumes that are protected and that the agent does not send.
        late: Volumes whose own newest state is older than their target: name, age, target in seconds.
        scanned_fuzzy: Volumes that are scanned while others may write to them.
    """
    critical, warning = [], []
    if denied:
        critical.append("the machine is on the deny-list")
    if fenced:
        critical.append("another server owns the machine's chain")
    if not connected:
        critical.append("the agent is not connected")
    critical += [f"volume {name} failed{f': {why}' if why else ''}" for name, why in failed]
    warning += [
        f"volume {name} is protected and the agent does not send it: it stays where it was, and points are"
        " fuzzy; look at the agent's log, or let it go with farshore volume unprotect"
        for name in left_out
    ]
    for state in sorted(set(states)):
        if state in ("resync-required", "degraded", "paused"):
            warning.append(f"a volume is {state}")
        elif state in ("resync", "initial-replication"):
            warning.append(f"{state} is running; points are fuzzy until it is complete")
    warning += [
        f"volume {name} is scanned while others may write to it, so it is fuzzy in every point;"
        " recover takes the other volumes with --volume"
        for name in scanned_fuzzy
    ]
    if not has_point and connected:
        warning.append("the newest point is fuzzy, or there is none")
    if rpo_s is None:
        warning.append("the recovery point age is not known")
    elif rpo_s > target_s:
        critical.append(f"the newest recoverable state is {rpo_s:.0f} s old, the target is {target_s:.0f} s")
    if rpo_s is None or rpo_s <= target_s:
        critical += [
            f"the newest recoverable state of volume {name} is {age_s:.0f} s old, its target {most_s:.0f} s"
            for name, age_s, most_s in late
        ]
    return ("critical" if critical else "warning" if warning else "ok"), critical + warning
