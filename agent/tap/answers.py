"""Replies to NBD requests that need more than a cookie."""

import errno

import numpy as np

from agent.tap.batch import Answering, Batch, overlaps, patch
from agent.tap.disk import Disk
from farshore.nbd import codec


def failed_reply(reply: bytes, error: int) -> bytes:
    """The replies in ``reply``, each with ``error`` instead of 0."""
    size = codec.SIMPLE_REPLY.size
    cookies = (codec.SIMPLE_REPLY.unpack_from(reply, at)[2] for at in range(0, len(reply), size))
    return b"".join(codec.simple_reply(cookie, error) for cookie in cookies)


def answer_read(
    disk: Disk,
    client: Answering,
    cookie: int,
    offset: int,
    length: int,
    pending: tuple[Batch, ...],
    *,
    structured: bool,
) -> None:
    """Read the disk, lay over it what it does not have yet, and send that. Runs in a read thread."""
    content = np.empty(length, np.uint8).data
    try:
        disk.read_into(content, offset)
    except OSError as error:
        code = error.errno or errno.EIO
        client.send(codec.error_chunk(cookie, code) if structured else codec.simple_reply(cookie, code))
        return
    patch(content, offset, pending)
    head = codec.data_chunk(cookie, offset, length) if structured else codec.simple_reply(cookie)
    client.send(head, content)


def answer_extents(
    disk: Disk,
    client: Answering,
    cookie: int,
    offset: int,
    length: int,
    pending: tuple[Batch, ...],
    context: int,
) -> None:
    """Send the allocation of a range; all data where writes are pending. Runs in a read thread."""
    try:
        extents = disk.extents(offset, length)
    except OSError:
        extents = [codec.Extent(length, 0)]
    if overlaps(offset, length, pending):
        extents = [codec.Extent(length, 0)]
    client.send(codec.block_status_chunk(cookie, context, extents))
