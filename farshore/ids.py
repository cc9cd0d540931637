"""Identities: random 16-byte ids, and the names people give to machines and volumes."""

import re
import secrets
from typing import Final

ID_BYTES: Final = 16
"""128 random bits: two of 2**40 ids are equal with a chance below 2**-48, so nobody has to hand them out."""

NAME_CHARS_MAX: Final = 63
"""A name is also a DNS label, an NBD export name and a part of object keys; the DNS label is the shortest."""

# Lower case only: object stores tell case apart and some file systems do not. The first character is neither
# "." nor "-", so that a name is never a hidden file, a parent directory or an option.
_NAME: Final = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{NAME_CHARS_MAX - 1}}}")
_HEX: Final = re.compile(rf"[0-9a-f]{{{ID_BYTES * 2}}}")


def new_id() -> bytes:
    """Return a new random id for a machine, volume, incarnation, timeline or vault."""
    return secrets.token_bytes(ID_BYTES)


def id_to_hex(value: bytes) -> str:
    """Return the one text form of an id: 32 lower-case hexadecimal digits.

    Raises:
        ValueError: ``value`` is not 16 bytes.
    """
    if len(value) != ID_BYTES:
        raise ValueError(f"an id has {ID_BYTES} bytes, not {len(value)}")
    return value.hex()


def id_from_hex(text: str) -> bytes:
    """Return the id whose text form is ``text``; only the form that `id_to_hex` makes is accepted.

    Raises:
        ValueError: Not 32 lower-case hexadecimal digits.
    """
    if not _HEX.fullmatch(text):
        raise ValueError(f"{text[:64]!r} is not an id of {ID_BYTES * 2} lower-case hexadecimal digits")
    return bytes.fromhex(text)


def valid_name(text: str) -> bool:
    """Tell whether ``text`` may name a machine or a volume: 1 to 63 of ``a-z0-9._-``, first ``a-z0-9``."""
    return _NAME.fullmatch(text) is not None
