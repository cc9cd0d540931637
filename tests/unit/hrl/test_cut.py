"""The payload of a MARK."""

import pytest

from farshore.errors import CorruptRecord
from farshore.hrl.cut import Cut, CutVolume, decode_cut, encode_cut

CUT = Cut(9, 77, "before the upgrade", (CutVolume(bytes(16), b"\1" * 16, 5, False),))


def test_round_trip() -> None:
    assert decode_cut(encode_cut(CUT)) == CUT
    assert decode_cut(memoryview(encode_cut(Cut(1, 2, None, ())))) == Cut(1, 2, None, ())


@pytest.mark.parametrize(
    "payload", [b"", b"\xc0", b"\x91\x01", encode_cut(CUT)[:-1], encode_cut(CUT) + b"\0"]
)
def test_anything_else_is_refused(payload: bytes) -> None:
    with pytest.raises(CorruptRecord):
        decode_cut(payload)
