"""``farshore point``: the recovery points of a machine."""

import json
from pathlib import Path

import click

from farshore.cli.vaultopts import vault_options


@click.group("point", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Recovery points of a machine."""


@command.command("list")
@click.argument("machine")
@vault_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(
    machine: str, vault: str | None, recovery_key_file: Path | None, server_dir: Path | None, as_json: bool
) -> None:
    """List the recovery points of MACHINE, oldest first."""
    # Imported when used: --help and completion start without numpy and zstd.
    from process_server.recovery.access import open_access
    from process_server.recovery.points import find_machine, list_points

    access = open_access(vault=vault, recovery_key_file=recovery_key_file, server_dir=server_dir)
    points = [point.as_dict() for point in list_points(find_machine(access.store, access.keys, machine))]
    print(json.dumps(points) if as_json else table(points))


def table(points: list[dict[str, object]]) -> str:
    """Return the points for people to read: one line each, volumes with their LSNs."""
    if not points:
        return "no recovery points"
    rows = [("POINT", "TIME", "CONSISTENCY", "TAG", "VOLUMES")]
    for point in points:
        volumes = point["volumes"]
        assert isinstance(volumes, dict)
        lsns = " ".join(f"{name}@{entry['lsn']}" for name, entry in volumes.items())
        rows.append(
            (str(point["id"]), str(point["time"]), str(point["consistency"]), str(point["tag"] or ""), lsns)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    )
