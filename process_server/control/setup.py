"""Making a process server: a new vault with it, or a new server for a vault that is there.

Either everything is made or nothing is left: each step puts what undoes it on a stack, and the stack is
dropped when the last step is done.
"""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import msgspec

from farshore import client, pki
from farshore.clock import Clock, SystemClock
from farshore.config import create_private, fsync_directory, write_private
from farshore.errors import ConfigError, Conflict, Failed, FarshoreError, Unreachable
from farshore.failpoints import failpoint
from farshore.ids import id_to_hex, new_id
from process_server.config import (
    API_PORT,
    LISTEN_PORT,
    SLOT_KEY_BYTES,
    KeysConfig,
    Layout,
    ServerConfig,
    format_address,
    parse_listen,
    save,
    to_toml,
)
from process_server.control.api import hash_token, new_bearer_token
from process_server.identity import with_server_certificate
from process_server.recovery.access import read_opener
from process_server.vault.control import Control, ControlStore, ServerIdentity
from process_server.vault.keys import VaultKeys, add_server_slot, create_vault, open_vault
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.root import ROOT
from process_server.vault.store import Store, open_store
from process_server.vault.store.probe import probe


@dataclass(frozen=True, slots=True)
class Made:
    """What `initialise` or `adopt` made."""

    vault: str
    vault_id: bytes
    client: Path
    machines: tuple[str, ...] = ()


@dataclass(slots=True)
class _Trial:
    """One try to make a vault.

    Attributes:
        may_exist: There may be a vault that only the key in ``recovery_key_file`` opens: what undoes the rest
            leaves the file then.
    """

    recovery_key_file: Path
    may_exist: bool = False

    def remove_key(self) -> None:
        if not self.may_exist:
            self.recovery_key_file.unlink(missing_ok=True)

    def remove_directory(self, directory: Path) -> None:
        if not self.may_exist or directory.absolute() not in self.recovery_key_file.absolute().parents:
            shutil.rmtree(directory, ignore_errors=True)


def initialise(
    directory: Path,
    *,
    recovery_key_file: Path,
    vault: str | None = None,
    listen: str | None = None,
    api: str | None = None,
    clock: Clock | None = None,
) -> Made:
    """Make a vault, its CA, and in ``directory`` a server for it.

    Args:
        recovery_key_file: Must not exist. Written before the vault, which must never be without it.

    Raises:
        Conflict: There is a server in the directory, a vault at the address, or a file for the recovery key.
        ConfigError: The store cannot hold a vault.
        CapacityError, Failed: Something could not be written.
        Unreachable: The store did not answer. If the vault may have been made, and could not be taken back,
            the file with its recovery key stays, and the error says so.
    """
    url = vault or f"file://{quote(str(Layout(directory.absolute()).vault))}"
    trial = _Trial(recovery_key_file)
    try:
        return _initialise(directory, url, trial, listen, api, clock or SystemClock())
    except FarshoreError as error:
        if not trial.may_exist:
            raise
        raise Unreachable(
            "the vault may have been made",
            where=url,
            why=str(error),
            fix=f"keep {recovery_key_file}: with it `farshore server adopt` takes over what is there; "
            "if that finds no vault, remove it and begin again",
        ) from error


def _initialise(
    directory: Path, url: str, trial: "_Trial", listen: str | None, api: str | None, clock: Clock
) -> Made:
    with contextlib.ExitStack() as undo:
        _prepare(directory, undo, trial)
        recovery = RecoveryKey.generate()
        _create(trial.recovery_key_file, f"{recovery.format()}\n".encode(), undo, trial)
        slot = secrets.token_bytes(SLOT_KEY_BYTES)
        _create(Layout(directory).slot_key, slot, undo)
        store = _new_store(url, undo)
        probe(store)
        try:
            keys = create_vault(store, recovery, slot)
        except Unreachable:
            trial.may_exist = True
            raise
        trial.may_exist = True
        undo.callback(_drop_vault, store, trial)
        failpoint("server.init.after_vault")
        control = ControlStore(store, keys).update(_with_server(keys, clock))
        made = _write_settings(directory, url, keys, control, listen, api, undo)
        undo.pop_all()
        store.close()
    return made


def adopt(
    directory: Path,
    *,
    vault: str,
    recovery_key_file: Path,
    listen: str | None = None,
    api: str | None = None,
    clock: Clock | None = None,
) -> Made:
    """Make in ``directory`` a new server for a vault that exists; it takes the place of the one before.

    Agents know the vault, not the server: they come back by themselves when this one has the address.

    Raises:
        Conflict: There is a server in the directory, or another one runs on the vault.
        NotFound: There is no vault at the address, or no such key file.
        WrongKey: The key is another vault's.
        ConfigError, IntegrityError, CapacityError, Failed: As `initialise`, or the vault is damaged.
    """
    opener = read_opener(recovery_key_file)
    with contextlib.ExitStack() as undo:
        _prepare(directory, undo)
        with contextlib.closing(open_store(vault, owner=True)) as store:
            keys = open_vault(store, opener)
            probe(store)
            control = ControlStore(store, keys)
            slot = _slot(directory, undo)
            add_server_slot(store, keys, slot)
            failpoint("server.adopt.after_slot")
            # From here on the server before is no longer the vault's; what follows only names files of ours.
            changed = control.update(_with_server(keys, clock or SystemClock()))
            made = _write_settings(directory, vault, keys, changed, listen, api, undo)
            undo.pop_all()
    return made


