"""The chain of one machine: its commits, strictly one after another, whoever owns it.

There is no lease. The name of the next commit can be created once; who creates it as a fence is the owner,
and the old owner's next create meets an existing name.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from blake3 import blake3

from farshore.errors import Conflict, Fenced, IntegrityError, NotFound, Unreachable
from farshore.failpoints import failpoint
from farshore.ids import ID_BYTES, id_to_hex, new_id
from process_server.vault.commit import (
    SEQ_MAX,
    Commit,
    CommitHead,
    CommitKind,
    CommitVolume,
    Consistency,
    Rows,
    Timeline,
    commit_name,
    complete_head,
    decode_commit,
    encode_commit,
)
from process_server.vault.keys import VaultKeys
from process_server.vault.seal import header_digest
from process_server.vault.store.protocol import AlreadyExists, Buffer, Store

READER: Final = bytes(ID_BYTES)
"""Writer id of somebody who only reads."""
FENCE_TRIES_MAX: Final = 256
"""A living owner commits twice a second and a try takes milliseconds: to lose this many races is a bug."""
_SEQ: Final = re.compile(r"[0-9]{20}")
_NO_DIGEST: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A commit that was sent at least once. Never changed: it may lie in the store already."""

    head: CommitHead
    name: str
    body: bytes
    digest: bytes
    header_digest: bytes


