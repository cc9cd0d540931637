"""Which recovery points a machine has, and which of them is meant.

A point is a commit: every commit ends at one cut over all volumes. Nothing but the vault is asked, so this
answers on an empty host as it does beside a running server.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from farshore.clock import format_time
from farshore.errors import Conflict, IntegrityError, NotFound, UsageError
from farshore.ids import id_to_hex
from process_server.vault.changes import Change, read_change, read_changes
from process_server.vault.commit import CommitHead, CommitVolume, commit_name, point_id
from process_server.vault.keys import VaultKeys
from process_server.vault.root import ROOT, decode_root
from process_server.vault.store import Store

FUZZY: Final = "fuzzy"
_KEPT_CHANGES: Final = 64
_POINT: Final = re.compile(r"rp-([0-9a-f]{8})-([0-9]{1,19})")
_LSN: Final = re.compile(r"lsn:([0-9]{1,19})")
_HEX_ID: Final = re.compile(r"[0-9a-f]{32}")
# fromisoformat also takes dates alone, weeks and times without a zone; a point in time has all its parts.
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?"
    r"(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_WHY_FUZZY: Final = (
    "a first copy or a compare was not finished, a volume stayed behind while the others went on, or the disk"
    " was scanned while others could write: it never was in that state"
)
FORMS: Final = "latest, an id rp-…, a time with zone such as 2026-11-21T06:10:08Z, or lsn:N with --volume"


class ChainReader:
    """The commits of one machine, read one by one as needed. Not thread-safe.

    Attributes:
        machine: The machine's id.
    """

    def __init__(self, store: Store, keys: VaultKeys, machine: bytes) -> None:
        self.store, self.keys, self.machine = store, keys, machine
        self._changes: dict[int, Change] = {}
        self._newest: int | None = None
        self._oldest = 1

    def change(self, seq: int) -> Change:
        """Return what commit ``seq`` did. Raises NotFound, WrongKey, IntegrityError."""
        found = self._changes.get(seq)
        if found is None:
            found = read_change(self.store, self.keys, self.machine, seq)
            while len(self._changes) >= _KEPT_CHANGES:
                del self._changes[next(iter(self._changes))]
            self._changes[seq] = found
        return found

    def head(self, seq: int) -> CommitHead:
        """Return the head of commit ``seq``. Raises NotFound, WrongKey, IntegrityError."""
        return self.change(seq).head

    def newest(self) -> int:
        """Return the number of the newest commit, 0 when there is none; looked up once.

        A listing may lack what is new, so names are asked for from there on. Asking alone, by doubling steps,
        would be quicker, but take a commit that was lost for the end of the chain.
        """
        if self._newest is None:
            self._look()
        assert self._newest is not None
        return self._newest

    def oldest(self) -> int:
        """Return the number of the oldest commit that is kept; 1 when none was retired."""
        if self._newest is None:
            self._look()
        return self._oldest

    def _look(self) -> None:
        prefix = f"c/{id_to_hex(self.machine)}/"
        tails = (name[len(prefix) :] for name in self.store.list(prefix))
        seqs = [int(tail) for tail in tails if len(tail) == 20 and tail.isdigit()]
        newest = max(seqs, default=0)
        while self._exists(newest + 1):
            newest += 1
        self._newest, self._oldest = newest, min(seqs, default=1)

    def _exists(self, seq: int) -> bool:
        try:
            self.store.size(commit_name(self.machine, seq))
        except NotFound:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Point:
    """A recovery point: what `as_dict` shows is a contract (DESIGN, section 11)."""

    machine: bytes
    head: CommitHead

    @property
    def id(self) -> str:
        return point_id(self.machine, self.head.seq)

    @property
    def seq(self) -> int:
        return self.head.seq

    @property
    def is_fuzzy(self) -> bool:
        return self.head.consistency == FUZZY

    def is_fuzzy_for(self, name: str | None) -> bool:
        """Tell whether a volume's content here is a state that it never had; None: that of all of them."""
        if name is None:
            return self.is_fuzzy
        entry = next((volume for volume in self.head.volumes if volume.name == name), None)
        return entry.fuzzy if entry is not None else self.is_fuzzy

    def volume(self, name: str) -> CommitVolume:
        """Return the entry of a volume by its name. Raises NotFound."""
        return volume_of(self.head, name)

    def as_dict(self) -> dict[str, object]:
        """Return the point as ``point list`` prints it."""
        return {
            "id": self.id,
            "time": format_time(self.head.time_ns),
            "consistency": self.head.consistency,
            "tag": self.head.tag,
            "timeline": id_to_hex(self.head.timeline.id),
            "volumes": {
                volume.name: {"lsn": volume.lsn, "size_bytes": volume.size_bytes}
                for volume in self.head.volumes
            },
        }


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a recovery stops.

    Attributes:
        point: The commit that is applied last.
        lsn: Only records up to this LSN are taken from that commit; None for all of it.
        is_fuzzy: The state is none that the disk ever had.
    """

    point: Point
    lsn: int | None
    is_fuzzy: bool

    @property
    def label(self) -> str:
        """Return what a result calls it: the point's id, or the LSN when the cut is within a commit."""
        return self.point.id if self.lsn is None else f"lsn:{self.lsn}"


