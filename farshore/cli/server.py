"""``farshore server``: make, take over and run a process server."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from farshore.errors import UsageError

if TYPE_CHECKING:
    from process_server.control.setup import Made

HELP = {"help_option_names": ["-h", "--help"]}

_directory = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, resolve_path=True))
_key_file = click.option(
    "--recovery-key-file",
    required=True,
    type=click.Path(path_type=Path, resolve_path=True),
    metavar="FILE",
    help="The vault's recovery key.",
)
_listen = click.option("--listen", metavar="HOST:PORT", help="For agents; default 0.0.0.0:9443.")
_api = click.option("--api", metavar="HOST:PORT", help="For operators; default 127.0.0.1:9444.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("server", context_settings=HELP)
def command() -> None:
    """Make, take over and run a process server."""


@command.command("init", context_settings=HELP)
@_directory
@click.option("--vault", metavar="URL", help="Where the vault is to lie; default file://DIR/vault.")
@_listen
@_api
@_key_file
@_json
def init_command(
    directory: Path,
    vault: str | None,
    listen: str | None,
    api: str | None,
    recovery_key_file: Path,
    as_json: bool,
) -> None:
    """Make a new vault and, in DIR, a server for it.

    FILE is made with the vault's recovery key: keep it somewhere that is neither this host nor the vault.
    """
    # Imported when used: --help and completion start without cryptography and numpy.
    from process_server.control.setup import initialise

    _check_addresses(listen, api)
    made = initialise(directory, recovery_key_file=recovery_key_file, vault=vault, listen=listen, api=api)
    _tell(made, directory, recovery_key_file, as_json)
    print(
        f"keep {recovery_key_file} safe and elsewhere: without it a lost server is a lost vault",
        file=sys.stderr,
    )


@command.command("adopt", context_settings=HELP)
@_directory
@click.option("--vault", required=True, metavar="URL", help="Where the vault lies.")
@_listen
@_api
@_key_file
@_json
def adopt_command(
    directory: Path,
    vault: str,
    listen: str | None,
    api: str | None,
    recovery_key_file: Path,
    as_json: bool,
) -> None:
    """Make in DIR a new server for a vault that exists; agents come back by themselves."""
    from process_server.control.setup import adopt

    _check_addresses(listen, api)
    made = adopt(directory, vault=vault, recovery_key_file=recovery_key_file, listen=listen, api=api)
    _tell(made, directory, recovery_key_file, as_json)


@command.command("run", context_settings=HELP)
@_directory
def run_command(directory: Path) -> int:
    """Run the server of DIR in the foreground.

    One JSON line with its addresses comes on stdout when it is usable; SIGTERM stops it in order.
    """
    from process_server.main import run

    return run(directory)


def _check_addresses(*addresses: str | None) -> None:
    from process_server.config import parse_listen

    for address in addresses:
        try:
            _ = address is not None and parse_listen(address)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _tell(made: "Made", directory: Path, recovery_key_file: Path, as_json: bool) -> None:
    from farshore.ids import id_to_hex
    from process_server.control.setup import link_client

    link = link_client(made.client)
    if link is not None:
        print(f"linked {link} to {made.client}: the client verbs find this server", file=sys.stderr)
    if as_json:
        told = {
            "vault": made.vault,
            "vault_id": id_to_hex(made.vault_id),
            "client": str(made.client),
            "recovery_key_file": str(recovery_key_file),
            "machines": list(made.machines),
        }
        print(json.dumps(told))
        return
    print(f"vault {id_to_hex(made.vault_id)} at {made.vault}")
    if made.machines:
        print(f"machines: {', '.join(made.machines)}")
    print(f"start it: farshore server run {directory}")
