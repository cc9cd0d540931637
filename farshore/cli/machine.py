"""``farshore machine``: who is enrolled, and who no longer is welcome."""

import json
from pathlib import Path

import click

from farshore.cli.clientopts import client_option, open_client

HELP = {"help_option_names": ["-h", "--help"]}


@click.group("machine", context_settings=HELP)
def command() -> None:
    """Machines that are enrolled."""


@command.command("list", context_settings=HELP)
@client_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(client_file: Path | None, as_json: bool) -> None:
    """List the machines with the keys they enrolled with."""
    found = open_client(client_file).get("machines")
    if as_json:
        print(json.dumps(found))
        return
    rows = [("MACHINE", "STATE", "ENROLLED", "CERTIFICATE UNTIL", "KEY")]
    rows += [
        (
            str(entry["name"]),
            str(entry["state"]),
            str(entry["enrolled"]),
            str(entry["certificate_expires"] or "-"),
            str(entry["key"]),
        )
        for entry in found["machines"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@command.command("revoke", context_settings=HELP)
@click.argument("name")
@client_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def revoke_command(name: str, client_file: Path | None, as_json: bool) -> None:
    """Refuse the machine NAME from now on, open connections included.

    Its recovery points stay. To let it back in, make a token and enrol it with a new key.
    """
    answer = open_client(client_file).post("machines", name, "revoke", body={})
    print(json.dumps(answer) if as_json else f"{name} is revoked; its recovery points stay")
