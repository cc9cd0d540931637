"""Enrolment, renewal and the deny-list, held against what an honest and a dishonest agent may try."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from farshore import pki
from farshore.errors import CapacityError, NotFound, Unreachable, UsageError
from farshore.ids import new_id
from farshore.wire import messages as m
from process_server import identity as identity_module
from process_server.identity import Identity, with_server_certificate
from process_server.ingest.stream import Refused
from process_server.vault.control import Control, ControlStore, Denied, ServerIdentity
from process_server.vault.keys import VaultKeys, create_vault
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.store.memory import MemoryStore
from tests.fakes.clock import ManualClock

HOUR, DAY = 3600.0, 86_400.0


@dataclass
class Agent:
    """What a machine would send."""

    name: str
    key: Any

    def enrol(self, token: pki.Token, **changes: object) -> m.Enrol:
        request = pki.make_request(self.key, self.name)
        message = m.Enrol(m.PROTOCOL, token.token_id, token.secret, self.name, request)
        return msgspec.structs.replace(message, **changes)

    def renew(self, enrolled: m.Enrolled) -> m.Renew:
        return m.Renew(m.PROTOCOL, enrolled.machine_id, pki.make_request(self.key, self.name))


class Site:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore()
        self.keys: VaultKeys = create_vault(self.store, RecoveryKey.generate(), bytes(32))
        self.control = ControlStore(self.store, self.keys)
        authority = pki.Authority.create(self.keys.vault_id, self.clock.wall_ns())

        def with_ca(control: Control) -> Control:
            return msgspec.structs.replace(
                control, ca_certificate=authority.certificate, ca_key=authority.private_key
            )

        self.control.update(with_ca)
        self.registry = CollectorRegistry()
        self.identity = self.another(self.registry)

    def another(self, registry: CollectorRegistry | None = None) -> Identity:
        """Another server of the same vault."""
        return Identity(
            self.control,
            self.keys.vault_id,
            self.clock,
            registry or CollectorRegistry(),
            addresses=lambda: ("gw:9443",),
        )

    async def token(self, machine: str = "db1", ttl_s: float = HOUR) -> pki.Token:
        text, _ = await self.identity.create_token(machine, ttl_s)
        return pki.decode_token(text)

    async def enrolled(self, machine: str = "db1") -> tuple[Agent, m.Enrolled]:
        agent = Agent(machine, pki.new_key())
        return agent, await self.identity.enrol(agent.enrol(await self.token(machine)))

    def allowed(self, enrolled: m.Enrolled, identity: Identity | None = None) -> bool:
        certificate = pki.pem_to_der(enrolled.certificate)
        return (identity or self.identity).allowed(enrolled.machine_id, certificate)

    def count(self, result: str) -> float:
        return self.registry.get_sample_value("farshore_enrolments_total", {"result": result}) or 0


@pytest.fixture
def site() -> Site:
    return Site()


def agent(name: str = "db1") -> Agent:
    return Agent(name, pki.new_key())


async def refused(answer: Any, code: str, what: str | None = None) -> None:
    with pytest.raises(Refused, match=what) as caught:
        await answer
    assert caught.value.code == code


# --- enrolment ---


async def test_a_token_makes_a_machine(site: Site) -> None:
    token = await site.token()
    assert (token.machine, token.addresses, token.vault_id) == ("db1", ("gw:9443",), site.keys.vault_id)
    one = agent()
    enrolled = await site.identity.enrol(one.enrol(token))
    peer = pki.peer_identity(pki.pem_to_der(enrolled.certificate), site.keys.vault_id, "machine")
    assert peer.machine_id == enrolled.machine_id
    assert peer.public_key == pki.public_key_of(one.key)
    assert pki.is_issued_by(enrolled.certificate, enrolled.ca)
    assert enrolled.ca == pki.der_to_pem(token.ca)
    assert site.allowed(enrolled)
    assert site.identity.name_of(enrolled.machine_id) == "db1"
    assert [(row["name"], row["state"]) for row in site.identity.machines()] == [("db1", "enrolled")]


async def test_of_a_hundred_uses_at_two_servers_exactly_one_wins(site: Site) -> None:
    token, other = await site.token(), site.another()

    async def attempt(index: int) -> str:
        identity = other if index % 2 else site.identity
        try:
            await identity.enrol(agent().enrol(token))
        except Refused as error:
            return error.code
        return "won"

    tasks = [asyncio.create_task(attempt(index)) for index in range(100)]
    results = [await task for task in tasks]
    assert (results.count("won"), results.count("conflict")) == (1, 99)
    assert len(site.control.load().machines) == 1
    assert site.count("reused") > 0


@pytest.mark.nightly
@pytest.mark.timeout(1800)
async def test_of_ten_thousand_rounds_each_has_one_winner() -> None:
    for _ in range(100):
        site = Site()
        for number in range(100):
            token = await site.token(f"db{number}")
            tasks = [
                asyncio.create_task(site.identity.enrol(agent(token.machine).enrol(token))) for _ in range(4)
            ]
            await asyncio.wait(tasks)
            assert sum(task.exception() is None for task in tasks) == 1


async def test_the_same_key_is_answered_again_also_when_the_token_has_ended(site: Site) -> None:
    token, one = await site.token(), agent()
    first = await site.identity.enrol(one.enrol(token))
    second = await site.identity.enrol(one.enrol(token))
    site.clock.advance(2 * HOUR)
    third = await site.identity.enrol(one.enrol(token))
    assert first.machine_id == second.machine_id == third.machine_id
    assert site.count("repeated") == 2
    assert site.count("reused") == 0


async def test_another_key_for_a_name_on_record_is_a_conflict(site: Site) -> None:
    await site.enrolled()
    fresh = await site.token()
    await refused(site.identity.enrol(agent().enrol(fresh)), "conflict", "on record with another key")
    assert site.count("conflict") == 1
    assert not any(token.used_ns for token in site.control.load().tokens if token.id == fresh.token_id)


async def test_a_spent_token_shown_by_another_is_an_alarm(site: Site) -> None:
    token = await site.token()
    await site.identity.enrol(agent().enrol(token))
    with capture_logs() as logged:
        await refused(site.identity.enrol(agent().enrol(token)), "conflict")
    assert site.count("reused") == 1
    assert [(line["event"], line["log_level"]) for line in logged] == [("token_reused", "error")]


Change = Callable[[pki.Token], dict[str, object]]

BAD: dict[str, tuple[Change, str]] = {
    "secret": (lambda token: {"secret": bytes(32)}, "no such token"),
    "secret cut": (lambda token: {"secret": token.secret[:-1]}, "no such token"),
    "no secret": (lambda token: {"secret": b""}, "no such token"),
    "id": (lambda token: {"token_id": new_id()}, "no such token"),
    "odd id": (lambda token: {"token_id": b"x" * 5000}, "no such token"),
    "name": (lambda token: {"machine": "db2"}, "for another machine"),
    "request": (lambda token: {"csr": b"x"}, "request refused"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_enrolment_spends_nothing(site: Site, case: str) -> None:
    token = await site.token()
    change, what = BAD[case]
    await refused(site.identity.enrol(agent().enrol(token, **change(token))), "auth", what)
    assert site.control.load().machines == ()
    await site.identity.enrol(agent().enrol(token))


async def test_an_expired_token_is_refused(site: Site) -> None:
    token = await site.token(ttl_s=60)
    site.clock.advance(60)
    await refused(site.identity.enrol(agent().enrol(token)), "auth", "expired")
    assert site.control.load().machines == ()


async def test_another_version_is_refused(site: Site) -> None:
    token = await site.token()
    await refused(site.identity.enrol(agent().enrol(token, protocol=2)), "protocol")


async def test_made_up_tokens_do_not_make_the_vault_work(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    token, load = await site.token(), site.control.load
    loads: list[Control] = []

    def counted() -> Control:
        loads.append(load())
        return loads[-1]

    monkeypatch.setattr(site.control, "load", counted)
    site.clock.advance(1)
    for _ in range(50):
        await refused(site.identity.enrol(agent().enrol(token, token_id=new_id())), "auth")
    assert len(loads) == 1


async def test_a_token_made_at_another_server_is_found(site: Site) -> None:
    other = site.another()
    site.clock.advance(identity_module.RELOAD_S)
    await other.enrol(agent().enrol(await site.token()))


async def test_no_secret_is_kept_or_logged(site: Site) -> None:
    with capture_logs() as lines:
        token = await site.token()
        await site.identity.enrol(agent().enrol(token))
        await refused(site.identity.enrol(agent().enrol(token)), "conflict")
    assert token.secret not in msgspec.msgpack.encode(site.control.load())
    logged = json.dumps(lines, default=lambda value: value.hex() + repr(value))
    assert len(lines) == 3
    for text in (token.secret.hex(), pki.encode_token(token)[5:40], repr(token.secret)[2:20]):
        assert text not in logged


@pytest.mark.parametrize("name", ["", "DB1", "a/b", "-x", "x" * 64, "db1\n"])
async def test_a_token_for_what_is_no_name_is_refused(site: Site, name: str) -> None:
    with pytest.raises(UsageError, match="not a name"):
        await site.identity.create_token(name, HOUR)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, 3600.1, float("inf"), float("nan")])
async def test_a_token_lives_an_hour_at_most(site: Site, ttl_s: float) -> None:
    with pytest.raises(UsageError, match="up to 1 h"):
        await site.identity.create_token("db1", ttl_s)


async def test_tokens_are_bounded_and_forgotten(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_module, "TOKENS_MAX", 3)
    for _ in range(3):
        await site.token()
    with pytest.raises(CapacityError):
        await site.token()
    site.clock.advance(HOUR + DAY)
    await site.token()
    assert len(site.control.load().tokens) == 1


# --- renewal ---


@pytest.mark.parametrize("days", [0.1, 0.7, 3, 30])
async def test_a_renewal_may_come_late(site: Site, days: float) -> None:
    one, enrolled = await site.enrolled()
    site.clock.advance(days * DAY)
    renewed = await site.identity.renew(one.renew(enrolled))
    assert renewed.machine_id == enrolled.machine_id
    assert site.allowed(renewed)
    # The chain of renewals goes on from there.
    site.clock.advance(30 * DAY)
    assert site.allowed(await site.identity.renew(one.renew(renewed)))


async def test_a_renewal_after_31_days_is_refused(site: Site) -> None:
    one, enrolled = await site.enrolled()
    site.clock.advance(31 * DAY + 1)
    await refused(site.identity.renew(one.renew(enrolled)), "auth", "30 days")


async def test_a_renewal_needs_the_key_on_record(site: Site) -> None:
    _, enrolled = await site.enrolled()
    site.clock.advance(DAY)
    await refused(site.identity.renew(agent().renew(enrolled)), "auth", "no machine with this id and key")
    unknown = msgspec.structs.replace(enrolled, machine_id=new_id())
    await refused(site.identity.renew(agent().renew(unknown)), "auth", "no machine with this id and key")


async def test_renewing_again_and_again_does_not_fill_the_vault(site: Site) -> None:
    one, enrolled = await site.enrolled()
    before = site.control.root().control
    for _ in range(50):
        await site.identity.renew(one.renew(enrolled))
    assert site.control.root().control == before
    for _ in range(50):
        site.clock.advance(61)
        await site.identity.renew(one.renew(enrolled))
    assert len(site.control.load().machines[0].serials) <= identity_module.SERIALS_KEPT


async def test_an_expired_certificate_is_not_allowed(site: Site) -> None:
    one, enrolled = await site.enrolled()
    certificate = pki.pem_to_der(enrolled.certificate)
    assert site.allowed(enrolled)
    assert not site.identity.expired(certificate)
    site.clock.advance(pki.AGENT_LIFE.total_seconds())
    assert not site.allowed(enrolled)
    assert site.identity.expired(certificate)
    assert not site.identity.expired(b"no certificate")
    assert site.allowed(await site.identity.renew(one.renew(enrolled)))


# --- revocation ---


async def test_a_revoked_machine_is_out_at_once_and_everywhere(site: Site) -> None:
    one, enrolled = await site.enrolled()
    other = site.another()
    cut_here: list[bytes] = []
    cut_there: list[bytes] = []
    site.identity.on_deny(cut_here.append)
    other.on_deny(cut_there.append)
    assert site.allowed(enrolled, other)
    await site.identity.revoke("db1")
    assert cut_here == [enrolled.machine_id]
    assert not site.allowed(enrolled)
    await refused(site.identity.renew(one.renew(enrolled)), "denied")
    # Another server learns it by its own refresh.
    await other.refresh()
    assert cut_there == [enrolled.machine_id]
    assert not site.allowed(enrolled, other)
    await site.identity.revoke("db1")
    assert cut_here == [enrolled.machine_id]
    assert identity_module.REFRESH_S <= 60


async def test_a_revoked_name_comes_back_with_a_new_token_and_a_new_key(site: Site) -> None:
    one, enrolled = await site.enrolled()
    left_over = await site.token()
    await site.identity.revoke("db1")
    await refused(site.identity.enrol(agent().enrol(left_over)), "auth", "no such token")
    token = await site.token()
    await refused(site.identity.enrol(one.enrol(token)), "denied", "this key was revoked")
    again = await site.identity.enrol(agent().enrol(token))
    # The same machine: its chain of commits goes on.
    assert again.machine_id == enrolled.machine_id
    assert site.allowed(again)
    assert not site.allowed(enrolled)
    await refused(site.identity.renew(one.renew(enrolled)), "auth")


async def test_revoking_what_is_not_there(site: Site) -> None:
    with pytest.raises(NotFound):
        await site.identity.revoke("db9")


async def test_one_certificate_can_be_denied(site: Site) -> None:
    one, enrolled = await site.enrolled()
    serial = f"{pki.serial_of(enrolled.certificate):x}"

    def deny(control: Control) -> Control:
        entry = Denied(serial=serial, since_ns=0)
        return msgspec.structs.replace(control, denied=(*control.denied, entry))

    site.control.update(deny)
    await site.identity.refresh()
    assert not site.allowed(enrolled)
    assert site.allowed(await site.identity.renew(one.renew(enrolled)))


async def test_a_machine_cannot_pass_for_another(site: Site) -> None:
    _, first = await site.enrolled("db1")
    _, second = await site.enrolled("db2")
    certificate = pki.pem_to_der(first.certificate)
    assert not site.identity.allowed(second.machine_id, certificate)
    assert not site.identity.allowed(new_id(), certificate)
    # Nor with the same key: a host that was cloned and enrolled again under another name.
    one = agent("db3")
    third = await site.identity.enrol(one.enrol(await site.token("db3")))
    one.name = "db4"
    fourth = await site.identity.enrol(one.enrol(await site.token("db4")))
    assert not site.identity.allowed(fourth.machine_id, pki.pem_to_der(third.certificate))
    assert not site.identity.allowed(first.machine_id, b"")


async def test_a_store_that_fails_leaves_what_is_known_in_force(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, enrolled = await site.enrolled()
    await site.enrolled("db2")
    await site.identity.revoke("db2")

    def fail() -> Control:
        raise Unreachable("the store")

    monkeypatch.setattr(site.control, "load", fail)
    await site.identity.refresh()
    assert site.allowed(enrolled)


# --- the server's own certificate ---


async def test_the_servers_certificate_is_renewed_at_two_thirds(site: Site) -> None:
    def first_server(control: Control) -> Control:
        server = ServerIdentity(id=new_id(), certificate=b"", key=b"")
        with_server = msgspec.structs.replace(control, server=server)
        return with_server_certificate(with_server, site.keys.vault_id, site.clock.wall_ns())

    site.control.update(first_server)
    await site.identity.refresh()
    first, first_end = site.identity.server, site.identity.server_expires
    life_s = pki.SERVER_LIFE.total_seconds()
    site.clock.advance(life_s * 0.66)
    assert not await site.identity.renew_server()
    site.clock.advance(life_s * 0.01)
    assert await site.identity.renew_server()
    second = site.control.load().server
    assert second is not None
    assert second == site.identity.server
    assert second.id == first.id
    assert second.certificate != first.certificate
    assert second.key != first.key
    assert site.identity.server_expires - first_end > timedelta(days=19)
    site.clock.jump_wall(-10 * 365 * DAY)
    assert await site.identity.renew_server()
