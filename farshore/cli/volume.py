"""``farshore volume``: protect disks of this machine and look after them."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from farshore.errors import Failed, Unreachable, UsageError
from farshore.units import parse_duration

if TYPE_CHECKING:
    pass

HELP: Final = {"help_option_names": ["-h", "--help"]}
POLL_S: Final = 0.5
WAIT_STALLED_S: Final = 60.0
"""Without an agent that answers, waiting longer for a state makes no sense."""

F = TypeVar("F", bound=Callable[..., Any])


def _agent_option(function: F) -> F:
    return click.option(
        "--agent",
        "directory",
        required=True,
        type=click.Path(path_type=Path, resolve_path=True),
        metavar="DIR",
        help="The agent's directory.",
    )(function)


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_name = click.argument("name", metavar="NAME")


@click.group("volume", context_settings=HELP)
def command() -> None:
    """Protect disks of this machine and look after them."""


@command.command("protect", context_settings=HELP)
@_name
@_agent_option
@click.option(
    "--disk",
    required=True,
    type=click.Path(path_type=Path, resolve_path=True),
    metavar="PATH",
    help="Block device or image file.",
)
@click.option(
    "--capture",
    required=True,
    type=click.Choice(["tap-nbd", "scan"]),
    help="tap-nbd serves the disk over NBD and logs every write; scan reads all of it again and again.",
)
@click.option("--listen", metavar="unix:SOCK", help="The NBD socket; default DIR/run/NAME.sock.")
@click.option(
    "--attach",
    type=click.Choice(["loop", "nbd"]),
    help="Make a block device of it: /dev/loopN through qemu-storage-daemon, or the kernel's /dev/nbdN.",
)
@click.option(
    "--every",
    metavar="DURATION",
    help="With scan: from the beginning of one pass to that of the next; default 15m.",
)
@click.option(
    "--quiesced",
    is_flag=True,
    help="With scan: nobody writes to the disk during a pass (a snapshot, a disk at rest). Without this its "
    "points are fuzzy.",
)
@click.option("--wait", "wait_for", type=click.Choice(["protected"]), help="Return when it is that far.")
@_json
def protect_command(
    name: str,
    directory: Path,
    disk: Path,
    capture: str,
    listen: str | None,
    attach: str | None,
    every: str | None,
    quiesced: bool,
    wait_for: str | None,
    as_json: bool,
) -> None:
    """Protect a disk as volume NAME.

    With tap-nbd: data disks, image files and disks of virtual machines; a mounted disk is refused (6). From
    here on the workload uses the volume's URI or device, never the disk itself.

    With scan: anything that can be read, a mounted root disk too. Every pass sends what differs from the
    vault. What is written between two passes is lost with the disk, and points are fuzzy (never offered
    unless asked for) without --quiesced.
    """
    # Imported when used: --help and completion start without numpy.
    from agent.admin import NotRunning, ask
    from agent.volume_admin import FUZZY_NOTE, entries, protect_without_agent, to_config

    config = to_config(
        directory,
        name,
        disk,
        capture,
        listen_path(listen),
        attach,
        quiesced=quiesced,
        every_s=_duration(every),
    )
    running = True
    try:
        reply = ask(directory, "protect", config=config)
    except NotRunning:
        running = False
        protect_without_agent(directory, config)
        notes = [FUZZY_NOTE] if capture == "scan" and not quiesced else []
        reply = {"volumes": entries(directory, name), "notes": notes}
        _say(f"the agent does not run: start it with 'farshore agent run {directory}'")
    for note in reply["notes"]:
        _say(note)
    if wait_for:
        if not running:
            raise Unreachable("cannot wait", where=name, why="the agent does not run")
        _wait(directory, name)
        reply = ask(directory, "list", name=name)
    _print({"volumes": reply["volumes"]}, as_json)


@command.command("list", context_settings=HELP)
@_agent_option
@_json
def list_command(directory: Path, as_json: bool) -> None:
    """List the protected volumes of this machine."""
    from agent.admin import NotRunning, ask
    from agent.config import load
    from agent.volume_admin import entries

    try:
        volumes = ask(directory, "list")["volumes"]
    except NotRunning:
        load(directory)
        volumes = entries(directory)
        _say("the agent does not run: states are as of its last run")
    _print({"volumes": volumes}, as_json)


def _simple(verb: str, help: str) -> None:
    @command.command(verb, help=help, context_settings=HELP)
    @_name
    @_agent_option
    @_json
    def run(name: str, directory: Path, as_json: bool) -> None:
        from agent.admin import ask

        reply = ask(directory, verb, name=name)
        _print({"volumes": reply["volumes"]}, as_json)


_simple("resync", "Compare the whole volume with the vault again; of a volume that is scanned, now.")
_simple("pause", "Send nothing of NAME until it is resumed; its journal goes on. No pass over a disk begins.")
_simple("resume", "End a pause.")


@command.command("unprotect", context_settings=HELP)
@_name
@_agent_option
@_json
def unprotect_command(name: str, directory: Path, as_json: bool) -> None:
    """Stop protecting NAME. The disk keeps what was written; recovery points stay in the vault."""
    from agent.admin import NotRunning, ask
    from agent.volume_admin import entries, unprotect_without_agent

    try:
        reply = ask(directory, "unprotect", name=name)
    except NotRunning:
        unprotect_without_agent(directory, name)
        reply = {"volumes": entries(directory)}
    _print({"volumes": reply["volumes"]}, as_json)


def _wait(directory: Path, name: str) -> None:
    """Wait until NAME is protected, showing how far the copying is. Raises Failed, Unreachable."""
    from agent.admin import ask

    show = _bar(name) if sys.stderr.isatty() else _lines(name)
    answered = time.monotonic()
    rate = _Rate()
    try:
        while True:
            try:
                status = ask(directory, "progress", name=name)
                answered = time.monotonic()
            except Unreachable:
                if time.monotonic() - answered > WAIT_STALLED_S:
                    raise
                time.sleep(POLL_S)
                continue
            if status["state"] == "failed":
                raise Failed("the volume failed", where=name, why=status["problem"])
            done, total = int(status["done_bytes"]), int(status["total_bytes"])
            show(status, rate.of(done), rate.eta_s(done, total))
            if status["state"] == "protected":
                return
            time.sleep(POLL_S)
    finally:
        close = getattr(show, "close", None)
        if close is not None:
            close()


class _Rate:
    """Bytes per second over the last half minute."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def of(self, done: int) -> float:
        now = time.monotonic()
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()  # another pass began
        self._seen = [(at, count) for at, count in self._seen if now - at < 30] + [(now, done)]
        first_at, first = self._seen[0]
        return (done - first) / (now - first_at) if now > first_at else 0.0

    def eta_s(self, done: int, total: int) -> float | None:
        if len(self._seen) < 2:
            return None
        rate = self.of(done)
        return (total - done) / rate if rate > 0 else None


