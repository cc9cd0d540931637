"""The payload of a MARK record: one cut over all volumes of a machine (``docs/formats/hrl.md``)."""

import msgspec

from farshore.errors import CorruptRecord


class CutVolume(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a cut passes through one volume.

    Attributes:
        volume: Volume id, 16 bytes.
        incarnation: Incarnation that ``lsn`` belongs to, 16 bytes.
        lsn: Last LSN of the volume inside the cut.
        fuzzy: The volume was below data mode, or regions of its dirty map were set.
    """

    volume: bytes
    incarnation: bytes
    lsn: int
    fuzzy: bool


class Cut(msgspec.Struct, frozen=True, array_like=True):
    """One look at the LSN counters of all volumes of a machine, between two requests.

    Attributes:
        seq: Grows with each cut of a machine, never goes back.
        time_ns: When it was taken, by the agent's clock; informative only.
        tag: Text that a user gave the point, or None.
        volumes: One entry per protected volume.
    """

    seq: int
    time_ns: int
    tag: str | None
    volumes: tuple[CutVolume, ...]


_decoder = msgspec.msgpack.Decoder(Cut)
_encoder = msgspec.msgpack.Encoder()


def encode_cut(cut: Cut) -> bytes:
    return _encoder.encode(cut)


def decode_cut(payload: bytes | memoryview) -> Cut:
    """Raises CorruptRecord when ``payload`` is not a cut."""
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as exc:
        raise CorruptRecord(0, f"a mark that is no cut: {exc}") from exc
