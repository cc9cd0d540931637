"""``farshore server run``: puts the process server together, and keeps it until somebody says stop."""

import asyncio
import contextlib
import json
import signal
import socket
import ssl
from datetime import UTC
from pathlib import Path
from typing import Final

import msgspec
import uvloop
from prometheus_client import Gauge

from farshore import client, pki, systemd
from farshore.clock import Clock, SystemClock
from farshore.config import load_config
from farshore.errors import ConfigError, Conflict, FarshoreError, NotFound, Unreachable
from farshore.ids import id_to_hex
from farshore.telemetry import MetricsServer, configure, get_logger, make_registry, serve_metrics
from process_server.catalog import CatalogKeeper, open_catalog
from process_server.config import (
    METRICS_PORT,
    Layout,
    ServerConfig,
    format_address,
    load,
    parse_listen,
    read_slot_key,
)
from process_server.control.api import ApiServer, make_app
from process_server.control.setup import client_url, write_client
from process_server.identity import Identity
from process_server.recovery.points import find_machine, list_points
from process_server.service import ProcessServer
from process_server.vault.control import ControlStore
from process_server.vault.keys import VaultKeys, open_vault
from process_server.vault.store import Store, open_store
from process_server.vault.store.metered import Meter
from process_server.vault.store.probe import probe

CERTIFICATE_CHECK_S: Final = 600.0
BACKLOG: Final = 64
EXIT_INTERRUPTED: Final = 130

log = get_logger()


def run(directory: Path) -> int:
    """Serve in the foreground until SIGTERM (returns 0) or SIGINT (returns 130).

    Raises:
        ConfigError: The settings, the slot key or an address cannot be used.
        Conflict: Another server has the vault, or the address holds another vault.
        NotFound: There is no vault.
        WrongKey, IntegrityError: The key is another vault's; the vault is damaged or of a newer version.
    """
    configure("server")
    config = load(directory)
    slot = read_slot_key(directory, config)
    meter = Meter()
    with contextlib.closing(open_store(config.vault, owner=True, meter=meter)) as store:
        keys = open_vault(store, slot)
        if keys.vault_id != config.vault_bytes:
            raise Conflict(
                "this is another vault",
                where=config.vault,
                why=f"it is {id_to_hex(keys.vault_id)}, server.toml says {config.vault_id}",
            )
        probe(store)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(directory, config, store, keys, SystemClock(), meter))


async def serve(
    directory: Path, config: ServerConfig, store: Store, keys: VaultKeys, clock: Clock, meter: Meter
) -> int:
    """Run everything that belongs to one process server; returns the exit code. Raises as `run`."""
    stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    _stop_on_signals(stopped)
    registry = make_registry("server")
    control = ControlStore(store, keys)
    address: list[str] = []
    identity = Identity(
        control, keys.vault_id, clock, registry, addresses=lambda: config.addresses or tuple(address)
    )
    await identity.renew_server()
    opened = await asyncio.to_thread(open_catalog, Layout(directory).catalog)
    catalog = CatalogKeeper(opened) if opened is not None else None
    server = ProcessServer(
        *(config, store, keys, control, clock, registry),
        identity=identity,
        catalog=catalog,
        meter=meter,
    )
    identity.on_deny(server.deny)
    services = _Services(server, identity, store, keys, catalog)
    expiry = Gauge(
        "farshore_certificate_expiry_timestamp_seconds",
        "Until when a certificate is valid.",
        ["subject"],
        registry=registry,
    )
    expiry.labels("server").set_function(lambda: identity.server_expires.timestamp())
    with contextlib.ExitStack() as cleanup:
        if catalog is not None:
            cleanup.callback(catalog.close)
        listener = _listen(config.api, "the API")
        cleanup.callback(listener.close)
        context = _api_context(identity)
        api = ApiServer(make_app(services, config.api_token_sha256, registry), listener, context)
        host, port = parse_listen(config.metrics)
        metrics = serve_metrics(host, port, registry, services.health, may_move=port == METRICS_PORT)
        cleanup.callback(metrics.close)
        async with asyncio.TaskGroup() as group:

            async def announce() -> None:
                await server.ready.wait()
                listening = format_address(*server.address[:2])
                if parse_listen(config.listen)[0] not in ("0.0.0.0", "::"):
                    address.append(listening)
                _announce(directory, listening, _bound(listener), metrics)

            tasks = [
                group.create_task(_serve_agents(server, config.listen), name="process-server"),
                group.create_task(identity.run(), name="identity"),
                group.create_task(api.run(), name="api"),
                group.create_task(_keep_certificate(identity, server, context), name="certificate"),
                group.create_task(_feed_watchdog(), name="watchdog"),
                group.create_task(announce(), name="announce"),
            ]
            code = await stopped
            systemd.stopping("stopping: what is under way is finished")
            log.info("server_stopping")
            api.stop()
            for task in tasks:
                task.cancel()
    log.info("server_stopped")
    return code


