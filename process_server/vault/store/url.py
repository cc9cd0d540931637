"""Which store an address means."""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from farshore.errors import ConfigError
from process_server.vault.store.address import parse_object_address
from process_server.vault.store.file import FileStore
from process_server.vault.store.protocol import Store

if TYPE_CHECKING:
    from process_server.vault.store.metered import Meter


def open_store(url: str, *, owner: bool = False, create: bool = False, meter: "Meter | None" = None) -> Store:
    """Return the store at ``url``: ``file:///directory``, ``s3://bucket/prefix`` or ``az://container/prefix``.

    A bucket is not asked anything yet; that it is there, and that we may use it, shows at the first request.

    Args:
        url: Where the vault lies.
        owner: Hold the store as its one server until `close`; readers and the server's workers do not. Of a
            bucket there may be several servers, and each chain has its one owner by itself.
        create: Make the directory, and those above it, when there is none. A bucket is never made.
        meter: Count every request here.

    Raises:
        ConfigError: The address is none, or of a kind that is not supported, or on a network file system; or
            there are no credentials for it.
        NotFound: There is no such directory.
        Conflict: Another server holds the store.
    """
    scheme = url.partition("://")[0]
    if scheme in ("s3", "az"):
        # Imported when used: a vault in a directory does not wait for the client of the others.
        from process_server.vault.store.object import ObjectStore
        from process_server.vault.store.retrying import RetryingStore

        return RetryingStore(_metered(ObjectStore(parse_object_address(url)), meter))
    return _metered(_open_directory(url, owner=owner, create=create), meter)


def _metered(store: Store, meter: "Meter | None") -> Store:
    if meter is None:
        return store
    # Imported when used: who recovers counts nothing.
    from process_server.vault.store.metered import MeteredStore

    return MeteredStore(store, meter)


def _open_directory(url: str, *, owner: bool, create: bool) -> Store:
    parts = urlsplit(url)
    fix = "write file:///directory, s3://BUCKET/PREFIX or az://CONTAINER/PREFIX"
    where = url if "@" not in url else f"{parts.scheme}://…"  # a password may stand before it
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise ConfigError("not the address of a vault", where=where, fix=fix)
    path = Path(unquote(parts.path))
    if not path.is_absolute() or "\0" in parts.path or "%00" in parts.path:
        raise ConfigError("not the address of a vault", where=where, fix=fix)
    return FileStore(path, owner=owner, create=create)
