"""Named places in the code where a test can make the process die or fail.

``failpoint("journal.after_append")`` does nothing, in about 25 ns, unless the environment asks for it::

    FARSHORE_FAILPOINTS="journal.after_append=kill:3,pack.before_put=raise"

``kill`` ends the process with SIGKILL, ``raise`` raises `InjectedFault`; ``:N`` waits for the N-th hit
(default 1). The process acts once per name: after a ``raise`` the place is harmless
again, so a retry can be watched.

There is no list of names to keep: the names are the literals in the calls, found by reading our own source
when, and only when, the variable is set. A name that no call has is an error, since a planned fault that can
never be hit would pass for a test.
"""

import ast
import importlib.util
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from farshore.errors import ConfigError

ENVIRONMENT: Final = "FARSHORE_FAILPOINTS"
PACKAGES: Final = ("farshore", "agent", "process_server")

Action: TypeAlias = Literal["kill", "raise"]


class InjectedFault(Exception):
    """What a failpoint with ``raise`` raises. Not a FarshoreError: a fault nobody expects."""


@dataclass(slots=True)
class _Armed:
    action: Action
    hits_left: int


_armed: dict[str, _Armed] | None = None
_lock: Final = threading.Lock()


def failpoint(name: str) -> None:
    """Mark a place named ``name``, a literal. When armed for it: raises InjectedFault, or kills."""
    if _armed is None:
        return
    _hit(name)


def arm(specification: str) -> None:
    """Arm the failpoints in ``specification`` (the form of the environment variable) and disarm all others.

    Raises:
        ConfigError: It cannot be parsed, or names a failpoint that no source file has.
    """
    global _armed
    plan = dict(_parse(specification))
    if unknown := sorted(plan.keys() - known_failpoints().keys()):
        raise ConfigError("no such failpoint", where=ENVIRONMENT, why=", ".join(unknown))
    with _lock:
        _armed = plan or None


def disarm() -> None:
    """Make every failpoint harmless."""
    global _armed
    with _lock:
        _armed = None


def pending() -> list[str]:
    """Return the armed names not reached often enough yet: a test that ends with one has tested nothing."""
    with _lock:
        return sorted(name for name, armed in (_armed or {}).items() if armed.hits_left > 0)


def known_failpoints() -> dict[str, list[str]]:
    """Return every failpoint name in the installed packages, with its places as ``path:line``."""
    known: dict[str, list[str]] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or ():
            for path in sorted(Path(folder).rglob("*.py")):
                for name, line in failpoints_in(path.read_text(encoding="utf-8")):
                    known.setdefault(name, []).append(f"{path}:{line}")
    return known


def failpoints_in(source: str) -> Iterator[tuple[str, int]]:
    """Yield name and line of each failpoint call in Python ``source``.

    Raises:
        ValueError: A call's argument is not one string literal, so nobody could list it.
    """
    if "failpoint(" not in source:  # parsing is 100 times slower than looking
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if called != "failpoint":
            continue
        match node.args:
            case [ast.Constant(value=str(name))] if not node.keywords:
                yield name, node.lineno
            case _:
                raise ValueError(f"line {node.lineno}: a failpoint is named by one string literal")


def _parse(specification: str) -> Iterator[tuple[str, _Armed]]:
    for part in filter(None, (part.strip() for part in specification.split(","))):
        name, _, wish = part.partition("=")
        action, colon, count = wish.partition(":")
        if action not in ("kill", "raise") or (
            colon and not (count.isascii() and count.isdigit() and int(count))
        ):
            raise ConfigError(
                "cannot read a failpoint",
                where=ENVIRONMENT,
                why=part,
                fix="write NAME=kill[:N] or NAME=raise[:N]",
            )
        yield name, _Armed("kill" if action == "kill" else "raise", int(count or "1"))


def _hit(name: str) -> None:
    with _lock:
        armed = (_armed or {}).get(name)
        if armed is None or armed.hits_left == 0:
            return
        armed.hits_left -= 1
        if armed.hits_left:
            return
    if armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise InjectedFault(name)


if _wanted := os.environ.get(ENVIRONMENT):
    arm(_wanted)