class _Services:
    """What the API shows, from the services that know it."""

    def __init__(
        self,
        server: ProcessServer,
        identity: Identity,
        store: Store,
        keys: VaultKeys,
        catalog: CatalogKeeper | None,
    ) -> None:
        self._server, self._identity, self._store, self._keys = server, identity, store, keys
        self._catalog = catalog

    def ready(self) -> bool:
        return self._server.ready.is_set()

    def health(self) -> tuple[bool, dict[str, object]]:
        """Answer ``/healthz``. Called in a thread of the metrics server."""
        return self.ready(), {"ready": self.ready()}

    def status(self) -> dict[str, object]:
        shown = self._server.status()
        machines = shown["machines"]
        assert isinstance(machines, list)
        seen = {machine["name"] for machine in machines}
        waiting = [
            {
                "name": entry["name"],
                "state": entry["state"],
                "health": "warning",
                "reasons": ["enrolled, and its agent has not connected yet"],
                "rpo_seconds": None,
                "volumes": [],
            }
            for entry in self._identity.machines()
            if entry["name"] not in seen and entry["state"] == "enrolled"
        ]
        return {**shown, "machines": [*machines, *waiting]}

    def machines(self) -> list[dict[str, object]]:
        return self._identity.machines()

    async def create_token(self, machine: str, ttl_s: float) -> tuple[str, str]:
        token, expires = await self._identity.create_token(machine, ttl_s)
        return token, expires.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

    async def revoke(self, machine: str) -> None:
        await self._identity.revoke(machine, "by an operator")

    async def points(self, machine: str) -> list[dict[str, object]]:
        def read() -> list[dict[str, object]]:
            chain = find_machine(self._store, self._keys, machine)
            # The vault says how far the chain goes; the catalog only spares us to read all of it.
            known = self._catalog.points(chain.machine, chain.newest()) if self._catalog is not None else None
            if known is not None:
                return [row.as_dict() for row in known]
            return [point.as_dict() for point in list_points(chain)]

        return await asyncio.to_thread(read)

    async def create_point(self, machine: str, tag: str, timeout_s: float, *, allow_fuzzy: bool) -> str:
        try:
            return await self._server.create_point(machine, tag, timeout_s, allow_fuzzy=allow_fuzzy)
        except NotFound:
            if any(entry["name"] == machine for entry in self._identity.machines()):
                raise Unreachable("the agent has not connected yet", where=machine) from None
            raise


async def _serve_agents(server: ProcessServer, listen: str) -> None:
    try:
        await server.run()
    except OSError as error:
        if server.ready.is_set():
            raise
        raise _cannot_listen("agents", listen, error) from error


async def _keep_certificate(identity: Identity, server: ProcessServer, context: ssl.SSLContext) -> None:
    """Renew the server's certificate when it is due; connections that are open keep the one they have."""
    is_new = False
    while True:
        await asyncio.sleep(CERTIFICATE_CHECK_S)
        try:
            is_new = await identity.renew_server() or is_new
            if is_new:
                pki.use_certificate(context, identity.server.certificate, identity.server.key)
                await server.renew_tls()
                is_new = False
        except FarshoreError as error:
            # Of the store, mostly: what is left to do is done at the next look, long before the old one ends.
            log.warning("server_certificate_renewal_failed", error=str(error))


async def _feed_watchdog() -> None:
    """Tell systemd that the loop turns; a loop that is stuck is restarted."""
    interval = systemd.watchdog_s()
    while interval is not None:
        systemd.alive()
        await asyncio.sleep(interval / 3)


def _announce(directory: Path, listening: str, api: str, metrics: MetricsServer) -> None:
    """Say on stdout, and to systemd, that agents and operators can come."""
    _point_client_at(directory, api)
    ready = {
        "event": "ready",
        "listen": listening,
        "api": api,
        "metrics": format_address(metrics.host, metrics.port),
    }
    print(json.dumps(ready), flush=True)  # noqa: T201 the ready line is the product
    systemd.ready(f"agents on {listening}, API on {api}")
    log.info("server_ready", **{key: value for key, value in ready.items() if key != "event"})


def _point_client_at(directory: Path, api: str) -> None:
    """With port 0 the API's port is another one at each start; DIR/client.toml follows it."""
    path = Layout(directory).client
    with contextlib.suppress(FarshoreError):  # a convenience of this host; the API works without
        known = load_config(path, client.ClientConfig)
        if known.api != client_url(api) and parse_listen(load(directory).api)[1] == 0:
            write_client(path, msgspec.structs.replace(known, api=client_url(api)))


def _api_context(identity: Identity) -> ssl.SSLContext:
    shown = identity.server
    return pki.server_context(
        shown.certificate,
        shown.key,
        identity.authority.certificate,
        alpn=pki.ALPN_HTTP,
        client_certificates=False,
    )


def _listen(address: str, what: str) -> socket.socket:
    host, port = parse_listen(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise _cannot_listen(what, address, error) from error


def _cannot_listen(what: str, address: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen for {what}",
        where=address,
        why=error.strerror or str(error),
        fix="choose another address in server.toml, or end what uses it",
    )


def _bound(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return format_address(host, port)


def _stop_on_signals(stopped: asyncio.Future[int]) -> None:
    def stop(code: int) -> None:
        if not stopped.done():
            stopped.set_result(code)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop, 0)
    loop.add_signal_handler(signal.SIGINT, stop, EXIT_INTERRUPTED)