class _lines:
    """One JSON object per line on stderr."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last = ""

    def __call__(self, status: dict[str, Any], rate: float, eta_s: float | None) -> None:
        line = {
            "event": "progress",
            "volume": self._name,
            "state": status["state"],
            "done_bytes": status["done_bytes"],
            "total_bytes": status["total_bytes"],
            "bytes_per_second": round(rate),
            "eta_seconds": round(eta_s, 1) if eta_s is not None else None,
            "reason": status["reason"],
        }
        text = json.dumps(line)
        if text != self._last:
            self._last = text
            print(text, file=sys.stderr, flush=True)


class _bar:
    """A bar with rate and time left on a terminal."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._name = name
        self._task = self._progress.add_task(name, total=None)
        self._progress.start()

    def __call__(self, status: dict[str, Any], rate: float, eta_s: float | None) -> None:
        words = f"{self._name}: {status['state']}"
        if status["reason"]:
            words += f" ({status['reason']})"
        self._progress.update(
            self._task,
            description=words,
            completed=status["done_bytes"],
            total=status["total_bytes"] or None,
        )

    def close(self) -> None:
        self._progress.stop()


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    rows = [("NAME", "STATE", "CAPTURE", "DISK", "DEVICE", "URI")]
    rows += [
        (
            volume["name"],
            volume["state"],
            f"{volume['capture']} ({volume['capture_mode']})",
            volume["disk"],
            volume["device"] or "-",
            volume["uri"] or "-",
        )
        for volume in result["volumes"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def _duration(text: str | None) -> float | None:
    try:
        return parse_duration(text) if text is not None else None
    except ValueError as error:
        raise UsageError(str(error)) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def listen_path(listen: str | None) -> str:
    """Return the path of ``unix:SOCK``, absolute; empty for none. Raises UsageError."""
    if not listen:
        return ""
    kind, colon, path = listen.partition(":")
    if kind != "unix" or not colon or not path:
        raise UsageError("cannot listen there", where=listen, fix="write unix:/path/of/socket")
    return str(Path(path).absolute())
