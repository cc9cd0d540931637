"""The 4 KiB header of a segment; see ``docs/formats/hrl.md``."""

import struct
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from farshore.errors import CorruptRecord
from farshore.hrl.batch import DIGEST_BYTES, RunningDigest, incarnation_key

SEGMENT_HEADER_BYTES: Final = 4096
NO_INCARNATION: Final = bytes(16)
NO_DIGEST: Final = bytes(DIGEST_BYTES)

_HEADER: Final = struct.Struct("<8sHHI16s16s16sQQQ16sQ32s32sIIQQ")
_MAGIC: Final = b"FARSHHRL"
_VERSION: Final = 1
_CHECKED_BYTES: Final = SEGMENT_HEADER_BYTES - DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One opening of a volume's journal for writing, and what it continues.

    Attributes:
        id: 16 random bytes.
        ordinal: +1 at each opening.
        previous: Id of the incarnation before, zeros in the first.
        previous_last_lsn: Its last LSN, 0 in the first.
        previous_digest: Its running digest at that LSN, zeros in the first.
    """

    id: bytes
    ordinal: int
    previous: bytes = NO_INCARNATION
    previous_last_lsn: int = 0
    previous_digest: bytes = NO_DIGEST


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What one segment says of itself. Fields as in the format page; ids are 16 bytes."""

    machine: bytes
    volume: bytes
    incarnation: Incarnation
    number: int
    first_lsn: int
    digest_before: bytes
    sector_bytes: int
    created_ns: int
    volume_bytes: int

    def chain(self) -> RunningDigest:
        """Running digest positioned before the segment's first batch."""
        key = incarnation_key(self.machine, self.volume, self.incarnation.id)
        return RunningDigest(key, self.digest_before)

    def encode(self) -> bytes:
        """The 4,096 bytes of the header."""
        packed = _HEADER.pack(
            _MAGIC,
            _VERSION,
            0,
            SEGMENT_HEADER_BYTES,
            self.machine,
            self.volume,
            self.incarnation.id,
            self.incarnation.ordinal,
            self.number,
            self.first_lsn,
            self.incarnation.previous,
            self.incarnation.previous_last_lsn,
            self.incarnation.previous_digest,
            self.digest_before,
            self.sector_bytes,
            0,
            self.created_ns,
            self.volume_bytes,
        )
        body = packed.ljust(_CHECKED_BYTES, b"\0")
        return body + blake3(body).digest()


def decode_segment_header(buffer: bytes | memoryview) -> SegmentHeader:
    """Decode the first 4,096 bytes of a segment.

    Raises:
        CorruptRecord: Too short, not a segment, a newer version, or a header that does not check.
    """
    if len(buffer) < SEGMENT_HEADER_BYTES:
        raise CorruptRecord(0, "shorter than a segment header")
    body = bytes(buffer[:_CHECKED_BYTES])
    if body[:8] != _MAGIC:
        raise CorruptRecord(0, "not a segment")
    if blake3(body).digest() != bytes(buffer[_CHECKED_BYTES:SEGMENT_HEADER_BYTES]):
        raise CorruptRecord(0, "the segment header does not check")
    fields = _HEADER.unpack_from(body)
    _, version, _, _, machine, volume, incarnation, ordinal, number, first_lsn = fields[:10]
    previous, previous_last_lsn, previous_digest, digest_before, sector_bytes, _, created_ns, volume_bytes = (
        fields[10:]
    )
    if version != _VERSION:
        raise CorruptRecord(0, f"segment format version {version}, this program reads {_VERSION}")
    return SegmentHeader(
        machine,
        volume,
        Incarnation(incarnation, ordinal, previous, previous_last_lsn, previous_digest),
        number,
        first_lsn,
        digest_before,
        sector_bytes,
        created_ns,
        volume_bytes,
    )
