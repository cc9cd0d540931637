"""The option shared by the verbs that ask a running server."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from farshore.client import Client

F = TypeVar("F", bound=Callable[..., Any])


def client_option(function: F) -> F:
    """Add ``--client FILE``."""
    return click.option(
        "--client",
        "client_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="client.toml of the server (also FARSHORE_CLIENT); made by 'server init'.",
    )(function)


def open_client(client_file: Path | None) -> "Client":
    """Return a client of the server that option, environment or the usual places name. Raises ConfigError."""
    # Imported when used: --help and completion start without cryptography.
    from farshore.client import Client, load

    return Client(load(client_file))
