"""Any cut of an NBD stream gives the same events, and no byte of garbage makes us hold what it claims."""

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.errors import NotFound
from farshore.nbd import codec
from farshore.nbd.codec import NbdError, Request
from farshore.nbd.handshake import ClientHandshake, ExportInfo, ServerHandshake
from farshore.units import MIB

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
EXPORTS = {"disk": ExportInfo(1 << 30, codec.HAS_FLAGS | codec.SEND_FLUSH), "other": ExportInfo(512, 1)}


@st.composite
def requests(draw: st.DrawFn) -> Request:
    kind = draw(st.integers(0, 9))
    content = draw(st.binary(max_size=200)) if kind == codec.WRITE else b""
    length = len(content) if kind == codec.WRITE else draw(u32)
    return Request(kind, draw(u16), draw(u64), draw(u64), length, content)


def encoded(request: Request) -> bytes:
    head = codec.encode_request(request.type, request.cookie, request.offset, request.length, request.flags)
    return head + request.data


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[a:b] for a, b in pairwise(places)]


cuts = st.lists(st.integers(0, 1 << 16), max_size=12)


@given(st.lists(requests(), max_size=8), cuts)
def test_requests_are_the_same_however_the_stream_is_cut(sent: list[Request], where: list[int]) -> None:
    decoder = codec.RequestDecoder()
    stream = b"".join(map(encoded, sent))
    assert [r for piece in pieces(stream, where) for r in decoder.feed(piece)] == sent


@given(st.binary(max_size=400), cuts)
def test_garbage_is_refused_or_waited_for_never_believed(stream: bytes, where: list[int]) -> None:
    decoder = codec.RequestDecoder()
    try:
        decoded = [r for piece in pieces(stream, where) for r in decoder.feed(piece)]
    except NbdError:
        return
    assert b"".join(map(encoded, decoded)) == stream[: sum(len(encoded(r)) for r in decoded)]


@given(st.integers(codec.DATA_BYTES_MAX + 1, (1 << 32) - 1))
def test_a_write_beyond_the_bound_is_refused_by_its_header(length: int) -> None:
    with pytest.raises(NbdError, match="write too long"):
        list(codec.RequestDecoder().feed(codec.encode_request(codec.WRITE, 1, 0, length)))


def test_a_claimed_length_allocates_nothing() -> None:
    tracemalloc.start()
    try:
        decoder, replies = codec.RequestDecoder(), codec.ReplyDecoder()
        list(decoder.feed(codec.encode_request(codec.WRITE, 1, 0, codec.DATA_BYTES_MAX)))
        replies.expect_data(7, codec.DATA_BYTES_MAX)
        list(replies.feed(codec.simple_reply(7)))
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@given(cuts)
def test_replies_are_the_same_however_the_stream_is_cut(where: list[int]) -> None:
    extents = [codec.Extent(4096, codec.STATE_HOLE | codec.STATE_ZERO), codec.Extent(512, 0)]
    stream = b"".join(
        [
            codec.simple_reply(1),
            codec.simple_reply(2) + b"abcd",
            codec.simple_reply(3, codec.EIO),
            codec.data_chunk(4, 4096, 3) + b"xyz",
            codec.error_chunk(5, codec.ENOSPC),
            codec.block_status_chunk(6, 1, extents),
        ]
    )
    decoder = codec.ReplyDecoder()
    decoder.expect_data(2, 4)
    decoder.expect_data(3, 4)
    decoder.expect_data(4, 3)
    assert [r for piece in pieces(stream, where) for r in decoder.feed(piece)] == [
        codec.Reply(1, done=True),
        codec.Reply(2, done=True, data=b"abcd"),
        codec.Reply(3, done=True, error=codec.EIO),
        codec.Reply(4, done=True, offset=4096, data=b"xyz"),
        codec.Reply(5, done=True, error=codec.ENOSPC),
        codec.Reply(6, done=True, extents=tuple(extents)),
    ]


@given(st.binary(max_size=200), cuts)
def test_garbage_replies_raise_only_our_error(stream: bytes, where: list[int]) -> None:
    decoder = codec.ReplyDecoder()
    try:
        for piece in pieces(stream, where):
            list(decoder.feed(piece))
    except NbdError:
        pass


def server() -> ServerHandshake:
    return ServerHandshake(EXPORTS.get, lambda: EXPORTS)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_both_sides_agree_whatever_the_pieces(sizes: list[int]) -> None:
    ours, theirs = server(), ClientHandshake("disk")
    to_client, to_server = bytearray(ours.greeting()), bytearray()
    turn = 0
    while theirs.agreed is None or ours.agreed is None:
        size = sizes[turn % len(sizes)]
        turn += 1
        to_server += theirs.feed(bytes(to_client[:size])) if to_client and theirs.agreed is None else b""
        del to_client[:size]
        to_client += ours.feed(bytes(to_server[:size])) if to_server and ours.agreed is None else b""
        del to_server[:size]
        assert turn < 2000
    assert theirs.agreed == ours.agreed
    assert theirs.agreed.allocation
    assert theirs.agreed.structured


def test_an_unknown_export_is_named() -> None:
    ours, theirs = server(), ClientHandshake("nope")

    def talk() -> None:
        to_server = theirs.feed(ours.greeting())
        while True:
            to_server = theirs.feed(ours.feed(to_server))

    with pytest.raises(NotFound, match="nope"):
        talk()


@given(st.binary(max_size=300), cuts)
def test_a_garbage_client_gets_an_error_or_patience(stream: bytes, where: list[int]) -> None:
    ours = server()
    try:
        for piece in pieces(stream, where):
            ours.feed(piece)
    except NbdError:
        return
    assert ours.agreed is None or b"disk" in stream or b"other" in stream


OPTION = b"IHAVEOPT"


@given(st.integers(0, 20), st.binary(max_size=120))
def test_any_option_body_is_answered_and_leaves_the_stream_in_step(option: int, body: bytes) -> None:
    ours = server()
    head = (3).to_bytes(4, "big") + OPTION + option.to_bytes(4, "big") + len(body).to_bytes(4, "big")
    ours.feed(head + body)
    if ours.agreed is not None or ours.closed:
        return
    answer = ours.feed(OPTION + (2).to_bytes(4, "big") + bytes(4))
    assert answer == (0x3E889045565A9).to_bytes(8, "big") + bytes([0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("flags", "option", "padding"), [(3, b"disk", 0), (1, b"disk", 124)], ids=["no-zeroes", "zeroes"]
)
def test_old_style_export_name(flags: int, option: bytes, padding: int) -> None:
    ours = server()
    head = flags.to_bytes(4, "big") + OPTION + (1).to_bytes(4, "big") + len(option).to_bytes(4, "big")
    answer = ours.feed(head + option)
    assert len(answer) == 10 + padding
    assert int.from_bytes(answer[:8], "big") == 1 << 30
    assert ours.agreed is not None
    assert not ours.agreed.structured
