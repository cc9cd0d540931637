"""Prove at start that a store keeps what the vault's safety rests on: some ignore conditions in silence."""

import secrets
from collections.abc import Callable
from contextlib import suppress

from farshore.errors import ConfigError, FarshoreError, NotFound
from process_server.vault.store.protocol import AlreadyExists, Precondition, Store


def probe(store: Store) -> None:
    """Make, read, replace and delete a small object below ``probe/``.

    Raises:
        ConfigError: The store failed; says which promise it broke. It must not be used.
        CapacityError, Unreachable, Failed: The store could not be asked.
    """
    name = f"probe/{secrets.token_hex(16)}"
    body = secrets.token_bytes(1000)
    try:
        store.put_new(name, [body[:1], body[1:]])
        _require(store.get(name) == body and store.size(name) == 1000, "what was written is read back")
        _require(
            _refused(AlreadyExists, lambda: store.put_new(name, b"2")) and store.get(name) == body,
            "a create never replaces an object",
        )
        _require(
            (store.get_range(name, 10, 20), store.get_range(name, 990, 20)) == (body[10:30], body[990:]),
            "a part of an object can be read",
        )
        _require(name in set(store.list("probe/")), "a new object is listed")
        _require(
            _refused(Precondition, lambda: store.cas(name, b"3", None)),
            "a compare-and-swap that expects no object meets one",
        )
        first = store.get_with_etag(name)[1]
        second = store.cas(name, b"4", first)
        _require(store.get_with_etag(name) == (b"4", second), "a compare-and-swap replaces the object")
        _require(
            _refused(Precondition, lambda: store.cas(name, b"5", first)) and store.get(name) == b"4",
            "a compare-and-swap that expects an older object is refused",
        )
        store.delete(name)
        _require(_refused(NotFound, lambda: store.get(name)), "a deleted object is gone")
        store.delete(name)
        _require(
            _refused(Precondition, lambda: store.cas(name, b"6", second)),
            "a compare-and-swap that expects an object meets none",
        )
    finally:
        with suppress(FarshoreError):
            store.delete(name)


def _refused(error: type[FarshoreError], call: Callable[[], object]) -> bool:
    try:
        call()
    except error:
        return True
    return False


def _require(held: bool, promise: str) -> None:
    if not held:
        raise ConfigError(
            "this store cannot hold a vault",
            why=f"it failed the check that {promise}",
            fix="use another store, or a newer version of this one",
        )
