"""``farshore vault key``: who can open a vault."""

import getpass
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from farshore.cli.vaultopts import open_vault_of, vault_options
from farshore.config import create_private
from farshore.errors import ConfigError, Conflict, FarshoreError, NotFound, Unreachable, UsageError
from farshore.ids import id_to_hex

if TYPE_CHECKING:
    from process_server.vault.holders import Holder, Wrapper

KEY_FILE_BYTES_MAX = 4096


@click.group("key", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Who can open a vault.

    Each holder has the vault's master key wrapped for its own secret. Taking a holder away keeps it from
    opening the vault again; it does not change what is sealed, so who has read the master key still has it.
    """


def _label(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--label", default="", metavar="TEXT", help="What to call it in the list.")(function)


@command.command("list")
@vault_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(
    vault: str | None, recovery_key_file: Path | None, server_dir: Path | None, as_json: bool
) -> None:
    """List the holders."""
    # Imported when used: --help and completion start without numpy and zstd.
    from process_server.vault.keys import list_holders

    access = open_vault_of(vault, recovery_key_file, server_dir)
    holders = [_shown(holder) for holder in list_holders(access.store, access.keys)]
    if as_json:
        print(json.dumps({"holders": holders}))
        return
    for holder in holders:
        print(f"{holder['id']}  {holder['kind']:10}  {holder['label']}".rstrip())


@command.command("add-passphrase")
@click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Its first line is the passphrase; it is asked for when this is not given.",
)
@_label
@vault_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def add_passphrase_command(
    passphrase_file: Path | None,
    label: str,
    vault: str | None,
    recovery_key_file: Path | None,
    server_dir: Path | None,
    as_json: bool,
) -> None:
    """Let a passphrase open the vault.

    Where a key file is asked for, one with a line `passphrase: WORDS` then does, or `-` and typing it.
    """
    from process_server.vault.holders import Passphrase

    text = _line_of(passphrase_file) if passphrase_file is not None else _asked()
    passphrase = Passphrase(text)
    passphrase.check_new()
    _add(
        lambda wrapper, master: wrapper.for_passphrase(master, passphrase, label),
        label,
        (vault, recovery_key_file, server_dir),
        as_json=as_json,
    )


@command.command("add-escrow")
@click.option(
    "--public-key",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The public half of an X25519 key pair, PEM.",
)
@_label
@vault_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def add_escrow_command(
    public_key: Path,
    label: str,
    vault: str | None,
    recovery_key_file: Path | None,
    server_dir: Path | None,
    as_json: bool,
) -> None:
    """Let whoever has a private key open the vault; that key is not needed here and now."""
    from process_server.vault.holders import parse_public_key

    recipient = parse_public_key(_content_of(public_key))
    _add(
        lambda wrapper, master: wrapper.for_escrow(master, recipient, label),
        label,
        (vault, recovery_key_file, server_dir),
        as_json=as_json,
    )


@command.command("remove")
@click.argument("holder")
@vault_options
def remove_command(
    holder: str, vault: str | None, recovery_key_file: Path | None, server_dir: Path | None
) -> None:
    """Take HOLDER, by its id, away. The last one that is no server's stays."""
    from process_server.vault.keys import Holders, change_holders

    access = open_vault_of(vault, recovery_key_file, server_dir)

    def without(holders: Holders) -> Holders:
        left = tuple(each for each in holders if id_to_hex(each.id) != holder)
        if left == holders:
            raise NotFound("no such holder", where=holder, fix="`farshore vault key list` shows them")
        return left

    change_holders(access.store, access.keys, without)


@command.command("rotate")
@click.option(
    "--new-key-file",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the new recovery key goes; must not exist, made 0600.",
)
@vault_options
def rotate_command(
    new_key_file: Path, vault: str | None, recovery_key_file: Path | None, server_dir: Path | None
) -> None:
    """Make a new recovery key; all earlier ones open the vault no more."""
    from process_server.vault.keys import Holders, change_holders
    from process_server.vault.recovery_key import RecoveryKey

    access = open_vault_of(vault, recovery_key_file, server_dir)
    recovery = RecoveryKey.generate()
    # First the file: from the moment on at which only this key opens the vault, somebody has it.
    try:
        create_private(new_key_file, f"{recovery.format()}\n".encode())
    except FileExistsError as error:
        fix = "name one that does not exist"
        raise Conflict("the file exists", where=str(new_key_file), fix=fix) from error
    fresh = access.keys.wrap(lambda wrapper, master: wrapper.for_secret(master, "recovery", recovery.secret))

    def replaced(holders: Holders) -> Holders:
        return (fresh, *(holder for holder in holders if holder.kind != "recovery"))

    try:
        change_holders(access.store, access.keys, replaced)
    except FarshoreError as error:
        if not isinstance(error, Unreachable):  # then it may be the only key there is
            new_key_file.unlink()
        raise
    print(f"the new recovery key is in {new_key_file}; earlier ones open the vault no more", file=sys.stderr)


def _add(
    how: "Callable[[Wrapper, bytes], Holder]",
    label: str,
    source: tuple[str | None, Path | None, Path | None],
    *,
    as_json: bool,
) -> None:
    from process_server.vault.holders import check_label
    from process_server.vault.keys import change_holders

    check_label(label)
    access = open_vault_of(*source)
    fresh = access.keys.wrap(how)
    change_holders(
        access.store,
        access.keys,
        lambda holders: holders if any(holder.id == fresh.id for holder in holders) else (*holders, fresh),
    )
    print(json.dumps(_shown(fresh)) if as_json else id_to_hex(fresh.id))


def _shown(holder: "Holder") -> dict[str, str]:
    return {"id": id_to_hex(holder.id), "kind": holder.kind, "label": holder.label}


def _asked() -> str:
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask for the passphrase", fix="say --passphrase-file FILE")
    text = getpass.getpass("new passphrase: ")
    if getpass.getpass("once more: ") != text:
        raise UsageError("the two are not the same")
    return text


def _line_of(path: Path) -> str:
    try:
        return _content_of(path).decode().partition("\n")[0].strip()
    except UnicodeDecodeError as error:
        raise ConfigError("not a text", where=str(path)) from error


def _content_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(KEY_FILE_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise NotFound("there is no such file", where=str(path)) from error
    except OSError as error:
        raise ConfigError(
            "cannot read the file", where=str(path), why=error.strerror or str(error)
        ) from error
    if len(content) > KEY_FILE_BYTES_MAX:
        raise ConfigError("not a key file", where=str(path), why="it is too long")
    return content