def link_client(path: Path) -> Path | None:
    """Put a link to ``client.toml`` where the client verbs look, unless something useful is there already.

    Returns:
        The link, or None when it was not made.
    """
    try:
        place = client.user_place()
        if os.path.lexists(place) and (place.exists() or not place.is_symlink()):
            return None
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(path.absolute())
    except (OSError, RuntimeError):  # no home, or one that cannot be written: a convenience, no more
        return None
    return place


def write_client(path: Path, config: client.ClientConfig) -> None:
    """Write ``client.toml``, private. Raises CapacityError or Failed."""
    write_private(path, to_toml(config).encode())


def client_url(address: str) -> str:
    """Return the URL for clients on this host of an API that listens on ``address``."""
    host, port = parse_listen(address)
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"https://{format_address(local, port)}"


def _prepare(directory: Path, undo: contextlib.ExitStack, trial: _Trial | None = None) -> None:
    """Make the directory, private, and refuse one that has a server."""
    if os.path.lexists(Layout(directory).config):
        raise Conflict(
            "there is a process server already",
            where=str(directory),
            fix="start it, or use another directory",
        )
    try:
        if not directory.exists():
            directory.mkdir(mode=0o700, parents=True)
            if trial is not None:
                undo.callback(trial.remove_directory, directory)
            else:
                undo.callback(shutil.rmtree, directory, ignore_errors=True)
            fsync_directory(directory.parent)
        elif not directory.is_dir():
            raise Conflict("not a directory", where=str(directory))
        elif stat.S_IMODE(directory.stat().st_mode) & 0o022:
            raise ConfigError(
                "others can write in the directory", where=str(directory), fix=f"chmod 700 {directory}"
            )
    except OSError as error:
        raise Failed("cannot make the directory", where=str(directory), why=error.strerror or "") from error


def _create(path: Path, content: bytes, undo: contextlib.ExitStack, trial: _Trial | None = None) -> None:
    try:
        create_private(path, content)
    except FileExistsError:
        raise Conflict(
            "the file exists already",
            where=str(path),
            why="it may be another vault's key",
            fix="name a file that does not exist",
        ) from None
    if trial is not None:
        undo.callback(trial.remove_key)
    else:
        undo.callback(path.unlink, missing_ok=True)


def _slot(directory: Path, undo: contextlib.ExitStack) -> bytes:
    """Return the slot key that lies there from an earlier try, or a new one."""
    path = Layout(directory).slot_key
    with contextlib.suppress(FileNotFoundError):
        found = path.read_bytes()
        if len(found) == SLOT_KEY_BYTES and not stat.S_IMODE(path.stat().st_mode) & 0o077:
            return found
    slot = secrets.token_bytes(SLOT_KEY_BYTES)
    write_private(path, slot)
    undo.callback(path.unlink, missing_ok=True)
    return slot


def _new_store(url: str, undo: contextlib.ExitStack) -> Store:
    parts = urlsplit(url)
    folder = Path(unquote(parts.path)) if parts.scheme == "file" and parts.path else None
    fresh = folder is not None and not folder.exists()
    store = open_store(url, owner=True, create=True)
    if folder is not None and fresh:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
    undo.callback(store.close)
    return store


def _drop_vault(store: Store, trial: _Trial) -> None:
    # Ours and not yet told to anybody. The root first: without it there is no vault.
    with contextlib.suppress(FarshoreError):
        store.delete(ROOT)
        trial.may_exist = False
        for prefix in ("keys/", "control/"):
            for name in list(store.list(prefix)):
                store.delete(name)


def _with_server(keys: VaultKeys, clock: Clock) -> Callable[[Control], Control]:
    server_id, now_ns = new_id(), clock.wall_ns()

    def change(control: Control) -> Control:
        if not control.ca_certificate:
            authority = pki.Authority.create(keys.vault_id, now_ns)
            control = msgspec.structs.replace(
                control, ca_certificate=authority.certificate, ca_key=authority.private_key
            )
        server = ServerIdentity(id=server_id, certificate=b"", key=b"")
        return with_server_certificate(msgspec.structs.replace(control, server=server), keys.vault_id, now_ns)

    return change


def _write_settings(
    directory: Path,
    url: str,
    keys: VaultKeys,
    control: Control,
    listen: str | None,
    api: str | None,
    undo: contextlib.ExitStack,
) -> Made:
    layout, token = Layout(directory), new_bearer_token()
    config = ServerConfig(
        vault=url,
        vault_id=id_to_hex(keys.vault_id),
        keys=KeysConfig(f"file:{layout.slot_key.name}"),
        api_token_sha256=(hash_token(token),),
        listen=listen or f"0.0.0.0:{LISTEN_PORT}",
        api=api or f"127.0.0.1:{API_PORT}",
    )
    undo.callback(layout.client.unlink, missing_ok=True)
    ca = control.ca_certificate.decode()
    write_client(layout.client, client.ClientConfig(client_url(config.api), config.vault_id, ca, token))
    undo.callback(layout.config.unlink, missing_ok=True)
    save(directory, config)
    machines = tuple(sorted(machine.name for machine in control.machines))
    return Made(url, keys.vault_id, layout.client, machines)
