"""Blocks of a COPY in each form that an agent may send, and back."""

from blake3 import blake3

from farshore.compression import codec
from farshore.wire import messages as m
from process_server.ingest.pipeline import Piece
from process_server.vault.pack import Stored


def copied(offset: int, block: bytes, *, compress: bool) -> tuple[m.CopyChunk, bytes]:
    """The block as an agent announces it, and its part of the raw bytes."""
    if not any(block):
        return m.CopyChunk(offset, len(block), m.COPY_ZEROS, b""), b""
    digest = blake3(block).digest()
    if not compress:
        return m.CopyChunk(offset, len(block), m.COPY_DATA, digest), block
    frame = codec().shrink(block)
    if frame is None:
        return m.CopyChunk(offset, len(block), m.COPY_DENSE, digest), block
    return m.CopyChunk(offset, len(block), m.COPY_ZSTD, digest, len(frame)), frame


def plaintext(piece: Piece | None) -> bytes:
    """What a verified piece holds."""
    assert piece is not None
    if isinstance(piece, Stored):
        return codec().expand(piece.body, piece.plain_bytes, piece.flag, "a piece")
    return bytes(piece)


def held_in(chunk: m.CopyChunk, came: bytes) -> bytes:
    """What a block that came as DATA, DENSE or ZSTD holds; nothing is held against its hash."""
    if chunk.kind != m.COPY_ZSTD:
        return came
    return codec().expand(came, chunk.length, 1, "a block")


def sent_bytes(chunk: m.CopyChunk) -> int:
    """Length of the block's part of the raw bytes."""
    if chunk.kind in (m.COPY_REFERENCE, m.COPY_ZEROS):
        return 0
    return chunk.frame_bytes if chunk.kind == m.COPY_ZSTD else chunk.length