def find_machine(store: Store, keys: VaultKeys, name: str) -> ChainReader:
    """Return the chain of the machine called ``name``, or whose id it is in hexadecimal.

    Raises:
        NotFound: There is none, or several machines have that name.
        WrongKey, IntegrityError: An object on the way is not ours or damaged.
    """
    chains = {id: ChainReader(store, keys, id) for id in decode_root(store.get(ROOT), keys.root_key).chains}
    if _HEX_ID.fullmatch(name):
        chain = chains.get(bytes.fromhex(name)) or ChainReader(store, keys, bytes.fromhex(name))
        if chain.newest():
            return chain
    names = {id: chain.head(seq).machine_name for id, chain in chains.items() if (seq := chain.newest())}
    if name not in names.values():
        # The root is written after the first commit of a chain; a crash between the two leaves it out.
        for id in _machines_with_commits(store) - set(chains):
            chain = chains[id] = ChainReader(store, keys, id)
            names[id] = chain.head(chain.newest()).machine_name
    fitting = [id for id, found in names.items() if found == name]
    if len(fitting) == 1:
        return chains[fitting[0]]
    if fitting:
        ids = ", ".join(sorted(id_to_hex(id) for id in fitting))
        raise NotFound("several machines have this name", where=name, why=ids, fix="name one by its id")
    known = ", ".join(sorted(set(names.values()))) or "none"
    raise NotFound("no such machine in the vault", where=name, why=f"it has: {known}")


def machines_in(store: Store, keys: VaultKeys) -> list[bytes]:
    """Return the ids of all machines that have, or may begin, a chain. Raises as `find_machine`."""
    return sorted({*decode_root(store.get(ROOT), keys.root_key).chains, *_machines_with_commits(store)})


def _machines_with_commits(store: Store) -> set[bytes]:
    parts = {name.split("/")[1] for name in store.list("c/")}
    return {bytes.fromhex(part) for part in parts if _HEX_ID.fullmatch(part)}


def list_points(chain: ChainReader) -> Iterator[Point]:
    """Yield every point of a machine, oldest first.

    Raises:
        IntegrityError: A commit in between is missing, damaged, or not the successor of the one before.
    """
    try:
        for change in read_changes(chain.store, chain.keys, chain.machine, chain.oldest(), chain.newest()):
            if change.head.kind == "data":
                yield Point(chain.machine, change.head)
    except NotFound as exc:
        raise missing(exc.where) from exc


