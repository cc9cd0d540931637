"""The tap of a machine: its volumes, their listeners, the cuts over them, and the control socket."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import msgspec

from agent.capture import control
from agent.capture.control import (
    Cleared,
    CutTaken,
    DirtyMapIs,
    Done,
    Refused,
    TapStatus,
    VolumeStatus,
    Welcome,
)
from agent.config import Layout
from agent.tap.connection import Connection
from agent.tap.cutter import CutNumbers, plan_cut
from agent.tap.lastrun import Place
from agent.tap.opening import Opened, open_volume
from agent.tap.volume import TICK_S, Volume
from agent.tap.worker import Worker
from agent.volumes import VolumeConfig, list_volumes, load_volume, nbd_uri, socket_path, state_page
from farshore.clock import Clock
from farshore.errors import Conflict, FarshoreError, NotFound
from farshore.hrl.cut import Cut, CutVolume, encode_cut
from farshore.ids import id_from_hex
from farshore.nbd.server import bind_unix
from farshore.telemetry import get_logger
from farshore.units import KIB

CONNECTIONS_MAX: Final = 32
"""NBD connections of one volume; each can pin a write of 32 MiB."""
CONTROL_MAX: Final = 16
OPENING_S: Final = 15.0
"""A volume that is not open by then is not waited for any more; the agent gives a tap 30 s to answer."""
BEAT_BUSY_S: Final = 0.004
BEAT_IDLE_S: Final = 0.05
NO_INCARNATION: Final = bytes(16)


class _Entry:
    """A volume of this machine, served or not."""

    def __init__(self, directory: Path, config: VolumeConfig) -> None:
        self.use(directory, config)
        self.volume: Volume | None = None
        self.opened: Opened | None = None
        self.listener: socket.socket | None = None
        self.connections: set[Connection] = set()
        self.problem = "it is being opened"
        self.opening = asyncio.Lock()
        self.busy_since = 0.0

    def use(self, directory: Path, config: VolumeConfig) -> None:
        """Go by these settings. Looks at the mounts, once: `Tap.status` is asked between two writes."""
        self.config = config
        self.state_page = state_page(directory, config)


class Tap:
    """All volumes of one machine. Everything runs in the loop's thread but what is said to block."""

    def __init__(self, directory: Path, machine: bytes, clock: Clock) -> None:
        self._directory, self._layout, self._machine, self._clock = (
            directory,
            Layout(directory),
            machine,
            clock,
        )
        self._loop = asyncio.get_running_loop()
        self._log = get_logger(component="tap")
        self._entries: dict[str, _Entry] = {}
        self._numbers: CutNumbers | None = None
        self._cutting = asyncio.Lock()
        self._gate = threading.Lock()
        self._control: socket.socket | None = None
        self._controls: set[asyncio.Task[None]] = set()
        self._tick: asyncio.TimerHandle | None = None
        self._beating = threading.Event()
        self._stopping = False
        self._openings: set[asyncio.Future[None]] = set()
        self.stopped = asyncio.Event()

    async def start(self) -> None:
        """Open every volume that is protected, then listen for the agent.

        A volume that cannot be opened does not keep the others from being served: it says why in `status`.
        """
        self._layout.run.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._layout.run / "cut"
        self._numbers = await asyncio.to_thread(CutNumbers, path, self._clock)
        self._control = bind_unix(self._layout.tap_socket)
        self._control.setblocking(False)
        opening = [asyncio.ensure_future(self._open_at_start(name)) for name in list_volumes(self._directory)]
        if opening:
            # A disk or journal that hangs keeps only its own volume from being served.
            _, late = await asyncio.wait(opening, timeout=OPENING_S)
            self._openings.update(late)
            for task in late:
                task.add_done_callback(self._openings.discard)
        self._loop.add_reader(self._control.fileno(), self._accept_control)
        self._tick = self._loop.call_later(TICK_S, self._on_tick)
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    async def _open_at_start(self, name: str) -> None:
        try:
            await self.protect(name, None)
        except FarshoreError as error:
            self._log.error("volume_not_served", volume=name, error=str(error))

    def status(self) -> TapStatus:
        return TapStatus(
            os.getpid(), tuple(self._status(entry) for _, entry in sorted(self._entries.items()))
        )

    async def protect(self, name: str, held: int | None) -> VolumeStatus:
        """Serve a volume, as its ``volume.toml`` says; does nothing when it is served already.

        Raises:
            NotFound, ConfigError, Conflict, Failed: As `open_volume` and `bind_unix`; or it has been on its
                way for `OPENING_S` and still is.
        """
        config = load_volume(self._directory, name)
        entry = self._entries.setdefault(name, _Entry(self._directory, config))
        async with self._turn(entry):
            if entry.volume is None:
                entry.use(self._directory, config)
                try:
                    await self._serve(entry, held)
                except FarshoreError as error:
                    entry.problem = str(error)
                    raise
        return self._status(entry)

    @contextlib.asynccontextmanager
    async def _turn(self, entry: _Entry) -> AsyncIterator[None]:
        """Hold the entry's lock. Raises Conflict when who opens the volume does not come back."""
        begun = entry.busy_since if entry.opening.locked() else time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, begun + OPENING_S - time.monotonic())):
                await entry.opening.acquire()
        except TimeoutError as error:
            raise Conflict(
                "the volume is still being opened",
                where=entry.config.name,
                why="its disk or its journal does not answer",
                fix="look at the kernel's log; it is served as soon as they do",
            ) from error
        entry.busy_since = time.monotonic()
        try:
            yield
        finally:
            entry.opening.release()

    async def _serve(self, entry: _Entry, held: int | None) -> None:
        config = entry.config
        for other in self._entries.values():
            if other is not entry and other.volume and Path(other.config.disk) == Path(config.disk):
                raise Conflict("the disk is protected already", where=config.disk, why=other.config.name)
        place = Place(self._layout.volume(config.name), entry.state_page, self._machine)
        listener = bind_unix(socket_path(self._directory, config))
        # A thread of its own: it may hang for as long as the disk does.
        worker = Worker(f"{config.name}-open")
        try:
            opened = await asyncio.wrap_future(
                worker.submit(lambda: open_volume(place, config, held, self._clock))
            )
        except BaseException:
            listener.close()
            raise
        finally:
            worker.stop()
        if self._stopping:
            listener.close()
            opened.close()
            raise Conflict("the tap is stopping", where=config.name)

        def relieved() -> None:
            for connection in list(entry.connections):
                connection.resume()

        entry.opened = opened
        entry.volume = Volume(place, config, opened, self._clock, self._gate, relieved)
        entry.problem = ""
        entry.listener = listener
        listener.setblocking(False)
        self._loop.add_reader(listener.fileno(), self._accept, entry)
        self._log.info("volume_served", volume=config.name, uri=nbd_uri(self._directory, config))

    async def unprotect(self, name: str) -> None:
        """Stop a volume in order and forget it. Its folder is the caller's to remove."""
        entry = self._entry(name)
        async with self._turn(entry):
            await self._stop_entry(entry)
            self._entries.pop(name, None)
            # Not left behind on the tmpfs; whoever still reads it sees the last state.
            entry.state_page.unlink(missing_ok=True)

    async def stop(self) -> bool:
        """Stop everything in order; True when every volume stopped cleanly."""
        if self._stopping:
            await self.stopped.wait()
            return True
        self._stopping = True
        self._log.info("tap_stopping")
        async with asyncio.TaskGroup() as tasks:
            stops = [tasks.create_task(self._stop_entry(entry)) for entry in self._entries.values()]
        self._beating.set()
        if self._tick is not None:
            self._tick.cancel()
        if self._control is not None:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._layout.tap_socket.unlink(missing_ok=True)
        self.stopped.set()
        return all(stop.result() for stop in stops)

    async def _stop_entry(self, entry: _Entry) -> bool:
        if entry.listener is not None:
            self._loop.remove_reader(entry.listener.fileno())
            entry.listener.close()
            socket_path(self._directory, entry.config).unlink(missing_ok=True)
            entry.listener = None
        volume, entry.volume = entry.volume, None
        if volume is None:
            return True
        for connection in list(entry.connections):
            connection.stop_reading()
        clean = await volume.stop()
        for connection in list(entry.connections):
            connection.close()
        return clean

    # -- listening -----------------------------------------------------------------------------------------

    def _accept(self, entry: _Entry) -> None:
        assert entry.listener is not None
        try:
            peer, _ = entry.listener.accept()
        except OSError:
            return
        if len(entry.connections) >= CONNECTIONS_MAX:
            self._log.warning("nbd_too_many_connections", volume=entry.config.name)
            peer.close()
            return
        name = entry.config.name
        # A name left out means the only export there is: what `nbd://` URLs without a path ask for.
        connection = Connection(
            peer,
            lambda asked: entry.volume.frontend if entry.volume and asked in (name, "") else None,
            lambda: [name],
            entry.connections.discard,
        )
        entry.connections.add(connection)

    def _on_tick(self) -> None:
        self._tick = self._loop.call_later(TICK_S, self._on_tick)
        now = time.monotonic()
        for entry in self._entries.values():
            if entry.volume is not None:
                entry.volume.tick()
            for connection in list(entry.connections):
                connection.look_after(now)

    def _beat(self) -> None:
        """A thread of its own: heartbeats go on while the loop's thread is busy."""
        pause = BEAT_IDLE_S
        while not self._beating.wait(pause):
            pause = BEAT_IDLE_S
            for entry in list(self._entries.values()):
                volume = entry.volume
                if volume is not None:
                    with contextlib.suppress(ValueError):  # the page was closed meanwhile
                        volume.publish()
                    if volume.busy:
                        pause = BEAT_BUSY_S

    # -- cuts ----------------------------------------------------------------------------------------------

    async def cut(self, tag: str | None) -> CutTaken:
        """Take a cut; returns when its MARKs are durable, or it is known that one will not be."""
        async with self._cutting:
            assert self._numbers is not None
            served = [entry.volume for entry in self._entries.values() if entry.volume is not None]
            try:
                seq = self._numbers.next()
            except OSError as error:
                raise Conflict("no cut now", why=str(error)) from error
            absent = tuple(
                CutVolume(id_from_hex(entry.config.id), NO_INCARNATION, 0, fuzzy=True)
                for entry in self._entries.values()
                if entry.volume is None
            )
            with self._gate:  # nobody gets an LSN from here to the last MARK: this is the one look
                cut, marked = plan_cut(served, seq, self._clock.wall_ns(), tag)
                cut = Cut(cut.seq, cut.time_ns, cut.tag, cut.volumes + absent)
                payload = encode_cut(cut)
                waiting = [served[at].put_mark(payload) for at in marked]
            durable = [await future for future in waiting]
        return CutTaken(payload, bool(durable) and all(durable), len(durable))

    # -- control -------------------------------------------------------------------------------------------

    def _accept_control(self) -> None:
        assert self._control is not None
        try:
            peer, _ = self._control.accept()
        except OSError:
            return
        if len(self._controls) >= CONTROL_MAX:
            peer.close()
            return
        task = self._loop.create_task(self._serve_control(peer))
        self._controls.add(task)
        task.add_done_callback(self._controls.discard)

    async def _serve_control(self, peer: socket.socket) -> None:
        with peer:
            peer.setblocking(False)
            channel = _Channel(peer)
            with contextlib.suppress(OSError):
                while (received := await channel.receive()) is not None:
                    body, descriptor = received
                    give: list[int] = []
                    try:
                        reply = await self._answer(body, descriptor, give)
                    except FarshoreError as error:
                        reply = Refused.of(error)
                    except msgspec.MsgspecError as error:
                        reply = Refused("UsageError", "not a request", why=str(error))
                    except Exception as error:
                        self._log.error("control_request_failed", exc_info=True)
                        reply = Refused("Failed", "the tap could not do it", why=repr(error))
                    finally:
                        if descriptor is not None:
                            os.close(descriptor)
                    await channel.send(control.encode(reply), give)

    async def _answer(self, body: bytes, descriptor: int | None, give: list[int]) -> msgspec.Struct:
        request = control.request_decoder.decode(body)
        match request:
            case control.Hello():
                return Welcome(control.VERSION, os.getpid(), self._machine)
            case control.Status():
                return self.status()
            case control.Protect(name, held):
                if held and descriptor is None:
                    raise Conflict("no descriptor came with the request", where=name)
                return await self.protect(name, descriptor if held else None)
            case control.Unprotect(name):
                await self.unprotect(name)
            case control.Hold(name):
                give.append(self._served(name).disk.fd)
            case control.TakeCut(tag):
                return await self.cut(tag)
            case control.Vaulted(name, incarnation, lsn):
                await self._served(name).vaulted(incarnation, lsn)
            case control.Dirty(name):
                return DirtyMapIs(*_in_order(*await self._served(name).dirty_regions()))
            case control.DirtyClear(name, number, regions):
                return Cleared(await self._served(name).clear_dirty(number, list(regions)))
            case control.ResyncRequired(name, why, above_lsn, above_ordinal):
                await self._served(name).require_resync(why, above_lsn, above_ordinal)
            case control.ResyncDone(name):
                await self._served(name).resync_done()
            case control.Stop():
                await self.stop()
        return Done()

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise NotFound("there is no such volume", where=name)
        return entry

    def _served(self, name: str) -> Volume:
        entry = self._entry(name)
        if entry.volume is None:
            raise Conflict("the volume is not served", where=name, why=entry.problem)
        return entry.volume

    def _status(self, entry: _Entry) -> VolumeStatus:
        config, volume = entry.config, entry.volume
        opened = entry.opened
        return VolumeStatus(
            name=config.name,
            id=id_from_hex(config.id),
            uri=nbd_uri(self._directory, config),
            disk=config.disk,
            size_bytes=volume.size_bytes if volume else 0,
            mode=volume.mode if volume else "",
            failed=volume.disk_lane.failed if volume else "",
            lost=volume.ladder.lost if volume else False,
            resync=volume.resync if volume else "",
            why=volume.ladder.why if volume else entry.problem,
            incarnation=volume.incarnation if volume else NO_INCARNATION,
            lsn=volume.lsn if volume else 0,
            captured_lsn=volume.captured_lsn if volume else 0,
            durable_lsn=volume.durable_lsn if volume else 0,
            applied_lsn=volume.disk_lane.applied_lsn if volume else 0,
            stable_lsn=volume.stable_lsn if volume else 0,
            vaulted_lsn=volume.vaulted_lsn if volume else 0,
            backlog_bytes=volume.backlog_bytes if volume else 0,
            held_bytes=volume.frontend.pending.held_bytes if volume else 0,
            dirty_regions=volume.dirty_count if volume else 0,
            dirty_epoch=volume.epoch if volume else 0,
            region_bytes=volume.dirty.region_bytes if volume else 0,
            connections=len(entry.connections),
            state_page=str(entry.state_page),
            redone=opened.redone if opened and opened.continuity.redo else -1,
        )


