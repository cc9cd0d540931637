"""``farshore agent``: enrol a machine and run its agent."""

import asyncio
import json
import os
import stat
from pathlib import Path
from typing import Final

import click

from farshore.cli.main import LazyGroup, Verb
from farshore.errors import ConfigError, UsageError

TOKEN_FILE_BYTES_MAX: Final = 16 * 1024

command = LazyGroup(
    "agent",
    {
        "enrol": Verb("farshore.cli.agent:enrol_command", "Make this host a machine of a process server."),
        "run": Verb("farshore.cli.agent_run:command", "Run the agent in the foreground."),
    },
    "Enrol a machine and run its agent.",
)


@click.command("enrol", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, resolve_path=True))
@click.option("--server", required=True, metavar="HOST:PORT", help="The process server's address.")
@click.option(
    "--token-file",
    required=True,
    type=click.Path(path_type=Path, resolve_path=True),
    metavar="FILE",
    help="What 'farshore token create' printed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def enrol_command(directory: Path, server: str, token_file: Path, as_json: bool) -> None:
    """Make in DIR the identity of a machine; its name is in the token.

    Safe to repeat: with the key that DIR has the server answers again.
    """
    # Imported when used: --help and completion start without cryptography.
    from agent.config import parse_address
    from agent.identity import enrol
    from farshore.ids import id_to_hex

    try:
        parse_address(server)
    except ValueError as error:
        raise UsageError(str(error), fix="write HOST:9443") from error
    done = asyncio.run(enrol(directory, read_token(token_file), server))
    if as_json:
        told = {
            "machine": done.machine,
            "machine_id": id_to_hex(done.machine_id),
            "vault_id": id_to_hex(done.vault_id),
            "servers": list(done.servers),
            "renewed": done.renewed,
        }
        print(json.dumps(told))
        return
    print(f"{done.machine} is enrolled{' (again)' if done.renewed else ''}")
    print(f"start it: farshore agent run {directory}")


def read_token(path: Path) -> str:
    """Return the text of a token file, or of a pipe. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            if stat.S_ISDIR(os.fstat(file.fileno()).st_mode):
                raise IsADirectoryError(21, "Is a directory")
            content = file.read(TOKEN_FILE_BYTES_MAX)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError("cannot read the token", where=str(path), why=why) from error
    return content.decode("ascii", "replace")