def resolve(chain: ChainReader, wanted: str, *, volume: str | None, allow_fuzzy: bool, now_ns: int) -> Cut:
    """Return what ``wanted`` means for a machine.

    Args:
        wanted: ``latest``, an id, a time or ``lsn:N``.
        volume: The volume asked for; ``lsn:N`` needs it. Then only that volume must not be fuzzy.
        allow_fuzzy: Take a state that the disk never had, too.
        now_ns: The time; a later one cannot be asked for.

    Raises:
        UsageError: None of the forms, a time that is not yet, or ``lsn:N`` without a volume.
        NotFound: There is no such point, or no such volume.
        Conflict: There is only a fuzzy one.
    """
    newest = chain.newest()
    if newest == 0:
        raise NotFound("the machine has no recovery point", where=id_to_hex(chain.machine))
    if wanted == "latest":
        return _newest_offerable(chain, newest, allow_fuzzy, wanted, volume)
    if match := _LSN.fullmatch(wanted):
        if volume is None:
            raise UsageError("lsn:N needs --volume", why="each volume counts its own records")
        return _at_lsn(chain, int(match[1]), volume, allow_fuzzy)
    if match := _POINT.fullmatch(wanted):
        return _by_id(chain, wanted, match[1], int(match[2]), allow_fuzzy, volume)
    if _TIME.fullmatch(wanted):
        return _at_time(chain, wanted, allow_fuzzy, now_ns, volume)
    raise UsageError("not a recovery point", where=repr(wanted[:80]), fix=f"write {FORMS}")


def volume_of(head: CommitHead, name: str) -> CommitVolume:
    """Return the entry of a volume by its name. Raises NotFound."""
    for volume in head.volumes:
        if volume.name == name:
            return volume
    known = ", ".join(sorted(volume.name for volume in head.volumes)) or "none"
    raise NotFound("no such volume at this point", where=name, why=f"there are: {known}")


def missing(name: str) -> IntegrityError:
    """Return the error for a commit, by its object's name, that has to be there."""
    return IntegrityError(
        "a commit is missing",
        where=name,
        why="later ones exist",
        fix="`farshore vault check` names the points that are affected",
    )


def _newest_offerable(
    chain: ChainReader, seq: int, allow_fuzzy: bool, wanted: str, volume: str | None
) -> Cut:
    """Return the newest point at or below ``seq`` that may be offered, for all volumes or for one."""
    oldest, seen_fuzzy = chain.oldest(), False
    while seq >= oldest:
        head = chain.head(seq)
        if head.kind == "data":
            point = Point(chain.machine, head)
            is_fuzzy = point.is_fuzzy_for(volume)
            if allow_fuzzy or not is_fuzzy:
                return Cut(point, None, is_fuzzy)
            seen_fuzzy = True
        seq -= 1
    if seen_fuzzy:
        raise Conflict(
            "there is only a fuzzy recovery point",
            where=wanted,
            why=_WHY_FUZZY,
            fix="choose a later point, one volume with --volume, or say --allow-fuzzy",
        )
    raise NotFound("no recovery point", where=wanted)


def _by_id(
    chain: ChainReader, wanted: str, prefix: str, seq: int, allow_fuzzy: bool, volume: str | None
) -> Cut:
    if prefix != chain.machine[:4].hex() or not chain.oldest() <= seq <= chain.newest():
        raise NotFound(
            "no such recovery point", where=wanted, fix="`farshore point list` shows those there are"
        )
    try:
        head = chain.head(seq)
    except NotFound as exc:
        raise missing(commit_name(chain.machine, seq)) from exc
    if head.kind != "data":
        raise NotFound("no such recovery point", where=wanted, why="that commit is a change of owner")
    point = Point(chain.machine, head)
    is_fuzzy = point.is_fuzzy_for(volume)
    if is_fuzzy and not allow_fuzzy:
        raise _is_fuzzy(wanted)
    return Cut(point, None, is_fuzzy)