def _in_order(name: int, bitmap: bytes, region_bytes: int) -> tuple[int, int, bytes]:
    return name, region_bytes, bitmap


class _Channel:
    """A control connection: length-prefixed messages, and descriptors beside them."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._content = bytearray()
        self._descriptors: list[int] = []

    async def receive(self) -> tuple[bytes, int | None] | None:
        """Return the next message and a descriptor that came with it, which is the caller's; None at the end.

        Raises:
            OSError: The connection is lost, or a length is beyond the bound.
        """
        head = control.LENGTH.size
        while True:
            if len(self._content) >= head:
                (length,) = control.LENGTH.unpack_from(self._content)
                if length > control.MESSAGE_BYTES_MAX:
                    raise ConnectionResetError("message too long")
                if len(self._content) >= head + length:
                    body = bytes(self._content[head : head + length])
                    del self._content[: head + length]
                    descriptor = self._descriptors.pop(0) if self._descriptors else None
                    return body, descriptor
            part, descriptors = await self._some()
            if not part:
                for descriptor in self._descriptors:
                    os.close(descriptor)
                return None
            self._content += part
            self._descriptors += descriptors

    async def _some(self) -> tuple[bytes, list[int]]:
        while True:
            try:
                part, descriptors, _, _ = socket.recv_fds(self._peer, 64 * KIB, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await _ready(self._loop.add_reader, self._loop.remove_reader, self._peer.fileno())
                continue
            return part, list(descriptors)

    async def send(self, message: bytes, descriptors: list[int]) -> None:
        while message:
            try:
                if descriptors:
                    sent = socket.send_fds(self._peer, [message], descriptors)
                    descriptors = []
                else:
                    sent = self._peer.send(message)
            except BlockingIOError:
                await _ready(self._loop.add_writer, self._loop.remove_writer, self._peer.fileno())
                continue
            message = message[sent:]


async def _ready(
    add: Callable[[int, Callable[[], None]], None], remove: Callable[[int], object], descriptor: int
) -> None:
    ready = asyncio.Event()
    add(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        remove(descriptor)
