"""Owners that race for a chain, in any order, with requests lost, late or unanswered: nothing is there twice.

The model is what each owner was told. A record is *vaulted* once `append` or `settle` has returned; it must
then be in the chain for ever, at that place. A record that was *fenced* must never be there. Between the two
are those whose owner died before it knew.
"""

from contextlib import suppress

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farshore.errors import Conflict, Fenced, Unreachable
from process_server.vault.chain import Chain
from process_server.vault.commit import ROW_DTYPE, ZEROS, CommitVolume, Rows
from process_server.vault.keys import VaultKeys
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.protocol import AlreadyExists, Body, body_bytes

KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
MACHINE, VOLUME = b"M" * 16, b"V" * 16
OWNERS = 3


class Network(MemoryStore):
    """The shared store, behind a network that can lose a create, lose its reply, or deliver it later."""

    def __init__(self) -> None:
        super().__init__()
        self.fault = "none"
        self.late: list[tuple[str, bytes]] = []

    def put_new(self, name: str, body: Body) -> None:
        fault, self.fault = self.fault, "none"
        if fault == "late":
            self.late.append((name, body_bytes(body)))
        if fault in ("late", "lost"):
            raise Unreachable("no answer", where=name)
        try:
            super().put_new(name, body)
        finally:
            if fault == "reply lost":
                raise Unreachable("no answer", where=name)

    def deliver(self) -> None:
        name, body = self.late.pop(0)
        with suppress(AlreadyExists):
            super().put_new(name, body)


class Race(RuleBasedStateMachine):
    """Each rule is one step of one owner, or of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()
        self.chains = [self._new_chain(number) for number in range(OWNERS)]
        self.sending: list[int | None] = [None] * OWNERS
        self.records = 0
        self.vaulted: dict[int, tuple[int, bytes]] = {}
        self.fenced: set[int] = set()
        self.newest = 0

    def _new_chain(self, number: int) -> Chain:
        return Chain(self.network, KEYS, MACHINE, bytes([number + 1]) * 16)

    @rule(number=st.integers(0, OWNERS - 1), fault=st.sampled_from(["none", "lost", "late", "reply lost"]))
    def fence(self, number: int, fault: str) -> None:
        chain = self.chains[number]
        sent_before = chain.is_pending
        self.network.fault = fault
        try:
            seq, digest = chain.fence(machine_name="m", time_ns=1)
        except Unreachable:
            assert chain.is_pending
        except Conflict:
            assert self.sending[number] is not None
        else:
            assert (chain.is_owner, chain.seq, chain.digest) == (True, seq, digest)
            assert sent_before or seq > self.newest
            self.newest = max(seq, self.newest)
        self.network.fault = "none"

    @precondition(lambda self: any(chain.is_owner for chain in self.chains))
    @rule(choice=st.integers(0), fault=st.sampled_from(["none", "none", "lost", "late", "reply lost"]))
    def append(self, choice: int, fault: str) -> None:
        owners = [number for number, chain in enumerate(self.chains) if chain.is_owner]
        number = owners[choice % len(owners)]
        if self.chains[number].is_pending:
            return self.settle(number, fault)
        self.records += 1
        self.sending[number] = self.records
        self._finish(number, fault, again=False)

    @rule(number=st.integers(0, OWNERS - 1), fault=st.sampled_from(["none", "lost", "late", "reply lost"]))
    def settle(self, number: int, fault: str) -> None:
        if self.sending[number] is not None:
            self._finish(number, fault, again=True)

    def _finish(self, number: int, fault: str, *, again: bool) -> None:
        chain, record = self.chains[number], self.sending[number]
        assert record is not None
        self.network.fault = fault
        try:
            told = chain.settle() if again else self._append(chain, record)
        except Unreachable:
            assert chain.is_pending
        except Fenced:
            assert not chain.is_owner
            self.fenced.add(record)
            self.sending[number] = None
        else:
            assert again or told[0] > self.newest, "a commit was put below one that somebody was told of"
            self.newest = max(told[0], self.newest)
            self.vaulted[record] = told
            self.sending[number] = None
        self.network.fault = "none"

    @staticmethod
    def _append(chain: Chain, record: int) -> tuple[int, bytes]:
        return chain.append(
            machine_name="m",
            time_ns=record,
            cut_seq=record,
            tag=None,
            consistency="crash",
            volumes=[_volume(record)],
            rows_by_volume={VOLUME: _row(record)},
        )

    @rule(number=st.integers(0, OWNERS - 1))
    def die(self, number: int) -> None:
        """A new process knows nothing; what was pending may still arrive."""
        self.chains[number] = self._new_chain(number)
        self.sending[number] = None

    @precondition(lambda self: self.network.late)
    @rule()
    def deliver(self) -> None:
        self.network.deliver()

    @invariant()
    def there_is_one_chain_and_it_says_what_the_owners_were_told(self) -> None:
        found: dict[int, tuple[int, bytes]] = {}
        for commit in Chain(self.network, KEYS, MACHINE).iterate():
            for record in commit.rows["lsn"].tolist():
                assert record not in found, f"record {record} is in two commits"
                found[record] = (commit.head.seq, commit.digest)
        assert {record: found.get(record) for record in self.vaulted} == self.vaulted
        assert not found.keys() & self.fenced
        # At most one owner can go on: the one whose fence or commit is the newest.
        head = Chain(self.network, KEYS, MACHINE).load_head()
        at_head = [
            chain.seq
            for chain in self.chains
            if chain.is_owner and head is not None and chain.digest == head.digest
        ]
        assert len(at_head) <= 1


def _volume(lsn: int) -> CommitVolume:
    return CommitVolume(
        id=VOLUME,
        name="data",
        size_bytes=2**40,
        incarnation=b"i" * 16,
        ordinal=1,
        lsn=lsn,
        digest=bytes(32),
        fuzzy=False,
        copied=True,
        copy_end=0,
    )


def _row(record: int) -> Rows:
    table = np.zeros(1, ROW_DTYPE)
    table[0] = (record * 512, 512, record, 0, ZEROS, 0, 0, 0)
    return table


TestRace = Race.TestCase
TestRace.settings = settings(settings.default, stateful_step_count=30)
