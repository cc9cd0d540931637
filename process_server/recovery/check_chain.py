"""A chain, walked commit by commit: is each there, sound, and the successor of the one before."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from blake3 import blake3

from farshore.errors import IntegrityError, NotFound
from farshore.units import MIB
from process_server.recovery.check_packs import (
    Ends,
    PackState,
    highest,
    needed_ends,
    reason,
    unreadable_chunks,
)
from process_server.recovery.damage import BadChunks
from process_server.recovery.image import inline_pack
from process_server.recovery.points import ChainReader
from process_server.vault.changes import Change, PackRef
from process_server.vault.commit import Commit, CommitHead, commit_name, decode_commit
from process_server.vault.pack import PackReader

CACHE_BYTES: Final = 2 * MIB


@dataclass(frozen=True, slots=True)
class Damage:
    """An object that is not as it has to be, by its name in the store, and why in one clause."""

    object: str
    why: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """The end of a machine's chain as somebody noted it outside of the vault.

    Attributes:
        seq: Of the newest commit at that time.
        digest: BLAKE3 of that whole object.
    """

    machine: bytes
    seq: int
    digest: bytes


class ChainWalk:
    """Every commit of a chain, whole, from the first to the newest.

    Attributes:
        needed: Standing packs, with what rows need of their chunks.
        unreadable: Commits that are missing, damaged, or not the successor of the one before.
        bad: Chunks inside of commits that cannot be read.
        volumes: Ids of every volume met.
    """

    def __init__(self, chain: ChainReader, *, read: bool) -> None:
        """With ``read`` every byte of the packs inside is read, too."""
        self._chain, self._read = chain, read
        self.commits = 0
        self.needed: dict[bytes, Ends] = {}
        self.unreadable: set[int] = set()
        self.bad = BadChunks()
        self.damage: list[Damage] = []
        self.volumes: set[bytes] = set()
        self._before: tuple[CommitHead, bytes, bytes] | None = None

    def run(self, receipt: Receipt | None) -> None:
        newest = self._chain.newest()
        for seq in range(1, newest + 1):
            name = commit_name(self._chain.machine, seq)
            try:
                body = self._chain.store.get(name)
                change = self._chain.change(seq)
            except (IntegrityError, NotFound) as exc:
                self._unreadable(seq, "it is missing" if isinstance(exc, NotFound) else reason(exc))
                self._before = None
                continue
            self.commits += 1
            digest = blake3(body).digest()
            if receipt is not None and seq == receipt.seq and digest != receipt.digest:
                self.damage.append(Damage(name, "it is another commit than the receipt's"))
            self._link(change)
            self._take(change, self._whole(name, body))
            self._before = change.head, digest, change.header_digest
        if receipt is not None and receipt.seq > newest:
            name = commit_name(self._chain.machine, receipt.seq)
            why = f"the receipt has it, and the chain ends at {newest}: it was rolled back"
            self.damage.append(Damage(name, why))

    def _whole(self, name: str, body: bytes) -> Commit | None:
        """Return the commit if all of it is sound. Points go by head and rows, which may be sound alone."""
        try:
            return decode_commit(self._chain.keys, name, body)
        except IntegrityError as exc:
            self.damage.append(Damage(name, reason(exc)))
            return None

    def _unreadable(self, seq: int, why: str) -> None:
        self.unreadable.add(seq)
        self.bad.add_commit(seq)
        self.damage.append(Damage(commit_name(self._chain.machine, seq), why))

    def _link(self, change: Change) -> None:
        """Hold a commit against the one before it."""
        head, seq = change.head, change.head.seq
        if self._before is None and seq > 1:
            return  # told already
        before, digest, header = self._before or (None, bytes(32), bytes(32))
        epoch = before.epoch + (head.kind == "fence") if before is not None else 1
        if head.epoch != epoch:
            self._unreadable(seq, f"epoch {head.epoch}, where {epoch} follows")
        elif head.previous == digest:
            return
        elif before is not None and head.previous_header == header:
            # Head and rows of that one are authentic, so points go by them; the rest shows in its packs.
            name = commit_name(self._chain.machine, seq - 1)
            if not any(damage.object == name for damage in self.damage):
                self.damage.append(Damage(name, "its bytes are not those that were written"))
        else:
            # Two histories: recovery takes neither of the two at the seam.
            self._unreadable(seq, "the commit before it is not the one that it was written after")
            self.unreadable.add(seq - 1)

    def _take(self, change: Change, whole: Commit | None) -> None:
        self.volumes.update(volume.id for volume in change.head.volumes)
        ends = needed_ends(change.rows)
        for number, pack in enumerate(change.head.packs):
            if number not in ends:
                continue
            if pack.inline is None:
                self.needed[pack.id] = highest(self.needed.get(pack.id), ends[number])
            else:
                self._inline(change, whole, pack.id, ends[number])

    def _inline(self, change: Change, whole: Commit | None, pack: bytes, ends: Ends) -> None:
        chain, seq = self._chain, change.head.seq
        name = commit_name(chain.machine, seq)
        try:
            if whole is not None:
                body = whole.inline_pack(pack)
            else:
                body = inline_pack(chain.store, chain.keys, chain.machine, seq, pack)
            reader = PackReader.from_inline(chain.keys, {pack: body}, CACHE_BYTES)
            plain = np.array(reader.index(pack).plain_bytes, np.uint32)
        except (IntegrityError, NotFound) as exc:
            self.bad.add(PackRef(pack, seq), None)
            self.damage.append(Damage(name, f"a pack inside: {reason(exc)}"))
            return
        bad = set(PackState("", frozenset(), plain, 0, False).beyond(ends))
        if self._read:
            bad |= unreadable_chunks(reader, pack, list(range(len(plain))))
        if bad:
            self.bad.add(PackRef(pack, seq), bad)
            self.damage.append(Damage(name, f"{len(bad)} chunks of a pack inside cannot be read"))
