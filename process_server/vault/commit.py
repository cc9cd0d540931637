"""The commit: one object that makes a batch of records, up to a cut over all volumes, part of the vault."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from farshore.errors import IntegrityError, NotFound
from farshore.ids import ID_BYTES, id_to_hex
from farshore.units import MIB
from process_server.vault.keys import VaultKeys
from process_server.vault.pack import CHUNK_BYTES_MAX, PackReader
from process_server.vault.root import check_format
from process_server.vault.seal import SECTION_BYTES_MAX, Kind, SealedObject, seal
from process_server.vault.store.protocol import Buffer

FORMAT: Final = 1
COMMIT_BYTES_MAX: Final = 64 * MIB
SEQ_MAX: Final = 2**63 - 1
ZEROS: Final = 0xFFFFFFFF
"""In the column ``pack``: the row's bytes are zeros, and no chunk is behind it."""

ROW_DTYPE: Final = np.dtype(
    [
        ("offset", "<u8"),  # first byte in the volume
        ("length", "<u8"),  # bytes, more than 0
        ("lsn", "<u8"),  # of the record; 0 for copied data
        ("time_ns", "<u8"),  # agent's clock at capture; 0 for copied data
        ("pack", "<u4"),  # index into the commit's packs, or ZEROS
        ("chunk", "<u4"),  # index in the pack
        ("start", "<u4"),  # first byte inside the chunk
        ("zero", "<u4"),
    ]
)
"""A row of the extent table, 48 bytes."""

ROWS_MAX: Final = SECTION_BYTES_MAX // 48

Rows: TypeAlias = npt.NDArray[np.void]
"""An array of `ROW_DTYPE`."""

CommitKind: TypeAlias = Literal["data", "fence"]
Consistency: TypeAlias = Literal["crash", "app", "final", "fuzzy"]

NO_ROWS: Final[Rows] = np.empty(0, ROW_DTYPE)

_Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=SEQ_MAX)]
_Name = Annotated[str, msgspec.Meta(max_length=255)]


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """A branch of history, which left the timeline ``parent`` at commit ``parent_seq``; None in the first."""

    id: _Id
    parent: _Id | None = None
    parent_seq: _Number | None = None


class CommitVolume(msgspec.Struct, frozen=True, kw_only=True):
    """Where the cut passes through one volume.

    Attributes:
        id, name, size_bytes: The volume, as large as it is at the cut; rows end there at the latest.
        incarnation, ordinal, lsn, digest: Identity of the last record at or before the cut, and the journal's
            running digest there. Zeros before the first record.
        fuzzy: The volume's content at this cut is no state that the disk ever had.
        copied: Every extent has been compared or copied, in this commit or an earlier one.
        copy_end: Highest LSN captured at the end of any copied read so far; below it the cut is fuzzy.
        extents: How many rows of the extent table are this volume's; set by `encode_commit`.
    """

    id: _Id
    name: _Name
    size_bytes: _Number
    incarnation: _Id
    ordinal: _Number
    lsn: _Number
    digest: _Digest
    fuzzy: bool
    copied: bool
    copy_end: _Number
    extents: _Number = 0


class CommitPack(msgspec.Struct, frozen=True, kw_only=True):
    """A pack that rows point into; ``inline`` is the section of this commit that holds it, or None."""

    id: _Id
    inline: _Number | None = None


class CommitHead(msgspec.Struct, frozen=True, kw_only=True):
    """The head of a commit (docs/formats/vault.md, "Commit"); ``packs`` is set by `encode_commit`.

    Attributes:
        previous: BLAKE3 of the whole object before this one.
        previous_header: `header_digest` of it, for readers that do not read the whole; None in old commits.
    """

    format: int = FORMAT
    machine: _Id
    machine_name: _Name
    seq: Annotated[int, msgspec.Meta(ge=1, le=SEQ_MAX)]
    kind: CommitKind
    previous: _Digest
    previous_header: _Digest | None = None
    epoch: Annotated[int, msgspec.Meta(ge=1, le=SEQ_MAX)]
    timeline: Timeline
    writer: _Id
    nonce: _Id
    time_ns: _Number
    idle_since_ns: _Number | None = None
    cut_seq: _Number | None = None
    tag: Annotated[str, msgspec.Meta(max_length=1024)] | None = None
    consistency: Consistency = "fuzzy"
    generation: _Number = 0
    volumes: tuple[CommitVolume, ...] = ()
    packs: tuple[CommitPack, ...] = ()


