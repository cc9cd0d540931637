"""The messages of ``hrl/1``: what each frame's MessagePack part holds (``docs/formats/wire.md``).

Structs travel as arrays: a field added at the end is ignored by an older reader, defaulted by a newer one.
Ids are 16 bytes, digests and hashes 32, times nanoseconds since 1970, LSNs and lengths plain integers.
"""

from typing import Final

import msgspec

PROTOCOL: Final = 1

VolumeId = bytes


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages."""


# --- identity: the only frames of a connection without a client certificate ---


class Enrol(Message, frozen=True):
    """Agent: spend a token. ``csr`` is PEM; the key never leaves the agent."""

    protocol: int
    token_id: bytes
    secret: bytes
    machine: str
    csr: bytes


class Renew(Message, frozen=True):
    """Agent: a new certificate for a key that is on record; ``csr`` proves that it holds the key."""

    protocol: int
    machine_id: bytes
    csr: bytes


class Enrolled(Message, frozen=True):
    """Server: the answer to both. ``certificate`` and ``ca`` are PEM."""

    machine_id: bytes
    vault_id: bytes
    certificate: bytes
    ca: bytes


# --- session ---


class VolumeHello(Message, frozen=True):
    """A volume as the agent has it; ``state`` and ``capture_mode`` as ``volume list`` prints them.

    ``capture_mode`` is ``data``, ``bitmap``, or ``scan``: nobody watches, all of it is compared now and then.

    Attributes:
        problem: Why it is ``failed``, for people; empty where nothing is known.
    """

    id: VolumeId
    name: str
    size_bytes: int
    sector_bytes: int
    state: str
    capture_mode: str
    problem: str = ""


class Hello(Message, frozen=True):
    """Agent, first frame of a control connection.

    Attributes:
        volumes: Those that can be introduced now.
        protected: Ids of all that the machine protects. What the vault has beyond them was unprotected, while
            nobody listened; what is here and not among ``volumes`` is still to come. None: an agent from
            before this field, of which neither is known.
    """

    protocol: int
    machine_id: bytes
    machine: str
    agent_version: str
    epoch_seen: int
    volumes: tuple[VolumeHello, ...]
    protected: tuple[VolumeId, ...] | None = None


class VolumePosition(Message, frozen=True):
    """Server: where the vault stands with one volume.

    Attributes:
        incarnation, lsn, digest: Identity of the last vaulted record; zeros and 0 when nothing is vaulted.
        ordinal: Ordinal of that incarnation.
        copied: The vault holds all of the volume (a first copy or resync is complete).
        copy_end: Highest LSN captured at the end of any copied read so far.
        empty: No chunk of this machine is in the vault: OFFER would be a waste.
    """

    id: VolumeId
    incarnation: bytes
    ordinal: int
    lsn: int
    digest: bytes
    copied: bool
    copy_end: int
    empty: bool


class Policy(Message, frozen=True):
    """Server: what the agent keeps to.

    Attributes:
        copy_level: zstd level that copied blocks are compressed with before they are sent; None: not at all.
    """

    point_interval_s: float
    chunk_bytes: int
    copy_connections: int
    credit_bytes: int
    copy_level: int | None = None


class Welcome(Message, frozen=True):
    """Server: the answer to HELLO; only now is the agent connected."""

    protocol: int
    session: bytes
    vault_id: bytes
    epoch: int
    head_seq: int
    policy: Policy
    volumes: tuple[VolumePosition, ...]


class Attach(Message, frozen=True):
    """Agent, first frame of a data connection: joins the session of its machine."""

    session: bytes


class Attached(Message, frozen=True):
    channel: int


class VolumeAdd(Message, frozen=True):
    """Agent: a volume was protected, or its name, size or state changed, while connected."""

    volume: VolumeHello


class VolumeAdded(Message, frozen=True):
    position: VolumePosition


class VolumeRemove(Message, frozen=True):
    """Agent: the volume is no longer protected; later commits do not list it."""

    id: VolumeId


# --- stream ---


class IncarnationStart(Message, frozen=True):
    """Agent: the records that follow belong to this incarnation.

    With ``resync`` false the previous fields must name exactly the last record the server has; true says that
    continuity is broken: points are fuzzy until every extent was compared (``VolumeMark.copied``).
    """

    volume: VolumeId
    id: bytes
    ordinal: int
    previous: bytes
    previous_lsn: int
    previous_digest: bytes
    first_lsn: int
    resync: bool


class Data(Message, frozen=True):
    """Agent: whole batches of one volume, as they lie in its journal; the frame's raw part holds them."""

    volume: VolumeId
    first_lsn: int
    last_lsn: int


class CopyChunk(Message, frozen=True):
    """One block of a copied extent.

    Attributes:
        kind: ``DATA`` (bytes in the raw part, in order), ``REFERENCE`` (the server said HAVE), ``ZEROS``,
            ``ZSTD`` (one zstd frame in the raw part), ``DENSE`` (as DATA, and zstd makes it no smaller).
        hash: BLAKE3 of the plaintext; empty for ZEROS.
        frame_bytes: Length of the zstd frame; 0 for the other kinds.
    """

    offset: int
    length: int
    kind: int
    hash: bytes
    frame_bytes: int = 0


