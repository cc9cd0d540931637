"""Runs of equal writes out of a receive buffer, many at a time. Pure.

A client with many requests in flight sends runs of writes of one length. Their headers are then a column of
records with a stride, and numpy checks, converts and answers all of them in a dozen calls: about 20 µs a run
and 0.3 µs a request, where one by one costs 2 to 3 µs each.
"""

from typing import Final, NamedTuple

import numpy as np

from agent.tap.batch import Bytes
from agent.tap.vectored import Ints
from farshore.nbd import codec

REQUEST_DTYPE: Final = np.dtype([("plain", ">u8"), ("cookie", "V8"), ("offset", ">u8"), ("length", ">u4")])
"""One request header; ``plain`` is magic, flags and type together."""
REPLY_DTYPE: Final = np.dtype([("head", ">u8"), ("cookie", "V8")])
PLAIN_WRITE: Final = codec.REQUEST_MAGIC << 32 | codec.WRITE
"""``plain`` of a write without flags."""
_OK: Final = codec.SIMPLE_REPLY_MAGIC << 32
RUN_MIN: Final = 6
"""Below it one by one is faster (measured)."""
assert REQUEST_DTYPE.itemsize == codec.REQUEST.size
assert REPLY_DTYPE.itemsize == codec.SIMPLE_REPLY.size


class Run(NamedTuple):
    """Whole, valid writes of one length.

    Attributes:
        offsets: Where they go.
        length: Bytes of each.
        payload: Their data, one after another, a copy.
        reply: The replies that say that all is well.
        end: First byte of the buffer behind them.
    """

    offsets: Ints
    length: int
    payload: Bytes
    reply: bytes
    end: int


def write_run(buffer: bytearray, at: int, end: int, volume_bytes: int, block_bytes: int) -> Run | None:
    """Return the run of writes that begins at byte ``at`` of ``buffer``; None when there is none worth it.

    Every write of the run fits the volume and is aligned; the first that does not ends it.
    """
    length = int.from_bytes(buffer[at + 24 : at + 28], "big")
    stride = codec.REQUEST.size + length
    count = (end - at) // stride
    if count < RUN_MIN or length == 0 or length % block_bytes:
        return None
    heads = np.ndarray((count,), REQUEST_DTYPE, buffer, at, (stride,))
    offsets = heads["offset"]
    good = (heads["plain"] == PLAIN_WRITE) & (heads["length"] == length)
    # Unsigned: an offset beyond 2^63 is larger than any limit, not negative.
    good &= offsets <= np.uint64(max(volume_bytes - length, 0))
    good &= (offsets & np.uint64(block_bytes - 1)) == 0
    if not good.all():
        count = int(np.argmin(good))
        if count < RUN_MIN:
            return None
        heads, offsets = heads[:count], offsets[:count]
    if length > volume_bytes:
        return None
    payload = np.ndarray((count, length), np.uint8, buffer, at + codec.REQUEST.size, (stride, 1)).flatten()
    reply = np.empty(count, REPLY_DTYPE)
    reply["head"] = _OK
    reply["cookie"] = heads["cookie"]
    return Run(offsets.astype(np.int64), length, payload, reply.tobytes(), at + count * stride)
