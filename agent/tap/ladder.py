"""The ladder: in which mode a volume captures, and what has to happen to change it. Pure.

Events in, actions out; who carries them out is `agent.tap.volume`. The order of the steps inside an action is
DESIGN section 4: to leave data mode, the journal is made durable, everything is applied, the disk
fdatasynced, the stable mark made durable; only then is a write let past the journal.
"""

import enum
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

RETRY_MIN_S: Final = 1.0
RETRY_MAX_S: Final = 30.0


class Mode(enum.Enum):
    """What happens to a write that arrives."""

    DATA = "data"
    """It is logged."""
    LEAVING = "leaving"
    """It is held until it may go past the journal; a second or so."""
    BITMAP = "bitmap"
    """Its regions are marked dirty and it goes to the disk."""
    CLIMBING = "climbing"
    """As BITMAP, while a new incarnation of the journal is being opened."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """Where a volume stands.

    Attributes:
        mode: See `Mode`.
        wait: ``on_journal_lost = "wait"``: the workload waits rather than run without a durable record.
        lost: Dirty bits are, or may be, in memory only.
        stalled: Waiting for a journal that does not answer (only with ``wait``).
        why: What took it out of data mode; empty in it.
        retry_s: How long to wait before the next try to climb, after a failure; 0 when only room is missing.
        above_lsn: The next incarnation begins above it.
    """

    mode: Mode = Mode.DATA
    wait: bool = False
    lost: bool = False
    stalled: bool = False
    why: str = ""
    retry_s: float = 0.0
    above_lsn: int = 0


@dataclass(frozen=True, slots=True)
class Full:
    """An append found no room; everything before it is in the journal."""

    why: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The journal's files or the mark refused: what is not durable by now never will be."""

    why: str


@dataclass(frozen=True, slots=True)
class Stalled:
    """The journal's disk has not answered for ``journal_stall_max``."""

    why: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A stalled journal has answered after all."""


@dataclass(frozen=True, slots=True)
class Left:
    """Everything that has to be durable before a write goes past the journal is."""


@dataclass(frozen=True, slots=True)
class BitsLost:
    """Dirty bits could not be written."""

    why: str


@dataclass(frozen=True, slots=True)
class BitsKept:
    """All dirty bits are in the file again, and durable."""


@dataclass(frozen=True, slots=True)
class Reopen:
    """Somebody wants a new incarnation above an LSN (the server knows more than the journal does)."""

    above_lsn: int


@dataclass(frozen=True, slots=True)
class ClimbDue:
    """There is room, or it is time to try again, and nothing of the old journal is in use any more."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A new incarnation is open."""


@dataclass(frozen=True, slots=True)
class OpenFailed:
    """It could not be opened."""

    why: str
    room_only: bool


Event: TypeAlias = (
    Full | Broken | Stalled | Answered | Left | BitsLost | BitsKept | Reopen | ClimbDue | Opened | OpenFailed
)


class Action(enum.Enum):
    """What the volume has to do, in the order given."""

    HOLD = "keep what arrives, and what was not appended, in order"
    ABANDON = "take back all that is not durable; nothing the journal's threads still do counts"
    LEAVE = "sync, apply, fdatasync, mark; then Left, or Broken or Stalled"
    PASS = "let what is held, and all that follows, past the journal"
    OPEN = "open a new incarnation; then Opened or OpenFailed"
    LOG = "log what follows"
    LOSE = "leave every trace that says that bits are in memory only"
    ALARM = "tell the operator"


_DOWN: Final = (Mode.BITMAP, Mode.CLIMBING)


def step(ladder: Ladder, event: Event) -> tuple[Ladder, tuple[Action, ...]]:
    """Return where the volume stands after ``event`` and what has to be done about it."""
    mode = ladder.mode
    match event:
        case Full(why) if mode is Mode.DATA:
            return _leaving(ladder, why, retry_s=0.0), (Action.HOLD, Action.LEAVE, Action.ALARM)
        case Reopen(above_lsn):
            higher = replace(ladder, above_lsn=max(ladder.above_lsn, above_lsn))
            if mode is Mode.DATA:
                return _leaving(higher, "a new incarnation was asked for", 0.0), (Action.HOLD, Action.LEAVE)
            return higher, ()
        case Broken(why) if mode is Mode.DATA:
            # What was appended and is not durable goes past the journal: its regions become dirty.
            actions = (Action.HOLD, Action.ABANDON, Action.LEAVE, Action.ALARM)
            return _leaving(ladder, why, RETRY_MIN_S), actions
        case Broken(why) | Stalled(why) if mode is Mode.LEAVING and not ladder.wait:
            lost = replace(ladder, mode=Mode.BITMAP, lost=True, why=why, retry_s=RETRY_MIN_S)
            return lost, (Action.ABANDON, Action.LOSE, Action.PASS, Action.ALARM)
        case Broken(why) if mode is Mode.LEAVING:
            return replace(ladder, why=why, stalled=True), (Action.ABANDON, Action.LEAVE, Action.ALARM)
        case Stalled(why) if ladder.wait:
            return replace(ladder, stalled=True), () if ladder.stalled else (Action.ALARM,)
        case Stalled(why) if mode is Mode.DATA:
            lost = replace(ladder, mode=Mode.BITMAP, lost=True, why=why, retry_s=RETRY_MIN_S)
            return lost, (Action.HOLD, Action.ABANDON, Action.LOSE, Action.PASS, Action.ALARM)
        case Answered():
            return replace(ladder, stalled=False), ()
        case Left() if mode is Mode.LEAVING:
            return replace(ladder, mode=Mode.BITMAP, stalled=False), (Action.PASS,)
        case BitsLost(why) if mode in _DOWN and not ladder.lost:
            return replace(ladder, lost=True, why=why), (Action.LOSE, Action.ALARM)
        case BitsKept():
            return replace(ladder, lost=False), ()
        case ClimbDue() if mode is Mode.BITMAP:
            return replace(ladder, mode=Mode.CLIMBING), (Action.OPEN,)
        case OpenFailed(why, room_only) if mode is Mode.CLIMBING:
            later = 0.0 if room_only else min(max(ladder.retry_s * 2, RETRY_MIN_S), RETRY_MAX_S)
            return replace(ladder, mode=Mode.BITMAP, why=why, retry_s=later), ()
        case Opened() if mode is Mode.CLIMBING:
            return replace(ladder, mode=Mode.DATA, why="", retry_s=0.0), (Action.LOG,)
    return ladder, ()


def _leaving(ladder: Ladder, why: str, retry_s: float) -> Ladder:
    return replace(ladder, mode=Mode.LEAVING, why=why, retry_s=retry_s)