class Chain:
    """One machine's chain, seen from one owner or reader. One thread at a time.

    Args:
        store: The vault's.
        keys: Of the vault.
        machine_id: Whose chain.
        writer_id: The server's id, or `READER`.

    Attributes:
        head: Head of the newest commit we know of, None before `load_head` and in an empty chain.
        digest: BLAKE3 of that commit's object; zeros without one.
        is_owner: Our fence stands, as far as we know.
    """

    def __init__(self, store: Store, keys: VaultKeys, machine_id: bytes, writer_id: bytes = READER) -> None:
        self._store, self._keys, self._machine_id, self._writer_id = store, keys, machine_id, writer_id
        self.head: CommitHead | None = None
        self.digest = _NO_DIGEST
        self._header_digest = _NO_DIGEST
        self.is_owner = False
        self._pending: _Pending | None = None

    @property
    def seq(self) -> int:
        """Of the newest commit we know of, 0 in an empty chain."""
        return self.head.seq if self.head is not None else 0

    @property
    def epoch(self) -> int:
        """Of the newest commit we know of, 0 in an empty chain."""
        return self.head.epoch if self.head is not None else 0

    @property
    def is_pending(self) -> bool:
        """A commit was sent, and nobody knows if it is there: `settle` it, or `fence` again, first."""
        return self._pending is not None

    def load_head(self) -> Commit | None:
        """Find the newest commit in the store; None when the chain is empty. We own it no more, if we did.

        The listing only says where to look first: it is in no order and may lack what is new. A gap is no end
        (`iterate` reports it), since to write into one would split the chain.

        Raises:
            Conflict: A commit of ours is pending.
            IntegrityError: The newest commit is damaged; nothing must be added until it is repaired.
            Unreachable: The store did not answer.
        """
        self._refuse_pending()
        self.is_owner = False
        prefix = f"c/{id_to_hex(self._machine_id)}/"
        tails = (name.removeprefix(prefix) for name in self._store.list(prefix))
        seqs = (int(tail) for tail in tails if _SEQ.fullmatch(tail))
        seq = max((seq for seq in seqs if 1 <= seq <= SEQ_MAX), default=0)
        found = self._read(seq) if seq else None
        self._take(found)
        return self._follow() or found

    def append(
        self,
        *,
        machine_name: str,
        time_ns: int,
        cut_seq: int,
        tag: str | None,
        consistency: Consistency,
        volumes: Sequence[CommitVolume],
        rows_by_volume: Mapping[bytes, Rows],
        pack_ids: Sequence[bytes] = (),
        inline_packs: Mapping[bytes, Buffer] | None = None,
        idle_since_ns: int | None = None,
        generation: int = 0,
        timeline: Timeline | None = None,
    ) -> tuple[int, bytes]:
        """Add a commit of kind ``data``; on return it is durable, and what it holds is *vaulted*.

        Every pack in ``pack_ids`` that is not inline was acknowledged by the store before this is called.
        Arguments are as in `CommitHead` and `encode_commit`; ``timeline`` is the chain's newest by default.

        Returns:
            Sequence number and digest of the commit.

        Raises:
            Fenced: Somebody else wrote the next commit, or our fence was never made. Step down.
            Conflict: An earlier commit is pending: `settle` it first.
            ValueError: What `encode_commit` raises; nothing was sent.
            FarshoreError: Of the store. The commit is then pending: call `settle`, never `append` it again.
        """
        self._refuse_pending()
        if not self.is_owner or self.head is None:
            raise Fenced(
                "cannot add to the chain",
                where=id_to_hex(self._machine_id),
                why="this server does not own it",
                fix="fence it first",
            )
        head = self._next_head("data", machine_name, self.epoch, timeline, time_ns, generation)
        head = msgspec.structs.replace(
            head,
            cut_seq=cut_seq,
            tag=tag,
            consistency=consistency,
            idle_since_ns=idle_since_ns,
            volumes=tuple(volumes),
        )
        self._freeze(head, rows_by_volume, pack_ids, inline_packs)
        return self.settle()

    def settle(self) -> tuple[int, bytes]:
        """Send the pending commit, unchanged, and learn if it is there. May be called as often as needed.

        Returns:
            Sequence number and digest: it is durable.

        Raises:
            Fenced: Another commit has its place, and ours will never be there.
            FarshoreError: Of the store: it is pending still.
            ValueError: Nothing is pending.
        """
        pending = self._pending
        if pending is None:
            raise ValueError("no commit is pending")
        failpoint("vault.chain.before_commit")
        try:
            self._store.put_new(pending.name, pending.body)
        except AlreadyExists:
            # Bytes, not only writer and nonce: a cloned host draws the same nonce.
            if self._get(pending.name) != pending.body:
                self._pending, self.is_owner = None, False
                raise Fenced(
                    "cannot add to the chain",
                    where=pending.name,
                    why="another server wrote this commit",
                    fix="the machine has another owner now",
                ) from None
        failpoint("vault.chain.after_commit")
        self._pending = None
        self.head, self.digest = pending.head, pending.digest
        self._header_digest = pending.header_digest
        self.is_owner = pending.head.kind == "fence" or self.is_owner
        return pending.head.seq, pending.digest

    def fence(
        self, *, machine_name: str, time_ns: int, timeline: Timeline | None = None, generation: int = 0
    ) -> tuple[int, bytes]:
        """Take the chain over: create the next commit as a fence of the next epoch; commits met are followed.

        The fence repeats the volumes of the commit before it: the newest commit says where each stands.
        After an error of the store call it again: the fence that was sent is settled first.

        Args:
            machine_name: As in `CommitHead`.
            time_ns: The server's clock.
            timeline: Begin this one; by default go on with the chain's, or begin the first.
            generation: As in `CommitHead`.

        Returns:
            Sequence number and digest of our fence.

        Raises:
            Conflict: A commit of data is pending: `settle` it first. Or others kept taking the place.
            IntegrityError: The chain is damaged.
            FarshoreError: Of the store.
        """
        if self._writer_id == READER:
            raise ValueError("a reader cannot own a chain")
        if self._pending is not None and self._pending.head.kind == "fence":
            try:
                return self.settle()
            except Fenced:
                pass
        # Not from what we knew: if that is old, what came after it may be retired and look like the end.
        self.load_head()
        for _ in range(FENCE_TRIES_MAX):
            epoch = self.epoch + 1
            head = self._next_head("fence", machine_name, epoch, timeline, time_ns, generation)
            self._freeze(head, {}, (), None)
            try:
                return self.settle()
            except Fenced:
                self._follow()
        raise Conflict(
            "cannot take over the chain",
            where=id_to_hex(self._machine_id),
            why=f"{FENCE_TRIES_MAX} times another server was first",
            fix="stop the other server",
        )

    def iterate(
        self, from_seq: int = 1, to_seq: int | None = None, *, previous: bytes | None = None
    ) -> Iterator[Commit]:
        """Yield the commits from ``from_seq`` to ``to_seq`` (by default the newest there is), each verified.

        Args:
            from_seq: First one.
            to_seq: Last one, included.
            previous: Digest of the commit before ``from_seq``; the link to it is verified when given.

        Raises:
            IntegrityError: One is missing, damaged, or is not the successor of the one before.
        """
        if to_seq is None:
            scout = Chain(self._store, self._keys, self._machine_id)
            newest = scout.load_head()
            to_seq = newest.head.seq if newest is not None else 0
        before: CommitHead | None = None
        if from_seq == 1:
            previous = _NO_DIGEST
        for seq in range(from_seq, to_seq + 1):
            try:
                commit = self._read(seq)
            except NotFound as exc:
                raise IntegrityError(
                    "a commit is missing",
                    where=commit_name(self._machine_id, seq),
                    why=f"there is one after it, up to {to_seq}",
                ) from exc
            _verify_link(commit, before, previous)
            before, previous = commit.head, commit.digest
            yield commit

    def _refuse_pending(self) -> None:
        if self._pending is not None:
            raise Conflict(
                "cannot go on with the chain",
                where=self._pending.name,
                why="the outcome of this commit is unknown",
                fix="settle it first",
            )

    def _next_head(
        self,
        kind: CommitKind,
        machine_name: str,
        epoch: int,
        timeline: Timeline | None,
        time_ns: int,
        generation: int,
    ) -> CommitHead:
        before = self.head
        volumes = before.volumes if before is not None else ()
        return CommitHead(
            machine=self._machine_id,
            machine_name=machine_name,
            seq=self.seq + 1,
            kind=kind,
            previous=self.digest,
            previous_header=self._header_digest,
            epoch=epoch,
            timeline=timeline or (before.timeline if before is not None else Timeline(id=new_id())),
            writer=self._writer_id,
            nonce=new_id(),
            time_ns=time_ns,
            generation=generation,
            volumes=volumes,
        )

    def _freeze(
        self,
        head: CommitHead,
        rows_by_volume: Mapping[bytes, Rows],
        pack_ids: Sequence[bytes],
        inline_packs: Mapping[bytes, Buffer] | None,
    ) -> None:
        head = complete_head(head, rows_by_volume, pack_ids, inline_packs)
        body = encode_commit(self._keys, head, rows_by_volume, pack_ids, inline_packs)
        name = commit_name(self._machine_id, head.seq)
        self._pending = _Pending(head, name, body, blake3(body).digest(), header_digest(body))

    def _follow(self) -> Commit | None:
        """Read on from what we know to the newest commit; return it, None if there is nothing newer."""
        newest: Commit | None = None
        while True:
            try:
                commit = self._read(self.seq + 1)
            except NotFound:
                return newest
            _verify_link(commit, self.head, self.digest)
            self._take(commit)
            newest = commit

    def _take(self, commit: Commit | None) -> None:
        self.head = commit.head if commit is not None else None
        self.digest = commit.digest if commit is not None else _NO_DIGEST
        self._header_digest = commit.header_digest if commit is not None else _NO_DIGEST

    def _read(self, seq: int) -> Commit:
        name = commit_name(self._machine_id, seq)
        return decode_commit(self._keys, name, self._store.get(name))

    def _get(self, name: str) -> bytes:
        try:
            return self._store.get(name)
        except NotFound as exc:
            raise Unreachable(
                "cannot read the commit", where=name, why="the store says both that it exists and that not"
            ) from exc


def _verify_link(commit: Commit, before: CommitHead | None, previous: bytes | None) -> None:
    """Check that ``commit`` follows ``before``, whose digest is ``previous``; None: not known."""
    head = commit.head
    if previous is not None and head.previous != previous:
        why = "it does not hold the digest of the commit before it"
    elif before is not None and head.epoch != before.epoch + (head.kind == "fence"):
        why = f"epoch {head.epoch} after {before.epoch}"
    else:
        return
    raise IntegrityError("the chain is broken", where=commit.name, why=why)