class Commit:
    """A commit that was read and checked.

    Attributes:
        name: The object's name.
        head: Its head.
        digest: BLAKE3 of the whole object: what the next commit calls ``previous``.
        header_digest: What the next commit calls ``previous_header``.
        size_bytes: Of the whole object.
        rows: All rows, volume by volume in the order of ``head.volumes``; read-only.
    """

    __slots__ = ("_keys", "_sealed", "digest", "head", "header_digest", "name", "rows", "size_bytes")

    def __init__(
        self, keys: VaultKeys, sealed: SealedObject, head: CommitHead, rows: Rows, digest: bytes
    ) -> None:
        self.name, self.head, self.rows, self.digest = sealed.name, head, rows, digest
        self.size_bytes, self.header_digest = sealed.bytes_total, sealed.header_digest
        self._keys, self._sealed = keys, sealed

    def rows_of(self, volume_id: bytes) -> Rows:
        """Return the rows of one volume, in the order they apply; none when the commit does not list it."""
        at = 0
        for volume in self.head.volumes:
            if volume.id == volume_id:
                return self.rows[at : at + volume.extents]
            at += volume.extents
        return self.rows[:0]

    def volume(self, volume_id: bytes) -> CommitVolume | None:
        """Return the entry of one volume, None when the commit does not list it."""
        return next((volume for volume in self.head.volumes if volume.id == volume_id), None)

    @property
    def inline_ids(self) -> list[bytes]:
        """Ids of the packs that travel inside this commit."""
        return [pack.id for pack in self.head.packs if pack.inline is not None]

    def inline_pack(self, pack_id: bytes) -> bytes:
        """Return the bytes of a pack that travels inside. Raises NotFound, IntegrityError."""
        for pack in self.head.packs:
            if pack.id == pack_id and pack.inline is not None:
                return self._sealed.section(pack.inline)
        raise NotFound("no such pack in this commit", where=self.name, why=id_to_hex(pack_id))

    def inline_reader(self, cache_bytes: int = 8 * MIB) -> PackReader:
        """Return a reader of all packs inside. Raises IntegrityError."""
        packs = {pack_id: self.inline_pack(pack_id) for pack_id in self.inline_ids}
        return PackReader.from_inline(self._keys, packs, cache_bytes)


def commit_name(machine_id: bytes, seq: int) -> str:
    """Return the object name of a commit."""
    return f"c/{id_to_hex(machine_id)}/{seq:020}"


def point_id(machine_id: bytes, seq: int) -> str:
    """Return the recovery point's id of a commit of kind ``data``."""
    return f"rp-{machine_id[:4].hex()}-{seq}"


def encode_commit(
    keys: VaultKeys,
    head: CommitHead,
    rows_by_volume: Mapping[bytes, Rows],
    pack_ids: Sequence[bytes] = (),
    inline_packs: Mapping[bytes, Buffer] | None = None,
) -> bytes:
    """Return the sealed commit object.

    Args:
        keys: Of the vault.
        head: Everything but ``packs`` and the volumes' ``extents``, which are set here.
        rows_by_volume: Volume id to its rows: copied rows first, then records by LSN.
        pack_ids: The packs that the column ``pack`` indexes.
        inline_packs: Those of them that travel inside: pack id to the pack's bytes.

    Raises:
        ValueError: The rows break a rule that `decode_commit` checks, or the object would be too long.
    """
    inline = inline_packs or {}
    head = complete_head(head, rows_by_volume, pack_ids, inline)
    tables = [rows_by_volume.get(volume.id, NO_ROWS) for volume in head.volumes]
    rows = np.concatenate(tables) if tables else NO_ROWS
    if reason := _broken_rule(head, rows):
        raise ValueError(reason)
    body = seal(
        keys,
        Kind.COMMIT,
        commit_name(head.machine, head.seq),
        msgspec.msgpack.encode(head),
        [rows.tobytes(), *inline.values()],
        compress=[True] + [False] * len(inline),
    )
    if len(body) > COMMIT_BYTES_MAX:
        raise ValueError(f"a commit of {len(body)} bytes")
    return body