COPY_DATA: Final = 0
COPY_REFERENCE: Final = 1
COPY_ZEROS: Final = 2
COPY_ZSTD: Final = 3
COPY_DENSE: Final = 4


class Copy(Message, frozen=True):
    """Agent: an extent of the disk, read when ``applied_lsn`` was applied. ``token``: unique in a session."""

    token: int
    volume: VolumeId
    applied_lsn: int
    chunks: tuple[CopyChunk, ...]


class Accepted(Message, frozen=True):
    """Server: the blocks of a COPY are verified and will be durable before any commit that names its token.

    ``missing`` are indexes of REFERENCE blocks that are not there after all; when there are any the token was
    dropped: send the extent again as DATA under a new one.
    """

    token: int
    missing: tuple[int, ...]


class OfferChunk(Message, frozen=True):
    offset: int
    length: int
    hash: bytes


class Offer(Message, frozen=True):
    """Agent: hashes of an extent, to learn what need not be sent. ``hash`` empty means zeros."""

    token: int
    volume: VolumeId
    chunks: tuple[OfferChunk, ...]


HAVE_NEED: Final = 0
HAVE_CHUNK: Final = 1
HAVE_SAME: Final = 2


class Have(Message, frozen=True):
    """Server: one byte per offered block: NEED, CHUNK (a REFERENCE will do), SAME (nothing to send: the
    vault's newest state of the volume has exactly this block there)."""

    token: int
    answers: bytes


class CopyInCut(Message, frozen=True):
    """A COPY that this cut takes into the stream.

    ``cut_outs``: (offset, length) pairs left out because records in (applied LSN, previous cut] touch them.
    """

    token: int
    cut_outs: tuple[tuple[int, int], ...]


class VolumeMark(Message, frozen=True):
    """Where a cut passes through one volume, and what copied data goes with it.

    Attributes:
        fuzzy: The volume was below data mode, its dirty map not empty, or resync-required.
        copied: Every extent has been compared or copied, all of it in this or an earlier cut.
        copy_end: Highest LSN captured at the end of any copied read up to this cut.
        healed: Dirty regions that this cut's copies heal are cleared by the agent once it is vaulted.
    """

    volume: VolumeId
    incarnation: bytes
    lsn: int
    fuzzy: bool
    copied: bool
    copy_end: int
    copies: tuple[CopyInCut, ...]


class Mark(Message, frozen=True):
    """Agent: a cut over all volumes. Every record up to it was sent, every token in it was ACCEPTED."""

    cut_seq: int
    time_ns: int
    tag: str | None
    volumes: tuple[VolumeMark, ...]


class Vaulted(Message, frozen=True):
    id: VolumeId
    incarnation: bytes
    lsn: int
    digest: bytes


class Ack(Message, frozen=True):
    """Server: a level was reached for the cut ``cut_seq``. ``level`` is ``received`` or ``vaulted``."""

    level: str
    cut_seq: int
    seq: int
    point: str
    consistency: str
    volumes: tuple[Vaulted, ...]


class Credit(Message, frozen=True):
    """Server: the agent may send this many more bytes of raw parts on this connection."""

    bytes: int


class Command(Message, frozen=True):
    """Server: asks the agent for something; ``verb`` is ``point``, ``resync``, ``pause``, ``resume``."""

    id: int
    verb: str
    volume: str | None = None
    tag: str | None = None


class Result(Message, frozen=True):
    """Agent: the outcome of a command; for ``point`` ``cut_seq`` is the cut that carries the tag."""

    id: int
    ok: bool
    text: str = ""
    cut_seq: int = 0


class Ping(Message, frozen=True):
    id: int


class VolumeStatus(Message, frozen=True):
    """The tap's counters when a PING was answered.

    A volume in capture mode ``scan`` has no records; its LSN is the number of the newest pass that has begun.

    Attributes:
        next_pass: With ``scan``: the LSN of the pass that begins next. What is on the disk now is in the
            vault when that pass is, or a later one; what is vaulted below says nothing of now. 0: not known.
        cycle_s: With ``scan``: from the beginning of one pass to that of the next.
    """

    id: VolumeId
    incarnation: bytes
    captured_lsn: int
    durable_lsn: int
    backlog_bytes: int
    capture_mode: str
    state: str
    next_pass: int = 0
    cycle_s: float = 0.0


class Pong(Message, frozen=True):
    id: int
    volumes: tuple[VolumeStatus, ...]


class Error(Message, frozen=True):
    """Either side: the connection ends, or with ``volume`` only that volume stops.

    ``code``: protocol, auth, denied, superseded, gap, conflict, bounds, corrupt, capacity, internal, retry.
    """

    code: str
    text: str
    volume: VolumeId | None = None


class Bye(Message, frozen=True):
    """Either side: nothing follows; the peer may close."""

    reason: str = ""
