"""``farshore point``: the recovery points of a machine."""

import json
from pathlib import Path

import click

from farshore.cli.clientopts import client_option, open_client
from farshore.cli.vaultopts import open_vault_of, vault_options
from farshore.errors import UsageError
from farshore.units import parse_duration


@click.group("point", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Recovery points of a machine."""


@command.command("list")
@click.argument("machine")
@vault_options
@client_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(
    machine: str,
    vault: str | None,
    recovery_key_file: Path | None,
    server_dir: Path | None,
    client_file: Path | None,
    as_json: bool,
) -> None:
    """List the recovery points of MACHINE, oldest first; of the server in use unless a vault is named."""
    if vault is None and recovery_key_file is None and server_dir is None:
        points = open_client(client_file).get("machines", machine, "points")
    else:
        # Imported when used: --help and completion start without numpy and zstd.
        from process_server.recovery.points import find_machine, list_points

        access = open_vault_of(vault, recovery_key_file, server_dir)
        points = [point.as_dict() for point in list_points(find_machine(access.store, access.keys, machine))]
    print(json.dumps(points) if as_json else table(points))


@command.command("create")
@click.argument("machine")
@click.option("--tag", required=True, metavar="TEXT", help="What to find it by.")
@click.option(
    "--wait", type=click.Choice(["vaulted"]), default="vaulted", help="Return when it is; the default."
)
@click.option("--timeout", default="60s", metavar="DURATION", help="Give up waiting after this; default 60s.")
@click.option(
    "--allow-fuzzy",
    is_flag=True,
    help="Be content with a point that is fuzzy: print it and end with 0. Without this it is made, too, but"
    " the command ends with 6.",
)
@client_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def create_command(
    machine: str,
    tag: str,
    wait: str,
    timeout: str,
    allow_fuzzy: bool,
    client_file: Path | None,
    as_json: bool,
) -> None:
    """Mark this moment of MACHINE's volumes as a recovery point.

    A disk that is scanned is read as a whole first, by a pass that begins now: give a --timeout that is long
    enough. When it is not, the point comes all the same, later than this command waits for it. Of a disk that
    is scanned while others may write to it every point is fuzzy: say --allow-fuzzy.
    """
    try:
        timeout_s = parse_duration(timeout)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not 0 < timeout_s <= 86_400:
        raise UsageError("not a time to wait", where=timeout, fix="give a --timeout up to 24h")
    if not 0 < len(tag) <= 200:
        raise UsageError("not a tag", fix="use 1 to 200 characters")
    body: dict[str, object] = {"tag": tag, "timeout_seconds": timeout_s}
    if allow_fuzzy:  # a server from before it was known refuses the key
        body["allow_fuzzy"] = True
    made = open_client(client_file).post(
        "machines",
        machine,
        "points",
        body=body,
        timeout_s=timeout_s + 15,
    )
    print(json.dumps({"point": made["point"]}) if as_json else made["point"])


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
