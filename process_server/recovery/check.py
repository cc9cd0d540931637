"""Is everything in the vault that its recovery points need, and is it sound? (``farshore vault check``)

Reads only. A server may go on writing meanwhile: whatever an object names was there, whole, before it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from process_server.recovery.check_chain import CACHE_BYTES, ChainWalk, Damage, Receipt
from process_server.recovery.check_maps import MapsCheck
from process_server.recovery.check_packs import Ends, PackState, look_at_pack, look_in_threads
from process_server.recovery.damage import Affected, affected_points
from process_server.recovery.points import ChainReader, machines_in
from process_server.vault.changes import PackRef
from process_server.vault.control import ControlStore
from process_server.vault.keys import VaultKeys
from process_server.vault.pack import PackReader, pack_name
from process_server.vault.store import Store


@dataclass(slots=True)
class Findings:
    """What was looked at and what was found.

    Attributes:
        packs: Standing packs that some row points into.
        packs_read: Those of them of which every byte was read.
        read_bytes: Stored bytes of these.
        affected: Points that cannot be recovered whole, of the volumes named; all others can.
    """

    machines: int = 0
    commits: int = 0
    maps: int = 0
    packs: int = 0
    packs_read: int = 0
    read_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    affected: list[Affected] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """As ``vault check --json`` prints it."""
        return {
            "ok": not self.damage,
            "machines": self.machines,
            "commits": self.commits,
            "maps": self.maps,
            "packs": self.packs,
            "packs_read": self.packs_read,
            "read_bytes": self.read_bytes,
            "damage": [{"object": each.object, "why": each.why} for each in self.damage],
            "affected": [each.as_dict() for each in self.affected],
        }


class VaultCheck:
    """One check of a vault.

    Args:
        read_share: Of the packs, so many are read whole, chosen at random: 0 none, 1 all. Of the others the
            index is authenticated and the length is looked at.
        receipts: Ends of chains that must still be there.
        progress: Told how many packs are done and how many there are.

    Memory: four bytes a chunk that one machine's chain points into, beside its newest rows.
    """

    def __init__(
        self,
        store: Store,
        keys: VaultKeys,
        *,
        read_share: float = 0.0,
        receipts: Sequence[Receipt] = (),
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._store, self._keys = store, keys
        self._read_share, self._receipts, self._progress = read_share, receipts, progress
        self._random = random.SystemRandom()
        self._seen_packs: dict[bytes, PackState] = {}
        self.findings = Findings()

    def run(self) -> Findings:
        """Look at everything.

        Raises:
            WrongKey, IntegrityError: The root or the settings are damaged; nothing below can be found.
            Unreachable: The store did not answer.
        """
        ControlStore(self._store, self._keys).load()
        receipts = {receipt.machine: receipt for receipt in self._receipts}
        for machine in sorted({*machines_in(self._store, self._keys), *receipts}):
            chain = ChainReader(self._store, self._keys, machine)
            if not chain.newest() and machine not in receipts:
                continue  # enrolled, and nothing replicated yet
            self.findings.machines += 1
            self._machine(chain, receipts.get(machine))
        return self.findings

    def _machine(self, chain: ChainReader, receipt: Receipt | None) -> None:
        walk = ChainWalk(chain, read=self._read_share > 0)
        walk.run(receipt)
        self.findings.commits += walk.commits
        self._packs(walk)
        maps = MapsCheck(chain, walk, compare=self._read_share > 0)
        maps.run()
        self.findings.maps += maps.count
        self.findings.damage += [*walk.damage, *maps.damage]
        if walk.damage or maps.damage or walk.bad:
            self.findings.affected += affected_points(chain, walk.unreadable, walk.bad, maps.good, maps.wrong)

    def _packs(self, walk: ChainWalk) -> None:
        """Look at the standing packs of a chain; what several machines share is read once."""
        done, total = 0, len(walk.needed)
        for pack, ends in walk.needed.items():
            if pack in self._seen_packs:
                done += 1
                self._found(pack, self._seen_packs[pack], ends, walk)
        fresh = [(pack, ends) for pack, ends in walk.needed.items() if pack not in self._seen_packs]
        reader = PackReader(self._store, self._keys, CACHE_BYTES)

        def look(pack: bytes) -> PackState:
            return look_at_pack(self._store, reader, pack, read=self._random.random() < self._read_share)

        for (pack, ends), state in look_in_threads(fresh, look):
            self._seen_packs[pack] = state
            self.findings.packs += 1
            self.findings.packs_read += state.read
            self.findings.read_bytes += state.bytes_total if state.read else 0
            if state.why:
                walk.damage.append(Damage(pack_name(pack), state.why))
            self._found(pack, state, ends, walk)
            done += 1
            self._progress(done, total)

    def _found(self, pack: bytes, state: PackState, ends: Ends, walk: ChainWalk) -> None:
        bad = state.bad
        if bad is not None:
            beyond = state.beyond(ends)
            if beyond:
                why = f"rows need more of chunk {beyond[0]} than it has"
                walk.damage.append(Damage(pack_name(pack), why))
            bad = bad | set(beyond)
        if bad is None or bad:
            walk.bad.add(PackRef(pack, None), bad)
