"""Options shared by the verbs that work on a vault with no server at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def vault_options(function: F) -> F:
    """Add ``--vault``, ``--recovery-key-file`` and ``--server-dir``."""
    options = (
        click.option("--vault", metavar="URL", help="Address of the vault."),
        click.option(
            "--recovery-key-file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="The vault's recovery key.",
        ),
        click.option(
            "--server-dir",
            type=click.Path(path_type=Path, file_okay=False),
            envvar="FARSHORE_SERVER_DIR",
            metavar="DIR",
            help="Use the vault and key of the server in DIR instead.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function
