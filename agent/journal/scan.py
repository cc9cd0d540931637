"""Reading one segment's file, from a private copy of its bytes.

Never by mmap: a file that is cut short, or a disk that fails, would be a SIGBUS in the process that holds the
workload's disk, and a file recycled meanwhile would change under a check that already passed.
"""

import os
from pathlib import Path
from typing import Final

from agent.journal.segments import PAGE_BYTES
from farshore.errors import CorruptRecord
from farshore.hrl.batch import (
    BATCH_PAYLOAD_BYTES_MAX,
    BATCH_RECORDS_MAX,
    HEAD,
    RECORD,
    SEAL,
    Batch,
    RunningDigest,
    decode_batch,
    padded,
)
from farshore.hrl.segment import SEGMENT_HEADER_BYTES, SegmentHeader, decode_segment_header

BATCH_BYTES_MAX: Final = padded(HEAD.size + BATCH_RECORDS_MAX * RECORD.size + BATCH_PAYLOAD_BYTES_MAX)
"""The longest batch: one read of this size always holds the whole batch it starts with."""
WINDOW_BYTES: Final = 1024 * 1024
"""Read at a time while scanning; batches of a busy volume are 100 to 200 KiB."""
END_BYTES: Final = 8
"""Zeros that follow the last batch."""


def read_header(fd: int) -> bytes:
    """The bytes of a segment's header; fewer when the file is shorter. Raises OSError."""
    return os.pread(fd, SEGMENT_HEADER_BYTES, 0)


def decode_header(raw: bytes, number: int, path: Path) -> SegmentHeader | None:
    """Check the header of the file that is named as segment ``number``.

    Returns:
        None for a file that was allocated and never begun.

    Raises:
        CorruptRecord: It is no segment of ours, or not the one its name says.
    """
    if len(raw) == SEGMENT_HEADER_BYTES and not any(raw):
        return None
    try:
        header = decode_segment_header(raw)
    except CorruptRecord as error:
        raise CorruptRecord(0, error.reason, where=str(path)) from error
    if header.number != number:
        raise CorruptRecord(0, f"holds segment {header.number} under the name of another", where=str(path))
    return header


class SegmentScan:
    """Walks over the batches of one segment.

    Attributes:
        at: Byte offset behind the last batch returned.
        next_lsn: LSN that the next record must have.
        sealed: The SEAL was returned: nothing follows in this file.
    """

    def __init__(
        self,
        fd: int,
        chain: RunningDigest,
        next_lsn: int,
        at: int = SEGMENT_HEADER_BYTES,
        *,
        where: str = "",
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        """``fd`` stays the caller's; ``chain`` is advanced in place."""
        self.at, self.next_lsn, self.sealed = at, next_lsn, False
        self.chain = chain
        self._fd, self._where, self._window_bytes = fd, where, window_bytes
        self._window = memoryview(b"")
        self._window_at = at

    @property
    def digest(self) -> bytes:
        return self.chain.value

    def forget(self) -> None:
        """Drop what was read ahead: the file may have grown, or been recycled, since."""
        self._window = memoryview(b"")
        self._window_at = self.at

    def next(self) -> Batch | None:
        """Return the next batch, a view of memory that stays as it is; None at the end of the log.

        Raises:
            CorruptRecord: Something follows that is not the next batch, or not all of it.
            OSError: The file cannot be read.
        """
        if self.sealed:
            return None
        batch = self._decode()
        if batch is None:
            self._read(self._window_bytes)
            batch = self._decode()
        if batch is None and len(self._window) == self._window_bytes:
            self._read(BATCH_BYTES_MAX)
            batch = self._decode()
        if batch is None:
            if self._at_end():
                return None
            raise CorruptRecord(self.at, "the batch is cut short", where=self._where)
        self.at += len(batch.raw)
        self.next_lsn = batch.first_lsn + batch.count
        self.sealed = bool(batch.flags & SEAL)
        return batch

    def _read(self, size: int) -> None:
        self._window = memoryview(os.pread(self._fd, size, self.at))
        self._window_at = self.at

    def _decode(self) -> Batch | None:
        at = self.at - self._window_at
        if self._at_end():
            return None
        try:
            return decode_batch(self._window, at, self.chain, self.next_lsn)
        except CorruptRecord as error:
            raise CorruptRecord(self.at, error.reason, where=self._where) from error

    def _at_end(self) -> bool:
        at = self.at - self._window_at
        return not any(self._window[at : at + END_BYTES])


def torn_bytes(fd: int, at: int, next_lsn: int) -> int:
    """Bytes of a batch that was begun at ``at`` and does not check; 0 at a clean end.

    The log's last page is written to its end, with zeros, so what is not zero in it is no older than the log.
    """
    page_end = (at // PAGE_BYTES + 1) * PAGE_BYTES
    rest = os.pread(fd, page_end - at, at)
    if not any(rest[:END_BYTES]) and len(rest) >= END_BYTES:
        return 0
    if len(rest) >= HEAD.size:
        magic, _, first_lsn, _, _, table_bytes, payload_bytes, _, _ = HEAD.unpack_from(rest)
        claimed = padded(HEAD.size + table_bytes + payload_bytes)
        if magic == b"HRLB" and first_lsn == next_lsn and claimed <= BATCH_BYTES_MAX:
            return min(claimed, os.fstat(fd).st_size - at)
    cut_short = at + len(rest) < page_end
    return len(rest) if cut_short else len(rest.rstrip(b"\0"))
