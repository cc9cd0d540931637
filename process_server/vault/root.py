"""``root``: the one object that is replaced; it names the newest of what is not, and is authenticated."""

import hmac
from typing import Annotated, Final

import msgspec
from blake3 import blake3

from farshore.errors import IntegrityError
from farshore.ids import ID_BYTES

ROOT: Final = "root"
FORMAT: Final = 1
ROOT_BYTES_MAX: Final = 16 * 1024 * 1024
_TAG_BYTES: Final = 32

_Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``root``.

    Attributes:
        vault: The vault's id.
        key_generation: Of the master key that new objects are sealed with.
        generation: Of garbage collection.
        control: Number of the newest ``control/`` object, 0 when there is none yet.
        control_digest: BLAKE3 of that object as stored.
        chains: Machines that have a chain.
    """

    format: int = FORMAT
    vault: _Id
    key_generation: Annotated[int, msgspec.Meta(ge=1, lt=2**32)]
    generation: _Count = 0
    control: _Count = 0
    control_digest: _Digest = bytes(32)
    chains: tuple[_Id, ...] = ()


class _Format(msgspec.Struct):
    format: int


def check_format(body: bytes | memoryview, where: str) -> None:
    """Look only at the key ``format`` of a MessagePack map. Raises IntegrityError: damaged, or newer."""
    try:
        found = msgspec.msgpack.decode(body, type=_Format).format
    except msgspec.MsgspecError as exc:
        raise IntegrityError("the object is damaged", where=where, why=str(exc)) from exc
    if found != FORMAT:
        raise newer_format(where, found)


def newer_format(where: str, found: int) -> IntegrityError:
    """Return the error for an object of a format we do not know."""
    return IntegrityError(
        "the object is of another format",
        where=where,
        why=f"format {found}, and this is made for {FORMAT}",
        fix="use a newer version of Farshore" if found > FORMAT else "",
    )


def encode_root(root: Root, root_key: bytes) -> bytes:
    """Return the object's bytes."""
    body = msgspec.msgpack.encode(root)
    return body + blake3(body, key=root_key).digest()


def decode_root(raw: bytes, root_key: bytes | None) -> Root:
    """Return the content of ``root``; without a key as claimed, to find out which key it takes.

    Raises:
        IntegrityError: Damaged, not made with this key, or of a newer format.
    """
    body, tag = raw[:-_TAG_BYTES], raw[-_TAG_BYTES:]
    if len(raw) > ROOT_BYTES_MAX:
        raise IntegrityError("the root is damaged", where=ROOT, why=f"{len(raw)} bytes")
    if root_key is not None and not hmac.compare_digest(tag, blake3(body, key=root_key).digest()):
        raise IntegrityError("the root is damaged", where=ROOT, why="it does not authenticate")
    check_format(body, ROOT)
    try:
        return msgspec.msgpack.decode(body, type=Root)
    except msgspec.MsgspecError as exc:
        raise IntegrityError("the root is damaged", where=ROOT, why=str(exc)) from exc
