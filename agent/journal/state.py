"""The state page: what the tap is doing right now, for other processes of this boot.

Two slots, written in turn, each with a check over its fields. A reader takes the valid slot with the higher
serial, so neither a tap killed in the middle of a store nor a processor that reorders stores can show a
mixture.
"""

import errno
import mmap
import os
import struct
import threading
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from farshore.errors import Unreachable

DATA: Final = 1
BITMAP: Final = 2
SCAN: Final = 3
"""No tap at all: the agent itself publishes which pass over the disk it is at (`agent.capture.scan`)."""

FAILED: Final = 1
JOURNAL_LOST: Final = 2
RESYNC_REQUIRED: Final = 4

FILE_NAME: Final = "state"
PAGE_BYTES: Final = 4096
SLOT_STRIDE: Final = 2048

_FIELDS: Final = struct.Struct("<8sQ16sQQQQQQIIQQQ16s")
_CHECK_BYTES: Final = 8
_SLOT_BYTES: Final = _FIELDS.size + _CHECK_BYTES
_MAGIC: Final = b"FARSHSTA"
_READ_ATTEMPTS: Final = 1000
assert _FIELDS.size == 128


class State(msgspec.Struct, frozen=True, gc=False):
    """One consistent look at the page. LSNs are the volume's; times are of the tap's host.

    Attributes:
        serial: Grows with each update.
        incarnation: Of the journal that is written, 16 bytes.
        captured_lsn: Given to a record, and its write(2) returned.
        durable_lsn: fdatasync of the segments up to here returned 0: what may be sent.
        applied_lsn: Written to the disk (page cache).
        stable_lsn: The stable mark.
        heartbeat_ns: Wall clock of the last update or beat.
        heartbeat_monotonic_ns: The same moment by CLOCK_MONOTONIC, which all processes of a boot share.
        capture_mode: ``DATA``, ``BITMAP`` or ``SCAN``.
        flags: ``FAILED``, ``JOURNAL_LOST``, ``RESYNC_REQUIRED``.
        dirty_epoch: As in the mark.
        dirty_regions: Bits set in the dirty map.
        process_id: Of the tap.
        boot_id: The kernel's, 16 bytes; of another boot, the page is history.
    """

    serial: int
    incarnation: bytes
    captured_lsn: int
    durable_lsn: int
    applied_lsn: int
    stable_lsn: int
    heartbeat_ns: int
    heartbeat_monotonic_ns: int
    capture_mode: int
    flags: int
    dirty_epoch: int
    dirty_regions: int
    process_id: int
    boot_id: bytes


_INDEX: Final = {name: index for index, name in enumerate(State.__struct_fields__)}


class StatePageWriter:
    """The tap's side. `update` may be called from any of its threads."""

    def __init__(self, page: mmap.mmap, values: list[int | bytes]) -> None:
        self._page, self._values = page, values
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, *, incarnation: bytes, boot_id: bytes) -> "StatePageWriter":
        """Open or make the page at ``path`` and start it anew, going on from its serial.

        A store into the page can wait for the file system that holds it: keep it on a tmpfs where the tap
        must go on while the journal's disk hangs. It is worth nothing after this boot anyway.

        Raises:
            OSError: As from the file system.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size != PAGE_BYTES:
                os.ftruncate(fd, PAGE_BYTES)
            os.posix_fallocate(fd, 0, PAGE_BYTES)  # a store into a hole of a full disk would be a SIGBUS
            page = mmap.mmap(fd, PAGE_BYTES)
        finally:
            os.close(fd)
        before = _newest(page)
        values: list[int | bytes] = [0] * len(_INDEX)
        values[_INDEX["serial"]] = before.serial if before else 0
        values[_INDEX["incarnation"]] = incarnation
        values[_INDEX["capture_mode"]] = DATA
        values[_INDEX["process_id"]] = os.getpid()
        values[_INDEX["boot_id"]] = boot_id
        return cls(page, values)

    def update(self, **changes: int | bytes) -> None:
        """Publish ``changes``, fields of `State` by name; the others stay."""
        with self._lock:
            values = self._values
            for name, value in changes.items():
                values[_INDEX[name]] = value
            serial = values[0]
            assert isinstance(serial, int)
            values[0] = serial = serial + 1
            fields = _FIELDS.pack(_MAGIC, *values)
            at = serial % 2 * SLOT_STRIDE
            self._page[at : at + _SLOT_BYTES] = fields + blake3(fields).digest(_CHECK_BYTES)

    def close(self) -> None:
        self._page.close()


class StatePageReader:
    """Another process's side: reads, never writes."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when there is no page of 4,096 bytes at ``path``."""
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != PAGE_BYTES:  # a shorter file would be a SIGBUS later
                raise OSError(errno.EINVAL, "not a state page", str(path))
            self._page = mmap.mmap(fd, PAGE_BYTES, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._path = path

    def read(self) -> State:
        """Return the newest consistent state.

        Raises:
            Unreachable: The page holds none: the tap has not published anything yet.
        """
        # Both slots fail at once only when the writer goes through two updates while we copy one slot.
        for _ in range(_READ_ATTEMPTS):
            if state := _newest(self._page):
                return state
        raise Unreachable("the tap has published no state", where=str(self._path))

    def close(self) -> None:
        self._page.close()


def load_state(path: Path) -> State | None:
    """Return what the page at ``path`` says now; None when there is no readable one."""
    try:
        page = path.read_bytes()
    except OSError:
        return None
    return _newest(page)


def _newest(page: bytes | mmap.mmap) -> State | None:
    slots = [page[at : at + _SLOT_BYTES] for at in (0, SLOT_STRIDE)]
    states = [state for slot in slots if (state := _decode(slot))]
    return max(states, key=lambda state: state.serial, default=None)


def _decode(slot: bytes) -> State | None:
    fields = slot[: _FIELDS.size]
    if len(slot) != _SLOT_BYTES or blake3(fields).digest(_CHECK_BYTES) != slot[_FIELDS.size :]:
        return None
    magic, *values = _FIELDS.unpack(fields)
    return State(*values) if magic == _MAGIC else None
