"""Maps, each held against the commits that it repeats."""

from typing import Final

from farshore.errors import IntegrityError, NotFound
from process_server.recovery.check_chain import ChainWalk, Damage
from process_server.recovery.check_packs import reason
from process_server.recovery.points import ChainReader
from process_server.vault.changes import PackTable, Renumbering
from process_server.vault.map import MapReader, build_map, map_name, map_prefix

_COLUMNS: Final = ("offset", "length", "pack", "chunk", "start")


class MapsCheck:
    """Every map of a machine's volumes; with ``compare`` each against the commits that it repeats.

    Attributes:
        good: Volume to the numbers of its maps that recovery can use.
        wrong: Volume to those that it would use, and that say something else than the commits.
    """

    def __init__(self, chain: ChainReader, walk: ChainWalk, *, compare: bool) -> None:
        self._store, self._keys, self._chain = chain.store, chain.keys, chain
        self._walk, self._compare = walk, compare
        self.count = 0
        self.good: dict[bytes, list[int]] = {}
        self.wrong: dict[bytes, list[int]] = {}
        self.damage: list[Damage] = []

    def run(self) -> None:
        for volume in sorted(self._walk.volumes):
            self._volume(volume)

    def _volume(self, volume: bytes) -> None:
        machine = self._chain.machine
        prefix = map_prefix(machine, volume)
        tails = (name[len(prefix) :] for name in self._store.list(prefix))
        before: MapReader | None = None
        for seq in sorted(int(tail) for tail in tails if tail.isdigit()):
            self.count += 1
            name = map_name(machine, volume, seq)
            try:
                reader = MapReader.open(self._store, self._keys, machine, volume, seq)
            except (IntegrityError, NotFound) as exc:
                # Recovery passes it over for the map before: it costs time, not data.
                self.damage.append(Damage(name, reason(exc)))
                continue
            if self._is_of_another_history(reader):
                self.damage.append(Damage(name, "it was made after another commit than the one there"))
                continue  # passed over, too
            if why := self._why_wrong(volume, before, reader):
                self.damage.append(Damage(name, why))
                self.wrong.setdefault(volume, []).append(seq)
                continue
            self.good.setdefault(volume, []).append(seq)
            before = reader

    def _is_of_another_history(self, found: MapReader) -> bool:
        head = found.head
        if head.commit_header is None or head.seq in self._walk.unreadable or head.seq > self._chain.newest():
            return False
        return self._chain.change(head.seq).header_digest != head.commit_header

    def _why_wrong(self, volume: bytes, before: MapReader | None, found: MapReader) -> str:
        """Return what is wrong with a map that recovery would use; empty when nothing is."""
        newest = self._chain.newest()
        if found.head.seq > newest:
            return f"the chain ends at {newest}: it was rolled back"
        size = self._store.size(found.name)
        if size != found.bytes_total:
            return f"it has {size} bytes of {found.bytes_total}"
        if not self._compare:
            return ""
        try:
            for region in found.head.regions:
                found.region(region)
        except IntegrityError as exc:
            return reason(exc)
        if not self._repeats_damage(before, found.head.seq) and not self._same(volume, before, found):
            return "it says something else than the commits"
        return ""

    def _repeats_damage(self, before: MapReader | None, seq: int) -> bool:
        first = before.head.seq + 1 if before is not None else 1
        return any(first <= bad <= seq for bad in self._walk.unreadable)

    def _same(self, volume: bytes, before: MapReader | None, found: MapReader) -> bool:
        """Make the map once more and compare, whatever the order of its packs."""
        machine, seq = self._chain.machine, found.head.seq
        body = build_map(self._store, self._keys, machine, volume, seq, before)
        made = MapReader.parse(self._keys, machine, volume, seq, body)
        table = PackTable()
        ours, theirs = (Renumbering(reader.head.packs, table) for reader in (made, found))
        if (made.head.lsn, made.head.size_bytes) != (found.head.lsn, found.head.size_bytes):
            return False
        if made.head.regions != found.head.regions:
            return False
        for region in made.head.regions:
            one, two = made.region(region).copy(), found.region(region).copy()
            ours.apply(one)
            theirs.apply(two)
            if len(one) != len(two) or any((one[name] != two[name]).any() for name in _COLUMNS):
                return False
        return True
