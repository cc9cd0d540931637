"""zstd as both sides use it: one frame per block, its length known before, nothing taken on trust."""

import threading
from typing import Final

import zstandard

from farshore.errors import IntegrityError
from farshore.units import MIB

ZSTD: Final = 1
PLAIN: Final = 0
WINDOW_BYTES_MAX: Final = 8 * MIB
LEVEL: Final = 3
"""Level of everything but chunks: small beside them, read more often than written."""
ZSTD_VERSION: Final = zstandard.ZSTD_VERSION

Buffer = bytes | bytearray | memoryview


class Codec:
    """One zstd compressor and decompressor. Not thread-safe: one per thread, see `codec`.

    Args:
        level: zstd level, -100 to 22.
    """

    def __init__(self, level: int = LEVEL) -> None:
        self.level = level
        self._compressor = zstandard.ZstdCompressor(
            level=level, write_content_size=True, write_checksum=False
        )
        # In units of KiB for some versions of the binding, in bytes for zstd: ours takes bytes.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)

    def shrink(self, plain: Buffer) -> bytes | None:
        """Return one frame that holds ``plain``, or None when it would be no smaller. Nothing is checked."""
        frame = self._compressor.compress(plain)
        return frame if len(frame) < len(plain) else None

    def compress(self, plain: Buffer) -> tuple[Buffer, int]:
        """Return ``plain`` as it is stored, and the flag: compressed if that is smaller.

        The compressed form was decompressed and compared: a compressor's bug, or a bit flipped in its tables,
        would otherwise be sealed and found at the first restore.

        Raises:
            IntegrityError: What comes out is not what went in; this host is not to be trusted with data.
        """
        stored = self.shrink(plain)
        if stored is None:
            return plain, PLAIN
        back = self._decompressor.decompress(stored, max_output_size=len(plain), allow_extra_data=False)
        # startswith compares memory with memory; memoryview == bytes goes item by item, at 1.6 ns/B.
        if len(back) != len(plain) or not back.startswith(plain):
            raise IntegrityError(
                "compressed data does not decompress to what it was",
                why=f"{len(plain)} bytes at level {self.level}, zstd {ZSTD_VERSION}",
                fix="suspect this host's memory",
            )
        return stored, ZSTD

    def expand(self, stored: Buffer, plain_bytes: int, flag: int, where: str) -> bytes:
        """Return the ``plain_bytes`` bytes that ``stored`` holds; it may be hostile.

        Raises:
            IntegrityError: It does not hold them.
        """
        if flag == PLAIN:
            plain = bytes(stored)
        elif flag == ZSTD:
            try:
                # Before anything is allocated: a decoder in one step heeds neither bound by itself.
                shape = zstandard.get_frame_parameters(stored)
                if shape.content_size != plain_bytes or shape.window_size > WINDOW_BYTES_MAX:
                    raise IntegrityError(
                        "a section is not as long as its table says",
                        where=where,
                        why=f"{shape.content_size} bytes, window {shape.window_size}",
                    )
                plain = self._decompressor.decompress(
                    stored, max_output_size=plain_bytes, allow_extra_data=False
                )
            except zstandard.ZstdError as exc:
                raise IntegrityError("a section does not decompress", where=where, why=str(exc)) from exc
        else:
            raise IntegrityError("a section is of no known form", where=where, why=f"flag {flag}")
        if len(plain) != plain_bytes:
            raise IntegrityError("a section is not as long as its table says", where=where)
        return plain


_local: Final = threading.local()


def codec() -> Codec:
    """Return this thread's codec, of the default level."""
    found: Codec | None = getattr(_local, "codec", None)
    if found is None:
        found = _local.codec = Codec()
    return found
