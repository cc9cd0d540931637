"""Frames of hrl/1: bounds before trust, and messages that survive fields they do not know."""

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.wire import frames
from farshore.wire import messages as m

MARK = m.Mark(
    7,
    1_700_000_000_000_000_000,
    "before upgrade",
    (m.VolumeMark(b"v" * 16, b"i" * 16, 42, False, True, 40, (m.CopyInCut(3, ((0, 512), (4096, 512))),)),),
)


def test_a_message_comes_back_as_it_was_sent() -> None:
    frame = frames.encode(MARK)
    header = frames.decode_header(frame)
    assert frames.decode_message(header, frame[frames.HEADER.size :]) == MARK


def test_every_type_has_one_code_and_every_message_a_type() -> None:
    concrete = {
        value
        for value in vars(m).values()
        if isinstance(value, type) and issubclass(value, m.Message) and value is not m.Message
    }
    parts = {m.VolumeHello, m.VolumePosition, m.VolumeMark, m.CopyInCut, m.CopyChunk, m.OfferChunk}
    parts |= {m.Vaulted, m.VolumeStatus}
    assert set(frames.TYPES.values()) == concrete - parts


@pytest.mark.parametrize(
    ("meta", "raw", "code", "version", "zero"),
    [
        (0xFFFFFFFF, 0, 35, 1, 0),
        (frames.META_BYTES_MAX + 1, 0, 26, 1, 0),
        (10, frames.RAW_BYTES_MAX + 1, 21, 1, 0),
        (10, 1, 35, 1, 0),
        (10, 0, 99, 1, 0),
        (10, 0, 35, 2, 0),
        (10, 0, 35, 1, 1),
    ],
)
def test_a_header_out_of_bounds_is_refused(meta: int, raw: int, code: int, version: int, zero: int) -> None:
    with pytest.raises(frames.ProtocolError):
        frames.decode_header(frames.HEADER.pack(meta, raw, code, version, zero))


def test_plain_http_is_refused() -> None:
    with pytest.raises(frames.ProtocolError):
        frames.decode_header(b"GET / HTTP/1.1\r\n")


def test_before_a_certificate_the_whole_frame_is_bounded() -> None:
    header = frames.HEADER.pack(frames.UNAUTHENTICATED_BYTES_MAX, 0, 1, 1, 0)
    frames.decode_header(header)
    with pytest.raises(frames.ProtocolError):
        frames.decode_header(header, bytes_max=frames.UNAUTHENTICATED_BYTES_MAX)


def test_an_older_reader_ignores_fields_added_at_the_end() -> None:
    newer = msgspec.msgpack.encode([5, "field of a later version"])
    assert frames.decode_message(frames.Header(35, len(newer), 0), newer) == m.Ping(5)


@given(st.binary(max_size=200), st.sampled_from(sorted(frames.TYPES)))
def test_garbage_is_a_message_or_a_protocol_error(meta: bytes, code: int) -> None:
    try:
        message = frames.decode_message(frames.Header(code, len(meta), 0), meta)
    except frames.ProtocolError:
        return
    assert type(message) is frames.TYPES[code]


def test_the_header_is_as_the_format_page_says() -> None:
    frame = frames.encode(m.Data(b"v" * 16, 1, 2), raw_bytes=64)
    meta, raw, code, version, zero = struct.unpack_from("<IIBBH", frame)
    assert (meta, raw, code, version, zero) == (len(frame) - 12, 64, 21, 1, 0)
