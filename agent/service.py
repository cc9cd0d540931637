"""The agent of one machine: its volumes, its tap, its replication, and what it tells about them."""

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Gauge

from agent import volumes
from agent.admin import AdminServer
from agent.capture import attach
from agent.capture.control import TapClient
from agent.capture.engines import Engines
from agent.config import AgentConfig, Layout
from agent.identity import Renewal
from agent.metrics import Metrics
from agent.replicate.ports import DirtyRegions
from agent.replicate.replica import Replica
from agent.replicate.replicator import Replicator
from agent.supervise import TapKeeper
from agent.volume_admin import (
    FUZZY_NOTE,
    entry,
    known_replica,
    other_volumes,
    replica_of,
    spec_of,
    unknown_mode,
)
from agent.volumes import VolumeConfig
from farshore.clock import Clock
from farshore.errors import Conflict, FarshoreError, NotFound, Unreachable, UsageError
from farshore.failpoints import failpoint
from farshore.hrl.cut import Cut
from farshore.telemetry import get_logger

READY_S: Final = 60.0
"""How long the ready line waits for the volumes; one that cannot be served is reported, not waited for."""
LOOK_S: Final = 2.0
"""How often a volume that could not be served is tried again."""

Answer = TypeVar("Answer")
log = get_logger()


@dataclass(slots=True)
class Protected:
    """One volume of the configuration.

    Attributes:
        held: Descriptor of its open disk, with the lock: it outlives a tap that is killed.
        problem: Why it is not served, attached or read; empty when all is well.
    """

    config: VolumeConfig
    replica: Replica | None = None
    held: int | None = None
    device: str | None = None
    problem: str = ""

    @property
    def served(self) -> bool:
        """It is replicated, and its tap, if it has one, serves it."""
        return self.replica is not None and self.replica.served

    @property
    def coming(self) -> bool:
        """Nobody has said yet whether it can be served."""
        return not self.served and not self.problem

    def release(self) -> None:
        if self.held is not None:
            os.close(self.held)
            self.held = None


class TapPort:
    """`agent.replicate.ports.Tap` over the control connection of whatever tap there is."""

    def __init__(self, keeper: TapKeeper, name_of: Callable[[bytes], str]) -> None:
        self._keeper, self._name_of = keeper, name_of

    async def cut(self, tag: str | None) -> Cut:
        taken = await self._call(lambda client: client.cut(tag))
        if taken.marks and not taken.marked:
            raise Unreachable("the cut is not durable in every journal")
        return taken.decoded()

    async def vaulted(self, volume: bytes, incarnation: bytes, lsn: int) -> None:
        name = self._name_of(volume)
        await self._call(lambda client: client.vaulted(name, incarnation, lsn))

    async def dirty(self, volume: bytes) -> DirtyRegions:
        name = self._name_of(volume)
        found = await self._call(lambda client: client.dirty(name))
        return DirtyRegions(found.round, found.region_bytes, tuple(found.regions()))

    async def dirty_clear(self, volume: bytes, round: int, regions: tuple[int, ...]) -> None:
        name = self._name_of(volume)
        await self._call(lambda client: client.dirty_clear(name, round, regions))

    async def resync_required(self, volume: bytes, above_lsn: int, above_ordinal: int) -> None:
        name, why = self._name_of(volume), "the vault holds other records than this journal"
        await self._call(lambda client: client.resync_required(name, why, above_lsn, above_ordinal))

    async def resync_done(self, volume: bytes) -> None:
        name = self._name_of(volume)
        await self._call(lambda client: client.resync_done(name))

    async def _call(self, ask: Callable[[TapClient], Awaitable[Answer]]) -> Answer:
        try:
            return await ask(self._keeper.client)
        except Unreachable:
            self._keeper.broken()
            raise


