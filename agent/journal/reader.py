"""The log of one volume, being read by another process while the tap writes and frees it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.journal.errors import JournalGap
from agent.journal.recovery import begins_incarnation, follows
from agent.journal.scan import SegmentScan, decode_header, read_header
from agent.journal.segments import list_segments, open_segment, segment_number, segment_path
from farshore.errors import CorruptRecord
from farshore.hrl.batch import Batch
from farshore.hrl.segment import Incarnation, SegmentHeader

_WINDOW_BYTES: Final = 256 * 1024
"""Read at a time: the tail of a quiet log is read again and again."""


@dataclass(frozen=True, slots=True)
class IncarnationStart:
    """The batches that follow belong to ``incarnation``; their first record has LSN ``first_lsn``."""

    incarnation: Incarnation
    first_lsn: int


@dataclass(slots=True)
class _Place:
    """Where the reader is: inside a segment that it holds open."""

    fd: int
    path: Path
    header: SegmentHeader
    scan: SegmentScan

    @property
    def here(self) -> tuple[Incarnation, int, bytes]:
        return self.header.incarnation, self.scan.next_lsn - 1, self.scan.digest


class JournalReader:
    """Reads durable records in order, across segments and incarnations. One thread at a time.

    Each batch is checked, in a private copy, against the running digest of all before it, so a file that is
    freed and recycled meanwhile can end in `JournalGap`, never in a wrong record.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._place: _Place | None = None
        self._digest = b""
        # Said only together with a record that follows: a power cut can take back what no record follows.
        self._pending: list[IncarnationStart | Batch] = []
        self._ahead: Batch | None = None  # read, and too long for the last answer
        self._error: Exception | None = None

    @property
    def last_digest(self) -> bytes:
        """Running digest behind the last batch returned, or where the reader went. Raises JournalGap."""
        self._here()
        return self._digest

    def position(self, incarnation_id: bytes, lsn: int, digest: bytes) -> bool:
        """Go behind record ``lsn`` of an incarnation.

        Returns:
            True when the journal proves to hold, or to have held and freed, exactly that record at the end of
            a batch with exactly that running digest behind it. False: the caller resyncs; the reader is
            nowhere.

        Raises:
            OSError: A segment cannot be read.
        """
        self._leave()
        found: tuple[Path, SegmentHeader] | None = None
        end: int | None = None
        for path, header in self._headers():
            there = header.incarnation
            if there.id == incarnation_id:
                if (header.first_lsn - 1, header.digest_before) == (lsn, digest):
                    return self._go(path, header)
                if header.first_lsn <= lsn:
                    found = path, header
            elif there.previous == incarnation_id:
                end = there.previous_last_lsn
                link = (there.previous_last_lsn, there.previous_digest)
                if link == (lsn, digest) and begins_incarnation(header) and found is None:
                    return self._go(path, header)
        if found is None or (end is not None and lsn > end):
            return False
        return self._go_behind(*found, lsn, digest)

    def start_at_oldest(self) -> None:
        """Go before the first record of the oldest incarnation that is here from its beginning.

        Raises:
            JournalGap: There is none.
        """
        self._start(newest=False)

    def start_at_newest(self) -> None:
        """Go before the first record of the newest incarnation.

        Raises:
            JournalGap: It is no longer here.
        """
        self._start(newest=True)

    def read(self, durable: tuple[bytes, int], bytes_max: int) -> list[IncarnationStart | Batch]:
        """Return what is durable and was not returned before; empty when there is nothing now.

        Args:
            durable: Incarnation id and durable LSN of the tap, taken before the call.
            bytes_max: Stop before exceeding this many bytes of batches; one batch is always returned.

        Returns:
            Batches in order. An `IncarnationStart` precedes the first of each incarnation, and the first
            after going somewhere. A SEAL, which has no record, comes with the record that follows it.

        Raises:
            JournalGap: What comes next is not here any more.
            CorruptRecord: What comes next was durable, is here, and does not check.
            OSError: It cannot be read.
        """
        if self._error is not None:
            raise self._error
        self._here().scan.forget()  # read before these records were durable
        items: list[IncarnationStart | Batch] = []
        size = 0
        try:
            while (batch := self._next_record(durable)) is not None:
                if items and size + len(batch.raw) > bytes_max:
                    self._ahead = batch
                    break
                items += [*self._pending, batch]
                size += len(batch.raw)
                self._pending = []
                self._digest = batch.digest
        except (JournalGap, CorruptRecord, OSError) as error:
            if not items:
                raise
            self._error = error  # after what was found before it
        return items

    def announce(self, durable: tuple[bytes, int]) -> list[IncarnationStart | Batch]:
        """After `read` returned nothing: return the start of an incarnation that has no record yet.

        Cuts name the incarnation that the tap writes, so whoever sends them has to know of it at once. When
        ``durable`` names it, its beginning is durable, and with it the SEAL that it goes on from.
        """
        if self._place is None or self._place.header.incarnation.id != durable[0]:
            return []
        starts = [at for at, item in enumerate(self._pending) if isinstance(item, IncarnationStart)]
        end = starts[-1] + 1 if starts else 0
        items, self._pending = self._pending[:end], self._pending[end:]
        if items and not self._pending:
            self._digest = self._place.scan.digest
        return items

    def close(self) -> None:
        """Give back the descriptor; the reader is nowhere. Idempotent."""
        self._leave()

    def _here(self) -> _Place:
        if self._place is None:
            raise JournalGap("the reader is nowhere", where=str(self._directory))
        return self._place

    def _leave(self) -> None:
        if self._place is not None:
            os.close(self._place.fd)
        self._place, self._digest = None, b""
        self._pending, self._ahead, self._error = [], None, None

    def _next_record(self, durable: tuple[bytes, int]) -> Batch | None:
        """The next durable batch with records; what comes before it is put into ``_pending``."""
        if self._ahead is not None:
            batch, self._ahead = self._ahead, None
            return batch
        while True:
            place = self._here()
            scan = place.scan
            if durable[0] == place.header.incarnation.id:
                if scan.next_lsn > durable[1]:
                    return None
                last = durable[1]
            else:
                after = self._incarnation_after(place)
                if after is None:
                    return None  # the tap has not said yet which incarnation this one ended for
                if follows(after[1], *place.here):
                    self._enter(*after)
                    continue
                last = after[1].incarnation.previous_last_lsn
            if scan.sealed:
                self._enter(*self._segment_after(place))
                continue
            before = scan.at, scan.next_lsn, scan.digest
            batch = self._checked(place)
            if batch.last_lsn > last:
                scan.at, scan.next_lsn, scan.chain.value = before
                if durable[0] == place.header.incarnation.id:
                    return None
                raise self._gone("the next incarnation goes on from before it")
            if batch.count:
                return batch
            self._pending.append(batch)

    def _checked(self, place: _Place) -> Batch:
        """The batch at the reader's place, which must be there."""
        try:
            batch = place.scan.next()
            reason = "no batch where one was durable"
        except CorruptRecord as error:
            batch, reason = None, error.reason
        if batch is not None:
            return batch
        if self._is_recycled(place):
            raise self._gone("its segment was freed")
        raise CorruptRecord(place.scan.at, reason, where=str(place.path))

    def _is_recycled(self, place: _Place) -> bool:
        # A freed file loses its name before a byte of it is overwritten.
        try:
            named = os.stat(place.path, follow_symlinks=False)
        except FileNotFoundError:
            return True
        held = os.fstat(place.fd)
        same = (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)
        return not same or read_header(place.fd) != place.header.encode()

    def _segment_after(self, place: _Place) -> tuple[Path, SegmentHeader]:
        """The next segment of the same incarnation, which must be there."""
        path = segment_path(self._directory, place.header.number + 1)
        header = _header_of(path)
        if header is None or not follows(header, *place.here):
            raise self._gone(f"{path.name} is not here, or does not go on from {place.path.name}")
        return path, header

    def _incarnation_after(self, place: _Place) -> tuple[Path, SegmentHeader] | None:
        """The first segment found of the incarnation that goes on from this one."""
        id = place.header.incarnation.id
        return next((found for found in self._headers() if found[1].incarnation.previous == id), None)

    def _headers(self) -> Iterator[tuple[Path, SegmentHeader]]:
        """Every segment that has begun and checks, in order; what the tap frees meanwhile is left out."""
        for _, path in list_segments(self._directory):
            if header := _header_of(path):
                yield path, header

    def _start(self, *, newest: bool) -> None:
        self._leave()
        here = list(self._headers())
        first = [found for found in here if begins_incarnation(found[1])]
        wanted = here[-1][1].incarnation.id if here and newest else None
        for path, header in first:
            if wanted in (None, header.incarnation.id) and self._go(path, header):
                return
        raise self._gone("no incarnation is here from its beginning")

    def _go(self, path: Path, header: SegmentHeader) -> bool:
        """Go before the first batch of a segment. False when it was freed meanwhile."""
        if not self._open(path, header):
            return False
        self._pending = [IncarnationStart(header.incarnation, header.first_lsn)]
        self._digest = header.digest_before
        return True

    def _go_behind(self, path: Path, header: SegmentHeader, lsn: int, digest: bytes) -> bool:
        if not self._open(path, header):
            return False
        scan = self._here().scan
        try:
            while scan.next_lsn - 1 < lsn or (scan.next_lsn - 1 == lsn and scan.digest != digest):
                if scan.next() is None:
                    break
        except CorruptRecord:
            pass
        if (scan.next_lsn - 1, scan.digest) != (lsn, digest):
            self._leave()
            return False
        self._pending = [IncarnationStart(header.incarnation, scan.next_lsn)]
        self._digest = digest
        return True

    def _enter(self, path: Path, header: SegmentHeader) -> None:
        """Go on in the next segment."""
        id = self._here().header.incarnation.id
        if not self._open(path, header):
            raise self._gone(f"{path.name} was freed")
        if header.incarnation.id != id:
            self._pending.append(IncarnationStart(header.incarnation, header.first_lsn))

    def _open(self, path: Path, header: SegmentHeader) -> bool:
        try:
            fd = open_segment(path)
        except FileNotFoundError:
            return False
        if read_header(fd) != header.encode():
            os.close(fd)
            return False
        if self._place is not None:
            os.close(self._place.fd)
        scan = SegmentScan(fd, header.chain(), header.first_lsn, where=str(path), window_bytes=_WINDOW_BYTES)
        self._place = _Place(fd, path, header, scan)
        return True

    def _gone(self, why: str) -> JournalGap:
        return JournalGap("cannot go on reading the journal", where=str(self._directory), why=why)


def _header_of(path: Path) -> SegmentHeader | None:
    number = segment_number(path)
    assert number is not None
    try:
        fd = open_segment(path)
    except FileNotFoundError:
        return None
    try:
        return decode_header(read_header(fd), number, path)
    except CorruptRecord:
        return None
    finally:
        os.close(fd)
