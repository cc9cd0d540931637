"""One protected volume as replication knows it, across sessions: what is remembered, and the word for it."""

import json
from pathlib import Path
from typing import Final

from agent.journal.segments import list_segments
from agent.journal.state import DATA, FAILED, RESYNC_REQUIRED, State, StatePageReader
from agent.replicate.ports import Journal, VolumeSpec
from farshore.config import write_private
from farshore.errors import FarshoreError, Unreachable
from farshore.wire import messages as m

FILE_NAME: Final = "replica"
"""What must outlive the agent: JSON ``{"paused", "copied", "size_bytes"}`` in the volume's folder."""
SIZE_KEY: Final = "size_bytes"
"""The size that the disk had when it was last replicated: for the time when it is not there."""


class Replica:
    """State of one volume that a new session goes on from.

    Attributes:
        paused: Nothing is sent until `resume`; kept on disk.
        copied: The vault has all of it, and a point that can be offered; kept on disk for the time before
            the first WELCOME.
        resync: The vault's copy is being compared as a whole.
        safe: Units of the copying under way that are vaulted; the next session need not do them again.
        problem: What keeps copying from going on, for people; empty when nothing does.
        remaining_bytes, total_bytes: Of the copying under way; None when there is none.
        served: There is somebody who captures it: its page and its journal say how it is.
        absent: Why it cannot be served now, for people. Empty with ``served`` false: it is being opened.
    """

    def __init__(self, spec: VolumeSpec, journal: Journal | None) -> None:
        """``journal`` may be None where only the state is asked for."""
        self.spec = spec
        self._journal = journal
        self.safe: set[int] = set()
        self.resync = False
        self.problem = ""
        self.remaining_bytes: int | None = None
        self.total_bytes = 0
        self.vaulted_lsn = 0
        self.served = True
        self.absent = ""
        self._awaited_until_s = 0.0
        self._page: StatePageReader | None = None
        memory = remembered(spec.folder / FILE_NAME)
        self._paused = bool(memory.get("paused", False))
        self._copied = bool(memory.get("copied", False))
        self._known_bytes = _size_in(memory)

    @property
    def scanned(self) -> bool:
        """It has no tap: `agent.capture.scan.ScanReplica`."""
        return False

    def fuzzy_anyway(self) -> bool:
        """Tell whether a cut taken now would be fuzzy for this volume, and one more would not mend that."""
        return not self.served

    def scan_age_s(self) -> float | None:
        """Seconds since the newest whole pass over a scanned disk began; None: there is none to speak of."""
        return None

    @property
    def journal(self) -> Journal:
        assert self._journal is not None
        return self._journal

    @property
    def paused(self) -> bool:
        return self._paused

    @paused.setter
    def paused(self, value: bool) -> None:
        if value != self._paused:
            self._paused = value
            self._remember()

    @property
    def copied(self) -> bool:
        return self._copied

    @copied.setter
    def copied(self, value: bool) -> None:
        if value != self._copied:
            self._copied = value
            self._remember()

    # --- whether it is served ---

    def expect(self, until_s: float) -> None:
        """The tap has not answered for it yet; cuts wait for it until then (monotonic), and no longer."""
        self.served, self._awaited_until_s = False, until_s

    def awaited(self, now_s: float) -> bool:
        """Tell whether a cut taken now had better wait until it is served."""
        return not self.served and not self.absent and now_s < self._awaited_until_s

    def lost(self, why: str) -> bool:
        """It cannot be served, so it stays where it was in every cut; tell whether that, or why, is new."""
        new = self.served or self.absent != why
        self.served, self.absent = False, why
        return new

    def found(self) -> None:
        """It is served, from now on or again. Raises Unreachable: by a tap that has published no state."""
        self._read_page()
        self.served, self.absent = True, ""

    def state(self) -> State:
        """Return the tap's counters. Raises Unreachable while no tap serves it that published any."""
        if not self.served:
            # A page can be left from a tap that is gone.
            raise Unreachable("the volume is not served", where=self.spec.name, why=self.absent)
        return self._read_page()

    def _read_page(self) -> State:
        if self._page is None:
            try:
                self._page = StatePageReader(self.spec.state_page)
            except OSError as error:
                raise Unreachable(
                    "the tap has published no state", where=self.spec.name, why=str(error)
                ) from error
        return self._page.read()

    def state_or_none(self) -> State | None:
        """As `state`, None while there is none."""
        try:
            return self.state()
        except Unreachable:
            return None

    def name_state(self) -> str:
        """One of the volume states of DESIGN, section 11: the first that applies, worst first."""
        state = self.state_or_none()
        if self.absent or (state is not None and state.flags & FAILED):
            return "failed"
        if self.paused:
            return "paused"
        if self.resync:
            return "resync"
        if state is not None and state.flags & RESYNC_REQUIRED:
            return "resync-required"
        if not self.copied:
            return "initial-replication"
        if state is None or state.capture_mode != DATA or state.dirty_regions:
            return "degraded"
        return "protected"

    def capture_mode(self) -> str:
        """``data`` or ``bitmap``; ``bitmap`` too when no tap says anything, since that is no better."""
        state = self.state_or_none()
        return "data" if state is not None and state.capture_mode == DATA else "bitmap"

    def backlog_bytes(self) -> int:
        """Bytes of the journal that are not vaulted, as whole segments: never less than the truth."""
        state = self.state_or_none()
        if state is None or state.captured_lsn <= self.vaulted_lsn:
            return 0
        total = 0
        for _, path in list_segments(self.spec.folder):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        return total

    def unsynced_bytes(self) -> int:
        """Still to copy or compare; the whole volume while that has not begun."""
        if self.remaining_bytes is not None:
            return self.remaining_bytes
        return 0 if self.copied and not self.resync else self.spec.size_bytes

    def hello(self) -> m.VolumeHello:
        """How HELLO and VOLUME-ADD introduce it."""
        spec = self.spec
        return m.VolumeHello(
            spec.id,
            spec.name,
            spec.size_bytes,
            spec.sector_bytes,
            self.name_state(),
            self.capture_mode(),
            self.absent,
        )

    def volume_status(self) -> m.VolumeStatus | None:
        """What PONG says of it, from the tap's page at this moment; None while there is no tap."""
        state = self.state_or_none()
        if state is None:
            return None
        return m.VolumeStatus(
            self.spec.id,
            state.incarnation,
            state.captured_lsn,
            state.durable_lsn,
            self.backlog_bytes(),
            self.capture_mode(),
            self.name_state(),
        )

    def close(self) -> None:
        """Let go of the page."""
        if self._page is not None:
            self._page.close()
            self._page = None

    def remember_size(self) -> None:
        """Keep the size for a time when the disk is not there. Blocks. Raises CapacityError, Failed."""
        before, self._known_bytes = self._known_bytes, self.spec.size_bytes
        if before == self._known_bytes:
            return
        try:
            self._remember()
        except FarshoreError:
            self._known_bytes = before
            raise

    def _remember(self) -> None:
        write_private(self.spec.folder / FILE_NAME, json.dumps(self._memory()).encode())

    def _memory(self) -> dict[str, object]:
        memory: dict[str, object] = {"paused": self._paused, "copied": self._copied}
        return {**memory, SIZE_KEY: self._known_bytes} if self._known_bytes else memory


def known_size(folder: Path) -> int:
    """Size in bytes of the volume in ``folder`` when it was last replicated; 0: it never was."""
    return _size_in(remembered(folder / FILE_NAME))


def _size_in(memory: dict[str, object]) -> int:
    size_bytes = memory.get(SIZE_KEY)
    return size_bytes if isinstance(size_bytes, int) and size_bytes > 0 else 0


def remembered(path: Path) -> dict[str, object]:
    """What a `Replica` wrote to ``path``; nothing when there is nothing that could be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