class Service:
    """Everything of one agent process. `run` returns when it was told to stop."""

    def __init__(
        self, directory: Path, config: AgentConfig, clock: Clock, registry: CollectorRegistry
    ) -> None:
        self._directory, self._config, self._clock = directory, config, clock
        self._volumes: dict[str, Protected] = {}
        self._changing = asyncio.Lock()
        self._metrics = Metrics(registry, self._replicas)
        self._keeper = TapKeeper(directory, self._tap_is_up, self._metrics.tap_restarted)
        tap = TapPort(self._keeper, self._name_of)
        engines = Engines(tap, self._replicas, clock)
        self._replicator = Replicator(
            directory, config, engines, self._metrics, random.Random(), protected=self._ids
        )
        self._renewal = Renewal(directory, config, clock, renewed=self._replicator.renew)
        expiry = Gauge(
            "farshore_certificate_expiry_timestamp_seconds",
            "When this machine's certificate ends.",
            ["subject"],
            registry=registry,
        )
        expiry.labels("agent").set_function(lambda: self._renewal.expires.timestamp())
        self._late_s = clock.monotonic() + READY_S
        self._admin = AdminServer(Layout(directory).agent_socket, self._handle)

    async def run(self, stopping: asyncio.Event, ready: Callable[[], None]) -> None:
        """Serve until ``stopping``; then stop in order: the link, the tap if it is ours.

        Raises:
            ConfigError: The settings of a volume make no sense.
        """
        for config in other_volumes(self._directory):
            self._volumes[config.name] = Protected(config)
        await self._expect_known()
        if self._tapped():
            self._keeper.want()
        await self._serve_scans()
        await self._admin.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._keeper.run(), name="tap"),
                    tasks.create_task(self._look_after(), name="volumes"),
                    tasks.create_task(self._replicate(stopping), name="replicator"),
                    tasks.create_task(self._renewal.run(), name="renewal"),
                ]
                await self._until_served(stopping)
                ready()
                log.info("agent_ready", machine=self._config.machine, volumes=len(self._volumes))
                await stopping.wait()
                log.info("agent_stopping")
                for task in running:
                    task.cancel()
        finally:
            await self._admin.close()
            await self._end()

    async def _end(self) -> None:
        if not self._keeper.unit:
            for volume in self._volumes.values():
                await self._detach(volume)
            await self._keeper.stop()
        for volume in self._volumes.values():
            volume.release()
            if volume.replica is not None and volume.replica.scanned:
                volume.replica.close()

    async def _replicate(self, stopping: asyncio.Event) -> None:
        if any(volume.config.scanned for volume in self._volumes.values()):
            # These come last, see `_serve_scans`; a session that began before would make points without them.
            await self._until_served(stopping)
        await self._replicator.run()

    async def _until_served(self, stopping: asyncio.Event) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and not stopping.is_set():
            if all(
                volume.problem or (volume.served and (volume.device or not volume.config.attach))
                for volume in self._volumes.values()
            ):
                return
            await asyncio.sleep(0.02)

    def healthz(self) -> tuple[bool, dict[str, object]]:
        """For ``/healthz``, in a thread: healthy is connected, every volume protected or on its way."""
        volumes = list(self._volumes.values())
        states = {volume.config.name: self._state(volume) for volume in volumes}
        coming = {volume.config.name for volume in volumes if volume.coming}
        bad = {name for name, state in states.items() if state in ("failed", "resync-required", "degraded")}
        healthy = self._replicator.connected and not bad - coming
        return healthy, {
            "connected": self._replicator.connected,
            "reason": self._replicator.reason,
            "volumes": states,
            "certificate_expires": self._renewal.expires.isoformat(),
            "certificate_problem": self._renewal.error,
        }

    def _replicas(self) -> list[Replica]:
        return [volume.replica for volume in list(self._volumes.values()) if volume.replica is not None]

    def _ids(self) -> list[bytes]:
        return [volume.config.id_bytes for volume in self._volumes.values()]

    def _name_of(self, id: bytes) -> str:
        for volume in self._volumes.values():
            if volume.config.id_bytes == id:
                return volume.config.name
        raise NotFound("no such volume", where=id.hex())

    # --- the tap and its volumes ---

    def _tapped(self) -> list[Protected]:
        return [volume for volume in self._volumes.values() if not volume.config.scanned]

    def _coming(self) -> bool:
        """A volume of the tap is still being opened; one that does not come is not waited for for ever."""
        late = self._clock.monotonic() > self._late_s
        return not late and any(volume.coming for volume in self._tapped())

    async def _expect_known(self) -> None:
        """Introduce what was replicated before: it is in every cut, whether or not it can be served now."""
        until_s = time.monotonic() + READY_S
        for volume in self._tapped():
            volume.replica = await asyncio.to_thread(known_replica, self._directory, volume.config)
            if volume.replica is not None:
                volume.replica.expect(until_s)
                await self._replicator.add(volume.replica)

    async def _tap_is_up(self) -> None:
        """Have every volume served by the tap that just answered, and hold its disk with it."""
        async with self._changing:
            for volume in self._tapped():
                if volume.coming and volume.replica is not None:
                    # However long the tap took: one after another they are all there in a moment.
                    volume.replica.expect(time.monotonic() + READY_S)
            for volume in self._tapped():
                await self._serve(volume)
        await self._serve_scans()

    async def _serve_scans(self) -> None:
        """Take on the disks that are scanned, once the tap's are there: no point is to lack those."""
        if self._coming():
            return
        async with self._changing:
            for volume in list(self._volumes.values()):
                if volume.config.scanned and volume.replica is None:
                    await self._serve(volume)

    async def _look_after(self) -> None:
        """Try again what could not be served, attached or read."""
        while True:
            await asyncio.sleep(LOOK_S)
            async with self._changing:
                for volume in self._tapped():
                    if volume.problem or not volume.served:
                        with contextlib.suppress(Unreachable):
                            _ = self._keeper.client
                            await self._serve(volume)
            await self._serve_scans()

    async def _serve(self, volume: Protected) -> None:
        """Bring one volume to where it is served, held, attached and replicated; note why not."""
        config = volume.config
        try:
            if not config.scanned:
                await self._serve_by_tap(volume)
            await self._take_on(volume)
            if config.attach:
                volume.device = await asyncio.to_thread(
                    attach.attach,
                    self._directory,
                    config.name,
                    config.attach,
                    volumes.socket_path(self._directory, config),
                )
        except (FarshoreError, OSError) as error:
            if str(error) != volume.problem:
                log.error("volume_not_served", volume=config.name, error=str(error))
            volume.problem = str(error)
        else:
            if volume.problem:
                log.info("volume_served_again", volume=config.name)
            volume.problem = ""

    async def _take_on(self, volume: Protected) -> None:
        """Replicate a volume that is served, from now on or again."""
        config, replica = volume.config, volume.replica
        if replica is None:
            replica = await asyncio.to_thread(replica_of, self._directory, config, self._clock)
            if not config.scanned:
                replica.state()
            volume.replica = replica
            await self._replicator.add(replica)
        elif not replica.served:
            spec = await asyncio.to_thread(spec_of, self._directory, config)
            if spec != replica.spec:
                # Before its first record: the places in the stream are those of a volume of the new size.
                replica.spec = spec
                await self._replicator.add(replica)
            replica.found()

    async def _serve_by_tap(self, volume: Protected) -> None:
        name = volume.config.name
        try:
            async with self._keeper.connect() as client:
                if volume.held is not None:
                    await client.protect(name, held=volume.held)
                else:
                    await client.protect(name)
                failpoint("agent.after_protect")
                if volume.held is None:
                    volume.held = await client.hold(name)
        except Unreachable:
            raise  # there is no tap, which says nothing of the volume
        except FarshoreError as error:
            if volume.replica is not None and volume.replica.lost(str(error)):
                await self._replicator.add(volume.replica)
            raise

    async def _detach(self, volume: Protected) -> None:
        """Take a device away that nobody uses; one that is in use waits for the next tap."""
        if not volume.config.attach:
            return
        try:
            await asyncio.to_thread(attach.detach, self._directory, volume.config.name)
        except FarshoreError as error:
            log.warning("device_left", volume=volume.config.name, error=str(error))

    # --- the volume verbs ---

    async def _handle(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        name = str(arguments.get("name", ""))
        match verb:
            case "list":
                return {"volumes": self._entries(name or None)}
            case "progress":
                return self._progress(name)
            case "status":
                return self._status()
            case "protect":
                return await self._protect(arguments.get("config"))
            case "unprotect":
                await self._unprotect(self._named(name))
                return {"volumes": self._entries()}
            case "pause":
                self._replica(name).paused = True
            case "resume":
                self._replica(name).paused = False
            case "resync":
                self._replica(name)
                await self._replicator.resync(name)
            case _:
                raise UsageError("the agent does not know this verb", where=verb)
        return {"volumes": self._entries(name)}

    def _named(self, name: str) -> Protected:
        volume = self._volumes.get(name)
        if volume is None:
            raise NotFound("there is no such volume", where=name, fix="farshore volume list shows them")
        return volume

    def _replica(self, name: str) -> Replica:
        volume = self._named(name)
        if volume.replica is None:
            raise Conflict("the volume is not served", where=name, why=volume.problem)
        return volume.replica

    def _state(self, volume: Protected) -> str:
        if volume.replica is None:
            return "failed" if volume.problem else "initial-replication"
        return volume.replica.name_state()

    def _entries(self, name: str | None = None) -> list[dict[str, Any]]:
        found = []
        for _, volume in sorted(self._volumes.items()):
            if name is None or volume.config.name == name:
                config, replica = volume.config, volume.replica
                mode = replica.capture_mode() if replica is not None else unknown_mode(config)
                found.append(entry(self._directory, config, self._state(volume), mode, volume.device))
        if name is not None and not found:
            self._named(name)
        return found

    def _progress(self, name: str) -> dict[str, Any]:
        volume = self._named(name)
        replica = volume.replica
        total = replica.spec.size_bytes if replica is not None else 0
        done = total - replica.unsynced_bytes() if replica is not None else 0
        return {
            "state": self._state(volume),
            "done_bytes": done,
            "total_bytes": total,
            "problem": volume.problem or (replica.problem if replica is not None else ""),
            "reason": self._replicator.reason or volume.problem,
        }

    def _status(self) -> dict[str, Any]:
        connected_at = self._replicator.connected_at
        since = datetime.fromtimestamp(connected_at).astimezone().isoformat() if connected_at else None
        return {
            "machine": self._config.machine,
            "connected": self._replicator.connected,
            "since": since,
            "reason": self._replicator.reason,
            "tap_pid": self._keeper.pid,
            "copier_pids": self._replicator.copier_pids,
            "volumes": self._entries(),
        }

    async def _protect(self, values: object) -> dict[str, Any]:
        config = msgspec.convert(values, VolumeConfig)
        async with self._changing:
            if config.name in self._volumes:
                raise Conflict("there is a volume of this name", where=config.name)
            others = [volume.config for volume in self._volumes.values()]
            await asyncio.to_thread(volumes.check_protect, self._directory, config, others)
            await asyncio.to_thread(volumes.save_volume, self._directory, config)
            failpoint("agent.after_volume_saved")
            await self._replicator.expect_copying()
            volume = self._volumes[config.name] = Protected(config)
        try:
            if not config.scanned:
                # An up-coming tap serves it by itself, together with the others.
                await self._keeper.wait_serving(READY_S)
            async with self._changing:
                if volume.replica is None or (config.attach and volume.device is None):
                    await self._serve(volume)
        except Unreachable as error:
            volume.problem = str(error)
        if volume.problem:
            problem = volume.problem
            await self._unprotect(volume)
            raise Conflict("cannot protect the volume", where=config.name, why=problem)
        log.info("volume_added", volume=config.name, disk=config.disk)
        notes = []
        if volume.device is not None:
            notes.append(await asyncio.to_thread(_fstab, volume.device))
        if config.scanned and not config.quiesced:
            notes.append(FUZZY_NOTE)
        return {"volumes": self._entries(config.name), "notes": notes}

    async def _unprotect(self, volume: Protected) -> None:
        name = volume.config.name
        async with self._changing:
            if volume.config.attach:
                await asyncio.to_thread(attach.detach, self._directory, name)
            await self._replicator.remove(volume.config.id_bytes)
            volume.replica = None
            if not volume.config.scanned:
                with contextlib.suppress(Unreachable, NotFound):
                    async with self._keeper.connect() as client:
                        await client.unprotect(name)
            volume.release()
            self._volumes.pop(name, None)
            await asyncio.to_thread(volumes.remove_volume, self._directory, name)
        log.info("volume_removed", volume=name)


def _fstab(device: str) -> str:
    """The line for /etc/fstab: mounted after the tap, unmounted before it, and never in the way of a boot."""
    source = device
    blkid = shutil.which("blkid", path=os.defpath + ":/usr/sbin:/sbin")
    kind = "ext4"
    if blkid is not None:
        done = subprocess.run(
            [blkid, "-o", "export", device], capture_output=True, text=True, check=False, timeout=20
        )
        found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        source = f"UUID={found['UUID']}" if "UUID" in found else device
        kind = found.get("TYPE", kind)
    options = "defaults,nofail,x-systemd.requires=farshore-tap.service,x-systemd.after=farshore-tap.service"
    return f"for /etc/fstab: {source} /MOUNTPOINT {kind} {options} 0 2"
