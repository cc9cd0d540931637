"""The short way through a run of equal writes does what the long way does."""

from hypothesis import given
from hypothesis import strategies as st

from agent.tap.parse import RUN_MIN, write_run
from farshore.nbd import codec

SIZE = 1 << 20
headers = st.tuples(
    st.sampled_from([codec.WRITE] * 30 + [codec.READ, codec.FLUSH, codec.TRIM]),
    st.sampled_from([0] * 30 + [codec.FUA]),
    st.one_of(st.integers(0, SIZE // 512 - 1).map(lambda n: n * 512), st.sampled_from([7, SIZE, 1 << 63])),
    st.sampled_from([1024] * 30 + [512, 1536]),
)


@given(st.lists(headers, max_size=30), st.integers(0, 40), st.integers(0, 1600), st.sampled_from([0, 5]))
def test_a_run_is_a_prefix_of_what_one_by_one_gives(
    requests: list[tuple[int, int, int, int]], before: int, cut: int, filler: int
) -> None:
    stream = bytearray(bytes([filler]) * before)
    expected = []
    for cookie, (kind, flags, offset, length) in enumerate(requests):
        content = bytes([cookie]) * length if kind == codec.WRITE else b""
        stream += codec.encode_request(kind, cookie, offset, length, flags) + content
        expected.append((kind, flags, offset, length, content))
    end = max(before, len(stream) - cut)
    run = write_run(stream, before, end, SIZE, 512) if end - before >= codec.REQUEST.size else None
    if run is None:
        return
    count = len(run.offsets)
    assert count >= RUN_MIN
    at = before
    for index in range(count):
        kind, flags, offset, length, content = expected[index]
        assert (kind, flags, length) == (codec.WRITE, 0, run.length)
        assert offset % 512 == 0
        assert offset + length <= SIZE
        assert run.offsets[index] == offset
        assert run.payload[index * length : (index + 1) * length].tobytes() == content
        at += codec.REQUEST.size + length
    assert run.end == at <= end
    assert run.reply == b"".join(codec.simple_reply(cookie) for cookie in range(count))


def stream_of(count: int, length: int) -> bytearray:
    return bytearray(
        b"".join(
            codec.encode_request(codec.WRITE, n, n * length, length) + bytes(length) for n in range(count)
        )
    )


def test_a_long_run_is_found_whole_and_without_what_is_cut_short() -> None:
    stream = stream_of(100, 4096)
    run = write_run(stream, 0, len(stream) - 1, 1 << 30, 512)
    assert run is not None
    assert len(run.offsets) == 99


def test_writes_longer_than_the_volume_are_no_run() -> None:
    stream = stream_of(10, 4096)
    assert write_run(stream, 0, len(stream), 2048, 512) is None
    assert write_run(stream_of(10, 0), 0, 280, 2048, 512) is None