def _at_time(chain: ChainReader, wanted: str, allow_fuzzy: bool, now_ns: int, volume: str | None) -> Cut:
    limit = parse_time(wanted)
    # What the vault has already seen is not the future, however slow this host's own clock is.
    if limit > max(now_ns, chain.head(chain.newest()).time_ns):
        raise UsageError("this time is not yet", where=wanted, fix="say latest for the newest point")
    # Halving needs times that never go back; where the server's clock did, a state not after the limit is
    # still what comes out, if perhaps not the very newest one.
    low, high = chain.oldest() - 1, chain.newest() + 1
    while high - low > 1:
        middle = (low + high) // 2
        if chain.head(middle).time_ns <= limit:
            low = middle
        else:
            high = middle
    return _newest_offerable(chain, low, allow_fuzzy, wanted, volume)


def _at_lsn(chain: ChainReader, lsn: int, name: str, allow_fuzzy: bool) -> Cut:
    newest = chain.newest()
    volume = volume_of(chain.head(newest), name)

    def lsn_at(seq: int) -> int:
        found = next((entry for entry in chain.head(seq).volumes if entry.id == volume.id), None)
        return found.lsn if found is not None else -1

    oldest = chain.oldest()
    if lsn > volume.lsn or (oldest > 1 and lsn < lsn_at(oldest)):
        raise NotFound(
            "no such LSN in the vault",
            where=f"{name} lsn:{lsn}",
            why=f"it has {max(0, lsn_at(oldest) if oldest > 1 else 0)} to {volume.lsn}",
        )
    low, high = oldest - 1, newest + 1  # the last commit whose cut is at or below the LSN
    while high - low > 1:
        middle = (low + high) // 2
        if lsn_at(middle) <= lsn:
            low = middle
        else:
            high = middle
    exact = low >= oldest and lsn_at(low) == lsn
    if exact and not allow_fuzzy:
        low = _newest_exact(chain, low, volume.id, lsn)
    seq = low if exact else high
    head = chain.head(seq)
    entry = volume_of(head, name)
    # Inside a commit that carries copied extents: a copy read at a later LSN is in it.
    is_fuzzy = entry.fuzzy or lsn < entry.copy_end
    if is_fuzzy and not allow_fuzzy:
        raise _is_fuzzy(f"{name} lsn:{lsn}")
    return Cut(Point(chain.machine, head), None if exact else lsn, is_fuzzy)


def _newest_exact(chain: ChainReader, seq: int, volume: bytes, lsn: int) -> int:
    """Of the commits up to ``seq`` that end at ``lsn``, return the newest where the volume is not fuzzy.

    Several end there when nothing was written to it, or when it is scanned, which has one LSN for a pass from
    its beginning until the next. When all are fuzzy it is ``seq``.
    """
    at = seq
    while at >= chain.oldest():
        entry = next((entry for entry in chain.head(at).volumes if entry.id == volume), None)
        if entry is None or entry.lsn != lsn:
            break
        if not entry.fuzzy and lsn >= entry.copy_end and chain.head(at).kind == "data":
            return at
        at -= 1
    return seq


def _is_fuzzy(where: str) -> Conflict:
    return Conflict(
        "the point is fuzzy",
        where=where,
        why=_WHY_FUZZY,
        fix="choose another point, one volume with --volume, or say --allow-fuzzy",
    )


def parse_time(text: str) -> int:
    """Return the nanoseconds since 1970 that an RFC 3339 time with zone means.

    Raises:
        UsageError: It is none.
    """
    whole, dot, rest = text.upper().partition(".")
    digits = re.match(r"[0-9]*", rest)
    fraction = digits[0] if digits else ""
    try:
        moment = datetime.fromisoformat((whole + rest[len(fraction) :] if dot else whole).replace(" ", "T"))
    except ValueError as exc:
        raise UsageError("not a time", where=repr(text[:80]), why=str(exc), fix=f"write {FORMS}") from exc
    if moment.tzinfo is None:
        raise UsageError("a time needs its zone", where=repr(text[:80]), fix=f"write {FORMS}")
    return int(moment.timestamp()) * 1_000_000_000 + int(fraction.ljust(9, "0") or 0)
