"""``farshore vault``: what a vault holds, and whether all of it is sound."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import click
import msgspec

from farshore.cli import vault_key
from farshore.cli.vaultopts import open_vault_of, vault_options
from farshore.clock import format_time
from farshore.errors import ConfigError, IntegrityError, NotFound, UsageError
from farshore.units import format_size

if TYPE_CHECKING:
    from process_server.recovery.access import Access
    from process_server.recovery.check import Findings
    from process_server.recovery.check_chain import Receipt

PROGRESS_EVERY_S: Final = 1.0


class Head(msgspec.Struct, frozen=True):
    """The end of a machine's chain, as ``vault info`` prints it and ``vault check --receipt`` takes it."""

    machine: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    seq: Annotated[int, msgspec.Meta(ge=1)]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class InfoFile(msgspec.Struct, frozen=True):
    """What of ``vault info --json`` is a receipt."""

    vault: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    heads: list[Head]


@click.group("vault", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """A vault, with a server or without."""


command.add_command(vault_key.command)


@command.command("info")
@vault_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_command(
    vault: str | None, recovery_key_file: Path | None, server_dir: Path | None, as_json: bool
) -> None:
    """Show whose chains are in a vault and where they end.

    The output of --json is a receipt, too: kept elsewhere, it lets `vault check --receipt` find out that a
    vault was rolled back.
    """
    access = open_vault_of(vault, recovery_key_file, server_dir)
    machines, heads = _ends(access)
    if as_json:
        shown = {
            "vault": access.keys.vault_id.hex(),
            "key_generation": access.keys.generation,
            "machines": machines,
            "heads": heads,
        }
        print(json.dumps(shown))
        return
    print(f"vault {access.keys.vault_id.hex()}, key generation {access.keys.generation}")
    for entry in machines:
        print(
            f"{entry['name']}  {entry['machine']}  commit {entry['seq']}  {entry['time']}"
            f"  {format_size(entry['size_bytes'])} in {entry['volumes']} volumes"
        )


def _ends(access: "Access") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What people want to know of each machine, and the end of its chain."""
    # Imported when used: --help and completion start without numpy and zstd.
    from process_server.recovery.points import machines_in
    from process_server.vault.chain import Chain

    machines, heads = [], []
    for id in machines_in(access.store, access.keys):
        commit = Chain(access.store, access.keys, id).load_head()
        if commit is None:
            continue
        head = commit.head
        machines.append(
            {
                "machine": id.hex(),
                "name": head.machine_name,
                "seq": head.seq,
                "time": format_time(head.time_ns),
                "volumes": len(head.volumes),
                "size_bytes": sum(volume.size_bytes for volume in head.volumes),
            }
        )
        heads.append({"machine": id.hex(), "seq": head.seq, "digest": commit.digest.hex()})
    return machines, heads


@command.command("check")
@click.option("--read-data", is_flag=True, help="Read every byte of the packs, too, and remake the maps.")
@click.option("--subset", metavar="5%", help="With --read-data: of so many packs, chosen at random.")
@click.option(
    "--receipt",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `vault info --json` printed earlier: the chains must still hold that.",
)
@vault_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check_command(
    read_data: bool,
    subset: str | None,
    receipt: Path | None,
    vault: str | None,
    recovery_key_file: Path | None,
    server_dir: Path | None,
    as_json: bool,
) -> int:
    """Check that everything is there that the recovery points need.

    Every commit is read whole and held against the one before it; of every pack that a commit points into,
    the index and the length are looked at. Ends with 7 when something is damaged, naming each object, and the
    points and volumes that cannot be recovered because of it; all others can.
    """
    from process_server.recovery.check import VaultCheck

    share = _share(subset, read_data=read_data)
    access = open_vault_of(vault, recovery_key_file, server_dir)
    receipts = _receipts(receipt, access) if receipt is not None else []
    with _progress() as tell:
        found = VaultCheck(
            access.store, access.keys, read_share=share, receipts=receipts, progress=tell
        ).run()
    if as_json:
        print(json.dumps(found.as_dict()))
        return IntegrityError.exit_code if found.damage else 0
    _print(found)
    if found.damage:
        raise IntegrityError(
            "the vault is damaged", where=access.url, why=f"{len(found.damage)} objects, named above"
        )
    return 0


def _share(subset: str | None, *, read_data: bool) -> float:
    if subset is None:
        return 1.0 if read_data else 0.0
    if not read_data:
        raise UsageError("--subset belongs to --read-data")
    try:
        share = float(subset.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not subset.endswith("%") or not 0 < share <= 1:
        raise UsageError("not a share", where=subset, fix="write it as 5%")
    return share


def _receipts(path: Path, access: "Access") -> "list[Receipt]":
    from process_server.recovery.check_chain import Receipt

    try:
        found = msgspec.json.decode(path.read_bytes(), type=InfoFile)
    except FileNotFoundError as error:
        raise NotFound("there is no such receipt", where=str(path)) from error
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError("cannot use the receipt", where=str(path), why=str(error)) from error
    if found.vault != access.keys.vault_id.hex():
        raise ConfigError("the receipt is of another vault", where=str(path), why=found.vault)
    return [
        Receipt(bytes.fromhex(each.machine), each.seq, bytes.fromhex(each.digest)) for each in found.heads
    ]


def _print(found: "Findings") -> None:
    print(
        f"{found.machines} machines, {found.commits} commits, {found.maps} maps, {found.packs} packs,"
        f" of which {found.packs_read} were read whole ({format_size(found.read_bytes)})"
    )
    for damage in found.damage:
        print(f"damaged  {damage.object}: {damage.why}")
    for affected in found.affected:
        spans = ", ".join(
            span["first"] if span["first"] == span["last"] else f"{span['first']} to {span['last']}"
            for span in affected.spans_as_ids()
        )
        print(
            f"lost     {affected.machine_name}, volume {affected.volume}: {affected.points} points: {spans}"
        )
    if found.damage and not found.affected:
        print("no recovery point is lost")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show how far it is, on stderr: a bar on a terminal, else a line of JSON a second."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("packs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("packs", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_EVERY_S:
            last = time.monotonic()
            status = {"message_type": "status", "packs_done": done, "packs_total": total}
            print(json.dumps(status), file=sys.stderr, flush=True)

    yield line
