"""Many positioned writes in one system call.

``pwritev(2)`` gathers memory but writes one range, so random 4 KiB writes cost a system call each, and each
takes and releases the interpreter's lock: with two busy threads that, not the copying, is the price.
``io_submit(2)`` takes an array of writes. On a buffered file the kernel carries them out one after another
before it returns, which is all that is wanted here; Python is left once for a whole group.

Long rows go past the page cache where the file allows that: several at a time, from where they lie to the
device. A gigabyte of fresh page cache cost 0.3 to 2.1 s of processor time before it was even written out.
"""

import ctypes
import errno
import os
import platform
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# include/uapi/linux/aio_abi.h, little-endian: struct iocb, struct io_event.
_IOCB: Final = np.dtype(
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<u4"),
        ("opcode", "<u2"),
        ("priority", "<i2"),
        ("fd", "<u4"),
        ("address", "<u8"),
        ("length", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("result_fd", "<u4"),
    ]
)
_EVENT: Final = np.dtype([("data", "<u8"), ("object", "<u8"), ("result", "<i8"), ("result2", "<i8")])
_PWRITE: Final = 1
# setup, submit, getevents, destroy: arch/x86/entry/syscalls/syscall_64.tbl, uapi/asm-generic/unistd.h.
_CALLS: Final = {"x86_64": (206, 209, 208, 207), "aarch64": (0, 2, 4, 1)}

ROWS_MAX: Final = 256
"""Writes per system call: enough to make its cost vanish; with 4 KiB each the heartbeat comes every 1 MiB."""
BYTES_MAX: Final = 2 * 1024 * 1024
"""Bytes per system call, for the heartbeat too; a longer single write is one call."""
DIRECT_BYTES_MAX: Final = 4 * 1024 * 1024
"""The same past the page cache, where all of them are under way at once."""
DIRECT_ROW_BYTES: Final = 64 * 1024
"""Rows from this length on go past the page cache, if they are aligned."""
DIRECT_ALIGN_BYTES: Final = 4096
"""O_DIRECT wants memory, offset and length to be multiples of the device's block; none has a larger one."""

# What a file answers that has something against direct writes: alignment, encryption, its file system.
_NO_DIRECT: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF})

_libc: Final = ctypes.CDLL(None, use_errno=True)
_syscall: Final = _libc.syscall
_syscall.restype = ctypes.c_long


def address_of(content: npt.NDArray[np.uint8]) -> int:
    """Where the bytes of a contiguous array lie; good while the array lives."""
    return int(content.__array_interface__["data"][0])


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """Memory of ``size`` bytes that can go to a device as it lies; its content is anything."""
    memory = np.empty(size + DIRECT_ALIGN_BYTES, np.uint8)
    start = -address_of(memory) % DIRECT_ALIGN_BYTES
    return memory[start : start + size]


def coalesce(offsets: Ints, lengths: Ints, addresses: Ints) -> tuple[Ints, Ints, Ints]:
    """Join rows that follow each other both on the disk and in memory. The order stays."""
    if len(offsets) < 2:
        return offsets, lengths, addresses
    starts = np.empty(len(offsets), np.bool_)
    starts[0] = True
    np.not_equal(offsets[1:], offsets[:-1] + lengths[:-1], out=starts[1:])
    starts[1:] |= addresses[1:] != addresses[:-1] + lengths[:-1]
    first = np.flatnonzero(starts)
    if len(first) == len(offsets):
        return offsets, lengths, addresses
    return offsets[first], np.add.reduceat(lengths, first), addresses[first]


