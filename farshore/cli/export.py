"""``farshore export``: a volume at a point, served over NBD until told to stop."""

import asyncio
import contextlib
import json
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from farshore.cli.vaultopts import open_vault_of, vault_options
from farshore.clock import SystemClock
from farshore.errors import UsageError

if TYPE_CHECKING:
    from process_server.recovery.export import Address, VolumeExport
    from process_server.recovery.image import VolumeImage
    from process_server.recovery.overlay import OverlayFile

EXIT_INTERRUPTED = 130


@click.command("export", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("machine")
@click.option("--volume", required=True, metavar="NAME", help="Which volume.")
@click.option("--point", required=True, metavar="P", help="latest, rp-…, a time with zone, or lsn:N.")
@click.option("--nbd", required=True, metavar="ADDRESS", help="unix:SOCKET or 127.0.0.1:PORT.")
@click.option("--overlay", metavar="FILE|tmp", help="Make it writable; what is written goes to FILE.")
@click.option("--hydrate", is_flag=True, help="Copy all of the volume into the overlay meanwhile.")
@click.option("--allow-fuzzy", is_flag=True, help="Take a state that the disk never had, too.")
@vault_options
@click.option("--json", "as_json", is_flag=True, help="Print errors as JSON; the ready line always is.")
def command(
    machine: str,
    volume: str,
    point: str,
    nbd: str,
    overlay: str | None,
    hydrate: bool,
    allow_fuzzy: bool,
    vault: str | None,
    recovery_key_file: Path | None,
    server_dir: Path | None,
    as_json: bool,
) -> int:
    """Serve a volume of MACHINE over NBD, in the foreground; read-only without --overlay."""
    # Imported when used: --help and completion start without numpy and zstd.
    from process_server.recovery.export import VolumeExport, parse_address
    from process_server.recovery.image import VolumeImage
    from process_server.recovery.points import find_machine, resolve

    address = parse_address(nbd)
    if hydrate and overlay is None:
        raise UsageError("--hydrate needs --overlay", why="there is nowhere to copy to")
    access = open_vault_of(vault, recovery_key_file, server_dir)
    chain = find_machine(access.store, access.keys, machine)
    cut = resolve(chain, point, volume=volume, allow_fuzzy=allow_fuzzy, now_ns=SystemClock().wall_ns())
    image = VolumeImage(chain, cut, volume)
    export = VolumeExport(image, _overlay(overlay, image, chain.machine))
    try:
        return asyncio.run(_serve(export, volume, address, hydrate=hydrate))
    finally:
        export.close()


def _overlay(overlay: str | None, image: "VolumeImage", machine: bytes) -> "OverlayFile | None":
    if overlay is None:
        return None
    from process_server.recovery.overlay import OverlayFile

    if overlay != "tmp":
        return OverlayFile(Path(overlay), image, machine=machine, keep=True)
    with tempfile.TemporaryDirectory(prefix="farshore-overlay-") as folder:
        # Its name goes as soon as it is open: nothing is left of it, however this ends.
        return OverlayFile(Path(folder) / "overlay", image, machine=machine, keep=False)


async def _serve(export: "VolumeExport", name: str, address: "Address", *, hydrate: bool) -> int:
    from farshore.nbd.server import NbdServer

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    codes: list[int] = []

    def stopped(code: int) -> None:
        codes.append(code)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stopped, 0)
    loop.add_signal_handler(signal.SIGINT, stopped, EXIT_INTERRUPTED)
    server = NbdServer({name: export})
    async with contextlib.AsyncExitStack() as stack:
        if address.socket is not None:
            await stack.enter_async_context(server.listen_unix(address.socket))
        else:
            host, port = await stack.enter_async_context(server.listen_tcp(address.host, address.port))
            address = address._replace(host=host, port=port)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        hydrating = tasks.create_task(export.hydrate(), name="hydrate") if hydrate else None
        print(json.dumps({"event": "ready", "uri": address.uri(name)}), flush=True)
        await stop.wait()
        if hydrating is not None:
            hydrating.cancel()
    return codes[0]
