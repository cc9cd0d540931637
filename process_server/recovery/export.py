"""A volume at a point over NBD: bootable in seconds, whatever its size, for nothing is copied first."""

import asyncio
import ipaddress
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar
from urllib.parse import quote

from farshore.errors import UsageError
from farshore.nbd import codec
from farshore.units import SECTOR_BYTES
from process_server.recovery.image import Piece, VolumeImage
from process_server.recovery.overlay import CLUSTER_BYTES, OverlayFile

READERS: Final = 4
"""Threads that read: more than cores, since a remote store is mostly waited for."""
HYDRATE_CLUSTERS: Final = 16
"""Clusters copied at once in the background: 1 MiB, so that a write hardly waits for it."""
EXTENTS_BYTES_MAX: Final = 64 * 1024**3
"""Of one block status: the client asks again for the rest."""

T = TypeVar("T")


class Address(NamedTuple):
    """Where an export listens: a Unix socket, or a host of the loopback and a port."""

    socket: Path | None
    host: str = ""
    port: int = 0

    def uri(self, name: str) -> str:
        """Return what clients are given."""
        export = quote(name)
        if self.socket is not None:
            return f"nbd+unix:///{export}?socket={quote(str(self.socket), safe='/')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{export}"


def parse_address(text: str) -> Address:
    """Return the address that ``unix:PATH`` or ``HOST:PORT`` means.

    Raises:
        UsageError: Neither; or not the loopback, where whoever can connect could read the disk.
    """
    kind, colon, rest = text.partition(":")
    if kind == "unix" and colon:
        if not rest:
            raise UsageError("no socket named", where=text, fix="write unix:PATH")
        return Address(Path(rest).absolute())
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError("not an address to listen on", where=text, fix="write unix:PATH or 127.0.0.1:PORT")
    try:
        is_loopback = bare == "localhost" or ipaddress.ip_address(bare).is_loopback
    except ValueError as exc:
        raise UsageError(
            "not an address to listen on", where=text, fix="write unix:PATH or 127.0.0.1:PORT"
        ) from exc
    if not is_loopback:
        raise UsageError(
            "NBD off the loopback needs TLS with a client certificate",
            where=text,
            why="whoever can connect could read the disk",
            fix="use 127.0.0.1:PORT or unix:PATH, and a tunnel from elsewhere",
        )
    return Address(None, "127.0.0.1" if bare == "localhost" else bare, int(port))


class VolumeExport:
    """A volume image as `farshore.nbd.server.Export`; writable when it has an overlay.

    Whoever makes it calls `close`, after the last client is gone.
    """

    def __init__(self, image: VolumeImage, overlay: OverlayFile | None = None) -> None:
        self._image, self._overlay = image, overlay
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="export-read")
        # One thread for all that changes the overlay: completing a cluster and writing into it do not mix.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="export-write")

    @property
    def size(self) -> int:
        return self._image.size_bytes

    @property
    def read_only(self) -> bool:
        return self._overlay is None

    @property
    def block_bytes(self) -> int:
        return SECTOR_BYTES if self.size % SECTOR_BYTES == 0 else 1

    async def read(self, offset: int, length: int) -> bytes:
        source = self._overlay if self._overlay is not None else self._image
        return await self._run(self._readers, lambda: source.read(offset, length))

    async def write(self, offset: int, data: bytes, *, fua: bool) -> None:
        overlay = self._writable()
        await self._run(self._writer, lambda: overlay.write(offset, data))
        if fua:
            await self.flush()

    async def flush(self) -> None:
        if self._overlay is not None:
            await self._run(self._writer, self._overlay.flush)

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        await self.zero(offset, length, may_punch=True, fua=fua)

    async def zero(self, offset: int, length: int, *, may_punch: bool, fua: bool) -> None:
        overlay = self._writable()
        await self._run(self._writer, lambda: overlay.zero(offset, length))
        if fua:
            await self.flush()

    async def extents(self, offset: int, length: int) -> list[codec.Extent]:
        source = self._overlay if self._overlay is not None else self._image
        length = min(length, EXTENTS_BYTES_MAX)
        pieces = await self._run(self._readers, lambda: source.extents(offset, length))
        return [codec.Extent(piece.length, state_of(piece)) for piece in pieces]

    async def hydrate(self, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Copy into the overlay what is only in the vault, until all of it is there. May be cancelled.

        Raises:
            WrongKey, IntegrityError, CapacityError, Failed: Of the vault or the overlay.
        """
        overlay = self._writable()
        step = HYDRATE_CLUSTERS * CLUSTER_BYTES
        for at in range(0, self.size, step):
            length = min(step, self.size - at)
            data = await self._run(self._readers, partial(self._only_in_vault, at, length))
            if data:
                await self._run(self._writer, partial(overlay.fill, at // CLUSTER_BYTES, data))
            told(min(at + step, self.size), self.size)
        await self.flush()

    def close(self) -> None:
        """Finish what was begun; what was written is durable on return."""
        self._readers.shutdown()
        self._writer.shutdown()
        if self._overlay is not None:
            self._overlay.close()

    def _only_in_vault(self, offset: int, length: int) -> bytes:
        if not any(piece.is_data for piece in self._image.extents(offset, length)):
            return b""
        return self._image.read(offset, length)

    def _writable(self) -> OverlayFile:
        assert self._overlay is not None, "the server answers writes to a read-only export itself"
        return self._overlay

    @staticmethod
    async def _run(executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, work)


def state_of(piece: Piece) -> int:
    """Return the NBD block status of a piece."""
    return 0 if piece.is_data else codec.STATE_HOLE | codec.STATE_ZERO
