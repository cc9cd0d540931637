"""Options shared by the verbs that work on a vault with no server at all."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from process_server.recovery.access import Access

F = TypeVar("F", bound=Callable[..., Any])


def open_vault_of(vault: str | None, recovery_key_file: Path | None, server_dir: Path | None) -> "Access":
    """Open the vault that the options name, by default that of the server whose client.toml is in use."""
    # Imported when used: --help and completion start without numpy and zstd.
    from process_server.recovery.access import open_access

    if vault is None and recovery_key_file is None and server_dir is None:
        from farshore.client import server_directory

        server_dir = server_directory()
    return open_access(vault=vault, recovery_key_file=recovery_key_file, server_dir=server_dir)


def vault_options(function: F) -> F:
    """Add ``--vault``, ``--recovery-key-file`` and ``--server-dir``."""
    options = (
        click.option("--vault", metavar="URL", help="Address of the vault."),
        click.option(
            "--recovery-key-file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="The vault's recovery key, or another key that opens it; - asks for it.",
        ),
        click.option(
            "--server-dir",
            type=click.Path(path_type=Path, file_okay=False),
            envvar="FARSHORE_SERVER_DIR",
            metavar="DIR",
            help="Use the vault and key of the server in DIR instead; on its host that is the default.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function
