"""What the vault asks of a store, and the errors a store may answer with."""

import re
from collections.abc import Iterator, Sequence
from typing import Final, Protocol, TypeAlias

from farshore.errors import Conflict

Buffer: TypeAlias = bytes | bytearray | memoryview
Body: TypeAlias = Buffer | Sequence[Buffer]
"""An object's bytes, in one piece or several; the store owns them until the call returns."""

NAME_CHARS_MAX: Final = 512
# No part begins with "." or "-": it would be a hidden file, a parent directory or an option.
_PART: Final = r"[a-z0-9_][a-z0-9._-]{0,127}"
_NAME: Final = re.compile(rf"{_PART}(?:/{_PART})*")


class AlreadyExists(Conflict):
    """A create met an object of that name. It may be our own, from a try whose outcome we never learned."""


class Precondition(Conflict):
    """The object is not the one that the compare-and-swap expected; it may be our own, as above."""


class Store(Protocol):
    """A flat map from names (``[a-z0-9/._-]``) to bytes. Synchronous; every method may block for seconds.

    May be used by several threads at once. Besides what each method says, any of them raises:
        CapacityError: The store is full; nothing of the object is left behind.
        Unreachable: No answer. A write may have happened, may happen later, or never.
        Failed: The store refuses for a reason that trying again will not mend.
        ValueError: Our own code made a name that is none.
    """

    def put_new(self, name: str, body: Body) -> None:
        """Create ``name``; durable on return. Never replaces, never leaves a part of a body.

        Raises:
            AlreadyExists: There is one; it is untouched, and durable.
        """
        ...

    def get(self, name: str) -> bytes:
        """Return the whole object. Raises NotFound."""
        ...

    def get_with_etag(self, name: str) -> tuple[bytes, str]:
        """Return the whole object and what `cas` takes as ``expected``. Raises NotFound."""
        ...

    def get_range(self, name: str, at: int, length: int) -> bytes:
        """Return ``length`` bytes from ``at``; fewer, or none, where the object ends. Raises NotFound."""
        ...

    def size(self, name: str) -> int:
        """Return the object's length in bytes. Raises NotFound."""
        ...

    def modified_s(self, name: str) -> float:
        """Return when the object was written by the store's clock, Unix time; perhaps to the second.

        Raises:
            NotFound: There is none.
        """
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names that begin with ``prefix``, in no order; one made or deleted meanwhile may lack.

        Never a proof that something is absent: ask for the name itself.
        """
        ...

    def cas(self, name: str, body: Body, expected: str | None) -> str:
        """Replace the object if its etag is ``expected`` (None: if there is none); durable on return.

        Returns:
            The new etag.

        Raises:
            Precondition: It is another one, or there is one, or there is none.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove the object. A missing one is success; a power cut may bring it back."""
        ...

    def close(self) -> None:
        """Give back what the store holds; it is not used afterwards."""
        ...


def check_name(name: str) -> str:
    """Return ``name``. Raises ValueError when it is not an object's name."""
    if len(name) > NAME_CHARS_MAX or not _NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is not the name of an object")
    return name


def is_name(name: str) -> bool:
    """Tell whether a name found in a store can be one of ours; strays are ignored, never deleted."""
    return len(name) <= NAME_CHARS_MAX and _NAME.fullmatch(name) is not None


def buffers_of(body: Body) -> list[Buffer]:
    """Return the pieces of ``body``."""
    return [body] if isinstance(body, bytes | bytearray | memoryview) else list(body)


def body_bytes(body: Body) -> bytes:
    """Return ``body`` as one copy that nobody can change any more."""
    return b"".join(buffers_of(body))