def complete_head(
    head: CommitHead,
    rows_by_volume: Mapping[bytes, Rows],
    pack_ids: Sequence[bytes] = (),
    inline_packs: Mapping[bytes, Buffer] | None = None,
) -> CommitHead:
    """Return ``head`` with ``packs`` and the volumes' ``extents`` set, as `encode_commit` writes it.

    Raises:
        ValueError: Rows of a volume that is not in the head, or an inline pack that is not in ``pack_ids``.
    """
    inline = inline_packs or {}
    if unknown := inline.keys() - set(pack_ids):
        raise ValueError(f"{len(unknown)} inline packs that are not in the table")
    if unknown := rows_by_volume.keys() - {volume.id for volume in head.volumes}:
        raise ValueError(f"rows of {len(unknown)} volumes that are not in the head")
    sections = {pack_id: number for number, pack_id in enumerate(inline, start=2)}
    return msgspec.structs.replace(
        head,
        volumes=tuple(
            msgspec.structs.replace(volume, extents=len(rows_by_volume.get(volume.id, NO_ROWS)))
            for volume in head.volumes
        ),
        packs=tuple(CommitPack(id=pack_id, inline=sections.get(pack_id)) for pack_id in pack_ids),
    )


def decode_commit(keys: VaultKeys, name: str, body: bytes) -> Commit:
    """Return the commit in ``body``, stored under ``name``.

    Raises:
        WrongKey: Sealed for another vault.
        IntegrityError: Damaged, of a newer format, or its content breaks a rule of the format.
    """
    if len(body) > COMMIT_BYTES_MAX:
        raise _broken(name, f"{len(body)} bytes")
    sealed = SealedObject.parse(keys, Kind.COMMIT, name, body)
    check_format(sealed.head, name)
    try:
        head = msgspec.msgpack.decode(sealed.head, type=CommitHead)
    except msgspec.MsgspecError as exc:
        raise _broken(name, str(exc)) from exc
    if commit_name(head.machine, head.seq) != name:
        raise _broken(name, "it belongs to another place in a chain")
    table = sealed.section(1)
    if len(table) % ROW_DTYPE.itemsize:
        raise _broken(name, f"an extent table of {len(table)} bytes")
    rows = np.frombuffer(table, ROW_DTYPE)
    inline = sorted(pack.inline for pack in head.packs if pack.inline is not None)
    if inline != list(range(2, len(sealed) + 1)):
        raise _broken(name, "its inline packs and its sections differ")
    if reason := _broken_rule(head, rows):
        raise _broken(name, reason)
    return Commit(keys, sealed, head, rows, blake3(body).digest())


def _broken_rule(head: CommitHead, rows: Rows) -> str:
    """Return which rule of the format does not hold, "" when all do."""
    if len({volume.id for volume in head.volumes}) != len(head.volumes):
        return "a volume is listed twice"
    if len({pack.id for pack in head.packs}) != len(head.packs):
        return "a pack is listed twice"
    if sum(volume.extents for volume in head.volumes) != len(rows):
        return f"its volumes claim another count of rows than {len(rows)}"
    if len(rows) > ROWS_MAX:
        return f"{len(rows)} rows"
    if head.kind == "fence" and (len(rows) or head.cut_seq is not None or head.tag is not None):
        return "a fence with content"
    if head.kind == "data" and head.cut_seq is None:
        return "a commit of data without a cut"
    zeros = rows["pack"] == ZEROS
    if (rows["pack"][~zeros] >= len(head.packs)).any():
        return "a row points to a pack that is not in the table"
    if rows["zero"].any() or rows["chunk"][zeros].any() or rows["start"][zeros].any():
        return "a field that must be zero is not"
    if (rows["length"] == 0).any():
        return "an empty row"
    # Each first against its bound alone, so that no sum can wrap around.
    pieces = rows[~zeros]
    if ((pieces["length"] > CHUNK_BYTES_MAX) | (pieces["start"] >= CHUNK_BYTES_MAX)).any() or (
        pieces["start"] + pieces["length"] > CHUNK_BYTES_MAX
    ).any():
        return "a row reaches past the longest chunk"
    at = 0
    for volume in head.volumes:
        own = rows[at : at + volume.extents]
        at += volume.extents
        if (own["length"] > volume.size_bytes).any() or (
            own["offset"] > volume.size_bytes - own["length"]
        ).any():
            return f"a row lies outside of volume {volume.name}"
        # Copied rows have LSN 0, so "copied first, then by LSN" is one order.
        if (own["lsn"][1:] < own["lsn"][:-1]).any() or (own["lsn"] > volume.lsn).any():
            return f"the rows of volume {volume.name} are not in order"
    return ""


def _broken(name: str, why: str) -> IntegrityError:
    return IntegrityError("cannot read the commit", where=name, why=why)
