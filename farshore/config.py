"""Reading configuration files, and writing files that must be whole, durable and private.

Settings are read once, at start, into frozen structs whose unknown keys are errors: a misspelt key is found
by the first start and not by the first disaster.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
import tomllib
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from farshore.errors import CapacityError, ConfigError, Failed
from farshore.units import MIB

CONFIG_BYTES_MAX: Final = MIB
"""Ours are a few KiB; more means that somebody pointed us at the wrong file."""

_AT_PATH: Final = re.compile(r"(?P<why>.*?)(?: - at `(?P<path>[^`]*)`)?", re.DOTALL)
_BOM: Final = b"\xef\xbb\xbf"
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

_Settings = TypeVar("_Settings", bound=msgspec.Struct)


def load_config(path: Path, settings: type[_Settings]) -> _Settings:
    """Return the TOML file at ``path`` as ``settings``, a frozen struct that forbids unknown fields.

    Raises:
        ConfigError: Missing, unreadable, not a regular file, too large, not UTF-8, not TOML, or a key is
            unknown, missing or of the wrong type; the text names the file, the key and the reason.
        TypeError: ``settings`` would accept unknown keys or could be changed: a mistake of ours.
    """
    struct = settings.__struct_config__
    if not (struct.frozen and struct.forbid_unknown_fields):
        raise TypeError(f"{settings.__name__} must be frozen and forbid unknown fields")
    return parse_config(_read_bounded(path), settings, where=str(path))


def parse_config(text: bytes, settings: type[_Settings], *, where: str) -> _Settings:
    """Return TOML ``text`` as ``settings``; ``where`` names it in errors. Raises as `load_config`."""
    if text.startswith(_BOM):
        raise _broken(where, "it begins with a byte order mark", "save it as UTF-8 without BOM")
    try:
        tree = tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        raise _broken(where, f"byte {error.start} is not UTF-8", "save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise _broken(where, str(error), "correct the line") from error
    try:
        return msgspec.convert(tree, settings)
    except msgspec.ValidationError as error:
        found = _AT_PATH.fullmatch(str(error))
        why, key = (found["why"], found["path"] or "$") if found else (str(error), "$")
        key = key.removeprefix("$").lstrip(".")
        raise _broken(where, f"{key}: {why}" if key else why, "correct the key") from error


def write_private(path: Path, content: bytes) -> None:
    """Make ``path`` hold exactly ``content``, durable and mode 0600, or leave it as it was.

    A reader, or the host after a power cut, sees the old file or the new one, whole. An existing file is
    replaced; a symbolic link is replaced too, not followed.

    Raises:
        CapacityError: No space or quota left.
        Failed: Any other refusal of the file system.
    """
    _write_whole(path, content, replace=True)


def create_private(path: Path, content: bytes) -> None:
    """As `write_private`, but ``path`` must not exist: of two writers exactly one succeeds.

    Raises:
        FileExistsError: There is something at ``path``; the caller knows which error that is for the user.
        CapacityError, Failed: As `write_private`.
    """
    _write_whole(path, content, replace=False)


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory (creations, renames, removals) durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_bounded(path: Path) -> bytes:
    try:
        # O_NONBLOCK: opening a FIFO by mistake must fail below, not wait for a writer that never comes.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise _broken(str(path), "there is no such file", "create it or name another") from error
    except OSError as error:
        raise _broken(str(path), error.strerror or str(error), "check its path and permissions") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise _broken(str(path), f"it is {kind}", "name a TOML file")
        with open(descriptor, "rb", closefd=False) as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise _broken(str(path), error.strerror or str(error), "check the disk") from error
    finally:
        os.close(descriptor)
    if len(text) > CONFIG_BYTES_MAX:
        raise _broken(str(path), f"it is larger than {CONFIG_BYTES_MAX} bytes", "name a TOML file")
    return text


def _broken(where: str, why: str, fix: str) -> ConfigError:
    return ConfigError("cannot use the configuration", where=where, why=why, fix=fix)


def _write_whole(path: Path, content: bytes, *, replace: bool) -> None:
    # In the same directory: rename and link work only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                # The umask can only take bits away; an ACL default may add some.
                os.fchmod(descriptor, 0o600)
                left = memoryview(content)
                while left:
                    left = left[file.write(left) :]
                os.fsync(descriptor)
            if replace:
                os.rename(temporary, path)
            else:
                os.link(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        fsync_directory(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in _FULL:
            raise CapacityError("cannot write", where=str(path), why=why, fix="free some space") from error
        raise Failed("cannot write", where=str(path), why=why) from error
