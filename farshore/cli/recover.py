"""``farshore recover``: the volumes of a machine at a point, written to files or a device."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import click

from farshore.cli.vaultopts import open_vault_of, vault_options
from farshore.clock import SystemClock
from farshore.errors import Conflict, Failed, FarshoreError, UsageError
from farshore.units import format_size

if TYPE_CHECKING:
    from process_server.recovery.access import Access
    from process_server.recovery.points import ChainReader, Cut
    from process_server.recovery.recover import Recovered
    from process_server.recovery.target import DeviceTarget, FileTarget

PROGRESS_EVERY_S: Final = 1.0
EXIT_TERMINATED: Final = 143
"""128 + SIGTERM, as a shell reports it."""


@click.command("recover", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("machine")
@click.option("--point", required=True, metavar="P", help="latest, rp-…, a time with zone, or lsn:N.")
@click.option("--volume", metavar="NAME", help="One volume only.")
@click.option(
    "--to", "target", required=True, type=click.Path(path_type=Path), help="File, device or directory."
)
@click.option("--format", "image_format", type=click.Choice(["raw", "qcow2", "vhdx", "vmdk"]), default="raw")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--confirm", metavar="VOLUME", help="Overwrite the device with this volume.")
@click.option("--allow-fuzzy", is_flag=True, help="Take a state that the disk never had, too.")
@vault_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    machine: str,
    point: str,
    volume: str | None,
    target: Path,
    image_format: str,
    force: bool,
    confirm: str | None,
    allow_fuzzy: bool,
    vault: str | None,
    recovery_key_file: Path | None,
    server_dir: Path | None,
    as_json: bool,
) -> int:
    """Write the volumes of MACHINE at a point to a file, a device or, several of them, a directory."""
    # Imported when used: --help and completion start without numpy and zstd.
    from process_server.recovery.points import find_machine, resolve

    started = time.monotonic()
    access = open_vault_of(vault, recovery_key_file, server_dir)
    chain = find_machine(access.store, access.keys, machine)
    cut = resolve(chain, point, volume=volume, allow_fuzzy=allow_fuzzy, now_ns=SystemClock().wall_ns())
    names = [entry.name for entry in cut.point.head.volumes] if volume is None else [volume]
    if volume is not None:
        cut.point.volume(volume)
    if not names:
        raise UsageError("the machine has no volume at this point", where=cut.label)
    targets = _targets(names, target, image_format, force=force, confirm=confirm)
    done: list[Recovered] = []
    failed: dict[str, FarshoreError] = {}
    with _terminated():
        for name, place in targets.items():
            try:
                done.append(_one(access, chain, cut, name, place, image_format))
            except FarshoreError as error:
                if len(names) == 1:
                    raise
                failed[name] = error
                print(f"error: volume {name}: {error}", file=sys.stderr, flush=True)
    result: dict[str, object] = {
        "point": cut.label,
        "volumes": [
            {"name": each.name, "lsn": each.lsn, "bytes": each.bytes, "blake3": each.blake3} for each in done
        ],
        "seconds": round(time.monotonic() - started, 3),
    }
    if failed:
        result["failed"] = {name: error.as_dict() for name, error in failed.items()}
    if as_json:
        print(json.dumps(result))
    else:
        for each in done:
            print(f"{each.name}  lsn {each.lsn}  {format_size(each.bytes)}  blake3 {each.blake3}")
    if failed and not as_json:
        raise Failed("not all volumes were recovered", where=", ".join(failed), why="see above")
    return 1 if failed else 0


def _targets(
    names: list[str], target: Path, image_format: str, *, force: bool, confirm: str | None
) -> "dict[str, FileTarget | DeviceTarget]":
    """Return each volume's target; what can be refused is refused before anything is read."""
    from process_server.recovery.target import open_target

    if len(names) == 1 and not target.is_dir():
        opened = open_target(target, volume=names[0], force=force, confirm=confirm)
        if opened.device and image_format != "raw":
            opened.discard()
            raise UsageError("a device takes only raw", where=image_format)
        return {names[0]: opened}
    if target.exists() and not target.is_dir():
        raise Conflict(
            "several volumes need a directory",
            where=str(target),
            why=f"there are {', '.join(names)}",
            fix="name a directory, or one of them with --volume",
        )
    try:
        target.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise Failed("cannot make the directory", where=str(target), why=exc.strerror or str(exc)) from exc
    return {
        name: open_target(target / f"{name}.{image_format}", volume=name, force=force, confirm=confirm)
        for name in names
    }


def _one(
    access: "Access",
    chain: "ChainReader",
    cut: "Cut",
    name: str,
    target: "FileTarget | DeviceTarget",
    image_format: str,
) -> "Recovered":
    from process_server.recovery.image import VolumeImage
    from process_server.recovery.recover import recover_volume

    try:
        image = VolumeImage(chain, cut, name)
    except BaseException:
        target.discard()
        raise
    with _progress(name) as tell:
        return recover_volume(access.url, chain, image, target, format=image_format, progress=tell)


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Leave by an exception on SIGTERM too, so that what was half written is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far it is, on stderr: a bar on a terminal, else a line of JSON a second."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)
        return
    started = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PROGRESS_EVERY_S:
            return
        last = now
        rate = done / (now - started)
        left = (total - done) / rate if rate and total >= done else None
        status = {
            "message_type": "status",
            "volume": name,
            "bytes_done": done,
            "bytes_total": total,
            "bytes_per_second": round(rate),
            "seconds_left": round(left, 1) if left is not None else None,
        }
        print(json.dumps(status), file=sys.stderr, flush=True)

    yield line
    elapsed = time.monotonic() - started
    if elapsed >= PROGRESS_EVERY_S:
        print(
            json.dumps({"message_type": "summary", "volume": name, "seconds": round(elapsed, 3)}),
            file=sys.stderr,
            flush=True,
        )
