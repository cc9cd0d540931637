"""The segment header, bit by bit."""

import pytest

from farshore.errors import CorruptRecord
from farshore.hrl.segment import SEGMENT_HEADER_BYTES, Incarnation, SegmentHeader, decode_segment_header

HEADER = SegmentHeader(
    bytes(range(16)),
    bytes(range(16, 32)),
    Incarnation(bytes(range(32, 48)), 3, bytes(range(48, 64)), 41, bytes(range(64, 96))),
    7,
    42,
    bytes(range(96, 128)),
    512,
    1_700_000_000_000_000_000,
    1 << 40,
)


def test_round_trip() -> None:
    raw = HEADER.encode()
    assert len(raw) == SEGMENT_HEADER_BYTES
    assert decode_segment_header(raw) == HEADER


def test_every_flipped_bit_is_noticed() -> None:
    raw = HEADER.encode()
    bits = [*range(208 * 8), *range(208 * 8, 4064 * 8, 97), *range(4064 * 8, 4096 * 8)]
    for bit in bits:
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecord):
            decode_segment_header(bytes(changed))


@pytest.mark.parametrize("kept", [0, 1, 8, 4095])
def test_shorter_is_refused(kept: int) -> None:
    with pytest.raises(CorruptRecord, match="shorter"):
        decode_segment_header(HEADER.encode()[:kept])
