"""Which store an address means."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from farshore.errors import ConfigError
from process_server.vault.store.file import FileStore
from process_server.vault.store.protocol import Store


def open_store(url: str, *, owner: bool = False, create: bool = False) -> Store:
    """Return the store at ``url``: ``file:///directory``.

    Args:
        url: Where the vault lies.
        owner: Hold the store as its one server until `close`; readers and the server's workers do not.
        create: Make the directory, and those above it, when there is none.

    Raises:
        ConfigError: The address is none, or of a kind that is not supported, or on a network file system.
        NotFound: There is no such directory.
        Conflict: Another server holds the store.
    """
    parts = urlsplit(url)
    if parts.scheme in ("s3", "az"):
        raise ConfigError(
            "cannot open the vault",
            where=url,
            why=f"{parts.scheme}:// is not there yet; s3:// and az:// come in a later version",
            fix="use file:///directory",
        )
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise ConfigError("not the address of a vault", where=url, fix="write file:///directory")
    path = Path(unquote(parts.path))
    if not path.is_absolute() or "\0" in parts.path or "%00" in parts.path:
        raise ConfigError("not the address of a vault", where=url, fix="write file:///directory")
    return FileStore(path, owner=owner, create=create)