class VectoredWriter:
    """Writes rows of (offset, length, address) to a file, in order. One thread at a time.

    Attributes:
        direct_refused: The file did not take a write past the page cache, so no other is tried.
    """

    def __init__(self, *, use_aio: bool = True) -> None:
        self._context = ctypes.c_ulong(0)
        self._calls = _CALLS.get(platform.machine()) if use_aio else None
        if self._calls and _syscall(
            self._calls[0], ctypes.c_long(ROWS_MAX), ctypes.byref(self._context)
        ):  # no AIO in this kernel, or fs.aio-max-nr used up: slower, not wrong
            self._calls = None
        self.direct_refused = False
        self._iocbs = np.zeros(ROWS_MAX, _IOCB)
        self._iocbs["opcode"] = _PWRITE
        self._events = np.zeros(ROWS_MAX, _EVENT)
        self._pointers = address_of(self._iocbs.view(np.uint8)) + np.arange(ROWS_MAX, dtype=np.uint64) * 64

    def takes_directly(self, offsets: Ints, lengths: Ints, addresses: Ints) -> npt.NDArray[np.bool_]:
        """Which rows can go past the page cache."""
        rest = (offsets | lengths | addresses) % DIRECT_ALIGN_BYTES
        found: npt.NDArray[np.bool_] = np.logical_and(rest == 0, lengths >= DIRECT_ROW_BYTES)
        return found

    @property
    def vectored(self) -> bool:
        """Whether the kernel takes arrays of writes; False means one call per row."""
        return self._calls is not None

    def close(self) -> None:
        if self._calls:
            _syscall(self._calls[3], self._context)
            self._calls = None

    def write(
        self,
        fd: int,
        offsets: Ints,
        lengths: Ints,
        addresses: Ints,
        between: Callable[[], None] = lambda: None,
        *,
        direct_fd: int = -1,
    ) -> None:
        """Write all rows, earlier ones first where they overlap.

        Args:
            fd: The file.
            offsets: Where each row goes.
            lengths: Bytes of each.
            addresses: Where its bytes lie; the caller keeps them alive.
            between: Called before each system call and after the last.
            direct_fd: The same file, opened with O_DIRECT; -1 when it cannot be.

        Raises:
            OSError: A row could not be written. Any of the others may have been: the caller writes all again.
        """
        offsets, lengths, addresses = coalesce(offsets, lengths, addresses)
        if direct_fd < 0 or not self._calls or self.direct_refused:
            self._write_run(fd, offsets, lengths, addresses, between, BYTES_MAX)
            return
        direct = self.takes_directly(offsets, lengths, addresses)
        bounds = [0, *(np.flatnonzero(direct[1:] != direct[:-1]) + 1).tolist(), len(direct)]
        for at, end in pairwise(bounds):
            run = offsets[at:end], lengths[at:end], addresses[at:end]
            if direct[at]:
                self._write_run(fd, *run, between, DIRECT_BYTES_MAX, direct_fd)
            else:
                self._write_run(fd, *run, between, BYTES_MAX)

    def _write_run(
        self,
        fd: int,
        offsets: Ints,
        lengths: Ints,
        addresses: Ints,
        between: Callable[[], None],
        bytes_max: int,
        direct_fd: int = -1,
    ) -> None:
        at, count = 0, len(offsets)
        totals = np.cumsum(lengths)
        while at < count:
            limit = bytes_max + (int(totals[at - 1]) if at else 0)
            end = min(max(int(np.searchsorted(totals, limit, "right")), at + 1), at + ROWS_MAX)
            if direct_fd >= 0 and _overlap(offsets[at:end], lengths[at:end]):
                end = at + 1  # those under way at once land in any order
            between()
            if self._calls and (end - at > 1 or direct_fd >= 0):
                self._submit(fd, offsets[at:end], lengths[at:end], addresses[at:end], direct_fd)
            else:
                for offset, length, address in zip(
                    offsets[at:end].tolist(),
                    lengths[at:end].tolist(),
                    addresses[at:end].tolist(),
                    strict=True,
                ):
                    write_memory(fd, offset, length, address)
            at = end
        between()

    def _submit(self, fd: int, offsets: Ints, lengths: Ints, addresses: Ints, direct_fd: int) -> None:
        assert self._calls
        count = len(offsets)
        iocbs = self._iocbs[:count]
        iocbs["fd"] = fd if direct_fd < 0 else direct_fd
        iocbs["offset"], iocbs["length"], iocbs["address"] = offsets, lengths, addresses
        iocbs["data"] = np.arange(count)
        pointers = ctypes.c_void_p(int(self._pointers.__array_interface__["data"][0]))
        submitted = _syscall(self._calls[1], self._context, ctypes.c_long(count), pointers)
        refused = ctypes.get_errno() if submitted < 0 else 0
        submitted = max(submitted, 0)
        results = self._collect(submitted)
        for row in np.flatnonzero(results != lengths[:submitted]).tolist():
            # A short write tells no reason; writing the rest by itself does. A later row that overlaps it has
            # been written already, so everything from here on is done again, in order.
            submitted = min(submitted, row)
            break
        if submitted == count:
            return
        if direct_fd >= 0:
            code = refused or max(-int(results[submitted]), 0)
            if code in _NO_DIRECT:
                self.direct_refused = True
            elif code:
                raise OSError(code, os.strerror(code))  # the page cache would hide it until a sync
        elif refused and refused not in (errno.EAGAIN, errno.EINTR) and submitted == 0:
            self.close()  # this kernel or file does not want it: one call per row from now on
        for row in range(submitted, count):
            write_memory(fd, int(offsets[row]), int(lengths[row]), int(addresses[row]))

    def _collect(self, count: int) -> Ints:
        assert self._calls
        results = np.zeros(count, np.int64)
        got = 0
        while got < count:
            events = ctypes.c_void_p(address_of(self._events.view(np.uint8)))
            more = _syscall(
                self._calls[2], self._context, ctypes.c_long(1), ctypes.c_long(count - got), events, None
            )
            if more < 0:
                if ctypes.get_errno() == errno.EINTR:
                    continue
                raise OSError(ctypes.get_errno(), "io_getevents failed")
            seen = self._events[:more]
            results[seen["data"].astype(np.intp)] = seen["result"]
            got += more
        return results


def _overlap(offsets: Ints, lengths: Ints) -> bool:
    order = np.argsort(offsets)
    return bool((offsets[order][1:] < (offsets + lengths)[order][:-1]).any())


def write_memory(fd: int, offset: int, length: int, address: int) -> None:
    """pwrite(2) ``length`` bytes at ``address``, going on after short writes. Raises OSError."""
    buffer = memoryview((ctypes.c_char * length).from_address(address)).cast("B")
    written = 0
    while written < length:
        step = os.pwrite(fd, buffer[written:], offset + written)
        if step == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += step
