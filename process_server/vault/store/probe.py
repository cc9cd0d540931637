"""Prove at start that a store keeps what the vault's safety rests on: some ignore conditions in silence."""

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from farshore.clock import Clock, SystemClock
from farshore.errors import ConfigError, Failed, FarshoreError, NotFound
from process_server.vault.store.protocol import AlreadyExists, Precondition, Store

SKEW_S_MAX: Final = 300.0
"""A third of what S3 and Azure take as the age of a signed request before they refuse it."""


def probe(store: Store, clock: Clock | None = None) -> None:
    """Make, read, replace and delete a small object below ``probe/``.

    Args:
        clock: Ours, with which the store's is compared.

    Raises:
        ConfigError: The store failed; says which promise it broke, and it must not be used. Or its clock and
            ours differ.
        CapacityError, Unreachable, Failed: The store could not be asked.
    """
    clock = clock or SystemClock()
    name = f"probe/{secrets.token_hex(16)}"
    body = secrets.token_bytes(1000)
    try:
        before_s = clock.wall_ns() / 1e9
        store.put_new(name, [body[:1], body[1:]])
        after_s = clock.wall_ns() / 1e9
        _require(
            lambda: store.get(name) == body and store.size(name) == 1000, "what was written is read back"
        )
        _compare_clocks(before_s, after_s, store.modified_s(name))
        _require(
            lambda: _refused(AlreadyExists, lambda: store.put_new(name, b"2")) and store.get(name) == body,
            "a create never replaces an object",
        )
        _require(
            lambda: (
                (store.get_range(name, 10, 20), store.get_range(name, 990, 20)) == (body[10:30], body[990:])
            ),
            "a part of an object can be read",
        )
        _require(lambda: name in set(store.list("probe/")), "a new object is listed")
        _require(
            lambda: _refused(Precondition, lambda: store.cas(name, b"3", None)),
            "a compare-and-swap that expects no object meets one",
        )
        first = store.get_with_etag(name)[1]
        second = store.cas(name, b"4", first)
        _require(
            lambda: store.get_with_etag(name) == (b"4", second), "a compare-and-swap replaces the object"
        )
        _require(
            lambda: _refused(Precondition, lambda: store.cas(name, b"5", first)) and store.get(name) == b"4",
            "a compare-and-swap that expects an older object is refused",
        )
        store.delete(name)
        _require(lambda: _refused(NotFound, lambda: store.get(name)), "a deleted object is gone")
        store.delete(name)
        _require(
            lambda: _refused(Precondition, lambda: store.cas(name, b"6", second)),
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


def _require(held: Callable[[], bool], promise: str) -> None:
    why = ""
    try:
        if held():
            return
    except Failed as exc:  # it refuses what it has to do, for good
        why = f" ({exc.why or exc.what})"
    raise ConfigError(
        "this store cannot hold a vault",
        why=f"it failed the check that {promise}{why}",
        fix="use another store, or a newer version of this one",
    )


def _compare_clocks(before_s: float, after_s: float, stored_s: float) -> None:
    """Hold the store's time of an object against ours before and after it was made.

    Raises:
        ConfigError: They are too far apart: requests would be refused, and every time shown would be wrong.
    """
    apart_s = max(before_s - stored_s, stored_s - after_s)
    if apart_s > SKEW_S_MAX:
        raise ConfigError(
            "this host's clock differs from the store's",
            why=f"by {apart_s:.0f} s",
            fix="set the clock: have a time service run, such as systemd-timesyncd or chrony",
        )
