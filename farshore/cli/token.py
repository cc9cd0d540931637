"""``farshore token``: what a new machine needs to enrol."""

import json
from pathlib import Path

import click

from farshore.cli.clientopts import client_option, open_client
from farshore.errors import UsageError
from farshore.units import parse_duration

HELP = {"help_option_names": ["-h", "--help"]}


@click.group("token", context_settings=HELP)
def command() -> None:
    """Tokens with which machines enrol."""


@command.command("create", context_settings=HELP)
@click.option("--machine", required=True, metavar="NAME", help="The one name it is good for.")
@click.option("--ttl", default="1h", metavar="DURATION", help="How long it is good; up to 1h, the default.")
@client_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def create_command(machine: str, ttl: str, client_file: Path | None, as_json: bool) -> None:
    """Print a token for one enrolment of the machine NAME.

    Whoever has it can enrol as that machine until it was used: pass it on as you would a password.
    """
    from farshore.ids import valid_name

    if not valid_name(machine):
        raise UsageError(
            "not a name for a machine",
            where=machine[:64],
            fix="use 1 to 63 of a-z 0-9 . _ -, beginning with a letter or digit",
        )
    try:
        ttl_s = parse_duration(ttl)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not 0 < ttl_s <= 3600:
        raise UsageError("a token lives up to 1 h", where=ttl, fix="give a --ttl up to 1h")
    made = open_client(client_file).post("tokens", body={"machine": machine, "ttl_seconds": ttl_s})
    print(json.dumps({"token": made["token"], "expires": made["expires"]}) if as_json else made["token"])
