"""Who may speak to this vault's servers: enrolment, renewal, the deny-list, and the server's own certificate.

A token is good for one enrolment of one name, for at most an hour; it is kept as a hash and spent in the
compare-and-swap that puts the machine on record, so of any number of uses, at any number of servers, one
wins. A machine is its key: a renewal is a request signed with the key on record, and a revoked machine's key
is refused whatever certificate comes with it.
"""

import asyncio
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
from blake3 import blake3
from prometheus_client import CollectorRegistry, Counter

from farshore import pki
from farshore.clock import Clock
from farshore.errors import AuthError, CapacityError, Conflict, FarshoreError, NotFound, UsageError
from farshore.ids import id_to_hex, new_id, valid_name
from farshore.telemetry import get_logger
from farshore.wire import messages as m
from process_server.ingest.stream import Refused
from process_server.vault.control import Control, ControlStore, Denied, Machine, ServerIdentity, Token

TOKEN_TTL_S_MAX: Final = 3600.0
TOKENS_MAX: Final = 1000
MACHINES_MAX: Final = 4096
TOKEN_KEPT: Final = timedelta(days=1)
"""A token is remembered this long after its end, so that a later use is told from a made-up one."""
RENEWAL_GRACE: Final = timedelta(days=30)
REFRESH_S: Final = 10.0
"""How old what we know of the vault's machines may get: so soon is a revocation at another server felt."""
RELOAD_S: Final = 1.0
"""A stranger's unknown token may make us read the vault again, but not more often than this."""
RECORD_S: Final = 60.0
WAITING_MAX: Final = 256
SERIALS_KEPT: Final = 16

log = get_logger()


@dataclass(frozen=True, slots=True)
class _Known:
    """What was last read of ``control/``, as `allowed` needs it."""

    control: Control
    machines: dict[bytes, Machine]
    denied_serials: frozenset[str]
    at: float

    @classmethod
    def of(cls, control: Control, at: float) -> "_Known":
        denied = {entry.machine for entry in control.denied if entry.machine is not None}
        machines = {
            machine.id: machine
            for machine in control.machines
            if machine.state == "enrolled" and machine.id not in denied
        }
        serials = frozenset(entry.serial for entry in control.denied if entry.serial is not None)
        return cls(control, machines, serials, at)


class Identity:
    """Enrolment and the deny-list of one vault, at one server. All methods belong to the event loop's thread.

    Args:
        control: The vault's settings; read and changed in threads.
        addresses: Returns ``HOST:PORT`` of this server for tokens.
    """

    def __init__(
        self,
        control: ControlStore,
        vault_id: bytes,
        clock: Clock,
        registry: CollectorRegistry | None = None,
        *,
        addresses: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self._control, self._vault_id, self._clock = control, vault_id, clock
        self._addresses = addresses
        self._known = _Known.of(control.load(), clock.monotonic())
        self._authority = pki.Authority(self._known.control.ca_certificate, self._known.control.ca_key)
        self._deny_listeners: list[Callable[[bytes], None]] = []
        # Our own updates one after another: a hundred at once would only make each other try again.
        self._updating = asyncio.Lock()
        self._waiting = 0
        self._results = Counter(
            "farshore_enrolments",
            "Enrolments and renewals by what became of them; reused: a spent token was shown again.",
            ["result"],
            registry=registry,
        )

    @property
    def authority(self) -> pki.Authority:
        """The vault's CA."""
        return self._authority

    # --- for connections ---

    async def enrol(self, message: m.Enrol) -> m.Enrolled:
        """Spend a token and put a machine on record; the same name and key again is answered again.

        Raises:
            Refused: ``auth`` (token or request), ``denied`` (a revoked key), ``conflict`` (the name is on
                record with another key), ``capacity``, ``retry``, ``protocol``.
            FarshoreError: Of the store.
        """
        try:
            return await self._enrol(message)
        except _Reused:
            # Either an answer was lost together with the key it was for, or the token was stolen.
            self._results.labels("reused").inc()
            log.error("token_reused", machine=message.machine[:64], token=message.token_id[:16])
            raise
        except Refused as error:
            self._count(error.code, message.machine)
            raise

    async def renew(self, message: m.Renew) -> m.Enrolled:
        """Certify the key on record again, until 30 days after its last certificate's end.

        Raises:
            Refused: ``auth``, ``denied``, ``retry``, ``protocol``.
            FarshoreError: Of the store.
        """
        try:
            return await self._renew(message)
        except Refused as error:
            self._count(error.code, message.machine_id.hex()[:32])
            raise

    def allowed(self, machine_id: bytes, certificate: bytes) -> bool:
        """Tell whether a connection with this certificate (DER, chain checked by TLS) may go on.

        Asked at HELLO and again while the connection lasts; an expired certificate is refused as well.
        """
        machine = self._known.machines.get(machine_id)
        if machine is None:
            return False
        try:
            peer = pki.peer_identity(certificate, self._vault_id, "machine")
        except AuthError:
            return False
        return (
            peer.machine_id == machine_id
            and hmac.compare_digest(peer.public_key, machine.public_key)
            and f"{peer.serial:x}" not in self._known.denied_serials
            and self._now() < peer.not_after
        )

    def expired(self, certificate: bytes) -> bool:
        """Tell whether it is its age that `allowed` does not like: its machine may renew it and come back."""
        try:
            return self._now() >= pki.peer_identity(certificate, self._vault_id, "machine").not_after
        except AuthError:
            return False

    def name_of(self, machine_id: bytes) -> str | None:
        """Return the name under which a machine enrolled, whatever it calls itself; None: not on record."""
        machine = self._known.machines.get(machine_id)
        return machine.name if machine else None

    def on_deny(self, listener: Callable[[bytes], None]) -> None:
        """Have ``listener`` called with the id of each machine revoked from now on, here or elsewhere."""
        self._deny_listeners.append(listener)

    # --- for operators ---

    async def create_token(self, machine: str, ttl_s: float) -> tuple[str, datetime]:
        """Return a new token for one enrolment under this name, and until when it is good.

        Raises:
            UsageError: Not a name, or a life of more than an hour.
            Conflict: The machine has failed over.
            CapacityError: Too many tokens are waiting to be used.
        """
        if not valid_name(machine):
            raise UsageError(
                "not a name for a machine",
                where=machine[:64],
                fix="use 1 to 63 of a-z 0-9 . _ -, beginning with a letter or digit",
            )
        if not 0 < ttl_s <= TOKEN_TTL_S_MAX:
            raise UsageError("a token lives up to 1 h", where=f"{ttl_s:g} s", fix="give a --ttl up to 1h")
        now = self._clock.wall_ns()
        token_id, secret = new_id(), secrets.token_bytes(pki.SECRET_BYTES)
        expires_ns = now + round(ttl_s * 1e9)
        kept = Token(id=token_id, hash=blake3(secret).digest(), machine=machine, expires_ns=expires_ns)

        def change(control: Control) -> Control:
            tokens = _unforgotten(control.tokens, now)
            if len(tokens) >= TOKENS_MAX:
                raise CapacityError("too many tokens", why=f"{TOKENS_MAX} are kept", fix="wait an hour")
            known = control.machine_named(machine)
            if known is not None and known.state == "failed-over":
                raise Conflict("the machine has failed over", where=machine)
            return msgspec.structs.replace(control, tokens=(*tokens, kept))

        await self._update(change)
        expires = datetime.fromtimestamp(expires_ns // 1_000_000_000, UTC)
        log.info("token_created", token=token_id, machine=machine, expires=expires.isoformat())
        token = pki.Token(
            self._vault_id, self._authority.certificate_der, token_id, secret, machine, self._addresses()
        )
        return pki.encode_token(token), expires

    async def revoke(self, name: str, reason: str = "") -> None:
        """Deny a machine, its key and every unused token for its name; live connections are cut at once.

        Its points stay. A new token lets the name enrol again, with another key. Doing it twice is no error.

        Raises:
            NotFound: No such machine.
        """
        now = self._clock.wall_ns()

        def change(control: Control) -> Control:
            machine = control.machine_named(name)
            if machine is None:
                raise NotFound("no such machine", where=name, fix="'farshore machine list' shows them")
            if machine.state == "denied":
                return control
            denied = Denied(machine=machine.id, since_ns=now, reason=reason)
            revoked = msgspec.structs.replace(machine, state="denied")
            return msgspec.structs.replace(
                control,
                machines=_with(control.machines, revoked),
                denied=(*control.denied, denied),
                tokens=tuple(t for t in control.tokens if t.machine != name or t.used_ns is not None),
            )

        await self._update(change)
        log.warning("machine_revoked", machine=name)

    def machines(self) -> list[dict[str, object]]:
        """Return what ``machine list`` shows, by name."""
        return [
            {
                "name": machine.name,
                "id": id_to_hex(machine.id),
                "state": machine.state,
                "key": pki.fingerprint(machine.public_key),
                "enrolled": _rfc3339(datetime.fromtimestamp(machine.created_ns / 1e9, UTC)),
                "certificate_expires": _rfc3339(_expiry(machine)) if machine.serials else None,
            }
            for machine in sorted(self._known.control.machines, key=lambda machine: machine.name)
        ]

    async def renew_server(self) -> bool:
        """Give the server a new certificate when it is due for one; tell whether it was so.

        It lies with its key in the sealed ``control/`` object, and nowhere else.
        """

        def change(control: Control) -> Control:
            if not server_certificate_due(control, self._now()):
                return control
            return with_server_certificate(control, self._vault_id, self._clock.wall_ns())

        if not server_certificate_due(self._known.control, self._now()):
            return False
        await self._update(change)
        log.info("server_certificate_renewed", expires=_rfc3339(self.server_expires))
        return True

    @property
    def server(self) -> ServerIdentity:
        """The identity of the server that serves the vault."""
        server = self._known.control.server
        if server is None:
            raise Conflict("no server is on record in this vault", fix="run 'farshore server adopt' for one")
        return server

    @property
    def server_expires(self) -> datetime:
        """Until when the server's certificate is valid."""
        return pki.validity(self.server.certificate)[1]

    async def run(self) -> None:
        """Follow what other servers and operators change; ends only by being cancelled."""
        while True:
            await asyncio.sleep(REFRESH_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Read ``control/`` again. The store's failure is logged: what was known before stays in force."""
        # In turn with our updates, or what was read before one could be taken over after it.
        async with self._updating:
            try:
                control = await asyncio.to_thread(self._control.load)
            except FarshoreError as error:
                log.warning("control_refresh_failed", error=str(error))
                return
            self._learn(control)

    # --- inside ---

    async def _enrol(self, message: m.Enrol) -> m.Enrolled:
        if message.protocol != m.PROTOCOL:
            raise Refused("protocol", "another version of the protocol", why=str(message.protocol))
        public_key = _requested_key(message.csr)
        await self._look_for(message.token_id)
        now, now_ns, hash = self._now(), self._clock.wall_ns(), blake3(message.secret).digest()
        fresh_id = new_id()
        # Read by the last call of `change`, the one whose result is stored.
        outcome = _Outcome()

        def change(control: Control) -> Control:
            token = _checked_token(control, message, hash)
            machine = control.machine_named(message.machine)
            if machine is not None and machine.state == "failed-over":
                raise Refused("conflict", "the machine has failed over", where=machine.name)
            same_key = machine is not None and hmac.compare_digest(machine.public_key, public_key)
            if machine is not None and machine.state == "enrolled":
                if not same_key:
                    kind = Refused if token.used_ns is None else _Reused
                    raise kind("conflict", "the name is on record with another key", where=machine.name)
            elif same_key:
                raise Refused("denied", "this key was revoked", where=message.machine)
            if token.used_ns is not None:
                if machine is None or not same_key or token.used_by != machine.id:
                    raise _Reused("auth", "the token was used before")
            elif now_ns >= token.expires_ns:
                raise Refused("auth", "the token has expired")
            if machine is None and len(control.machines) >= MACHINES_MAX:
                raise Refused("capacity", f"the vault has {MACHINES_MAX} machines")
            machine_id = machine.id if machine else fresh_id
            certificate = self._authority.issue_agent(
                self._vault_id, machine_id, message.machine, public_key, now_ns
            )
            outcome.certificate, outcome.machine_id, outcome.repeated = certificate, machine_id, same_key
            enrolled = Machine(
                id=machine_id,
                name=message.machine,
                public_key=public_key,
                serials=_serials(machine.serials if machine and same_key else (), certificate, now),
                created_ns=machine.created_ns if machine else now_ns,
            )
            spent = msgspec.structs.replace(token, used_ns=token.used_ns or now_ns, used_by=machine_id)
            return msgspec.structs.replace(
                control,
                machines=_with(control.machines, enrolled),
                # The machine is welcome again; its old key is on record no more, and so refused.
                denied=tuple(entry for entry in control.denied if entry.machine != machine_id),
                tokens=tuple(spent if kept.id == spent.id else kept for kept in control.tokens),
            )

        await self._update(change)
        result = "repeated" if outcome.repeated else "enrolled"
        self._results.labels(result).inc()
        log.info(
            "machine_enrolled",
            machine=message.machine,
            token=message.token_id,
            key=pki.fingerprint(public_key),
            repeated=outcome.repeated,
        )
        return m.Enrolled(
            outcome.machine_id, self._vault_id, outcome.certificate, self._authority.certificate
        )

    async def _renew(self, message: m.Renew) -> m.Enrolled:
        if message.protocol != m.PROTOCOL:
            raise Refused("protocol", "another version of the protocol", why=str(message.protocol))
        public_key = _requested_key(message.csr)
        if self._known.control.machine(message.machine_id) is None:
            await self._reload()
        now, now_ns = self._now(), self._clock.wall_ns()
        # What we know first: a stranger's request costs the vault nothing.
        machine = self._checked_machine(self._known.control, message.machine_id, public_key, now)
        certificate = self._authority.issue_agent(
            self._vault_id, machine.id, machine.name, public_key, now_ns
        )
        issued = _expiry(machine) - pki.AGENT_LIFE if machine.serials else None
        # One that asks again and again gets its certificates, but does not make the vault write each of them.
        if issued is None or not timedelta(0) <= now - issued < timedelta(seconds=RECORD_S):

            def change(control: Control) -> Control:
                current = self._checked_machine(control, message.machine_id, public_key, now)
                serials = _serials(current.serials, certificate, now)
                renewed = msgspec.structs.replace(current, serials=serials)
                return msgspec.structs.replace(control, machines=_with(control.machines, renewed))

            await self._update(change)
        self._results.labels("renewed").inc()
        log.info("machine_renewed", machine=machine.name, key=pki.fingerprint(public_key))
        return m.Enrolled(machine.id, self._vault_id, certificate, self._authority.certificate)

    def _checked_machine(
        self, control: Control, machine_id: bytes, public_key: bytes, now: datetime
    ) -> Machine:
        machine = control.machine(machine_id)
        if machine is None or not hmac.compare_digest(machine.public_key, public_key):
            # One answer for both: a stranger does not learn which machines there are.
            raise Refused("auth", "no machine with this id and key is on record", why="enrol it again")
        if machine.state != "enrolled" or any(entry.machine == machine_id for entry in control.denied):
            raise Refused("denied", "this machine was revoked", where=machine.name)
        if machine.serials and now > _expiry(machine) + RENEWAL_GRACE:
            raise Refused(
                "auth",
                "the certificate ended more than 30 days ago",
                where=machine.name,
                why="enrol it again",
            )
        return machine

    async def _look_for(self, token_id: bytes) -> None:
        if not any(token.id == token_id for token in self._known.control.tokens):
            await self._reload()
        if not any(token.id == token_id for token in self._known.control.tokens):
            raise Refused(
                "auth", "there is no such token", why="it was never made, or it is long past its end"
            )

    async def _reload(self) -> None:
        if self._clock.monotonic() - self._known.at >= RELOAD_S:
            await self.refresh()

    async def _update(self, change: Callable[[Control], Control]) -> None:
        if self._waiting >= WAITING_MAX:
            raise Refused("retry", "too many enrolments at once")
        self._waiting += 1
        try:
            async with self._updating:
                self._learn(await asyncio.to_thread(self._control.update, change))
        finally:
            self._waiting -= 1

    def _learn(self, control: Control) -> None:
        """Take over what was read, and tell of the machines that were allowed until now. Synchronous."""
        before, self._known = self._known, _Known.of(control, self._clock.monotonic())
        for machine_id in before.machines.keys() - self._known.machines.keys():
            log.warning("machine_denied", machine=before.machines[machine_id].name)
            for listener in self._deny_listeners:
                listener(machine_id)

    def _count(self, code: str, who: str) -> None:
        self._results.labels(code).inc()
        log.warning("enrolment_refused", machine=who[:64], code=code)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.wall_ns() / 1e9, UTC)


class _Reused(Refused):
    """A spent token was shown by somebody else than the one who spent it."""


@dataclass(slots=True)
class _Outcome:
    machine_id: bytes = b""
    certificate: bytes = b""
    repeated: bool = False


def server_certificate_due(control: Control, now: datetime) -> bool:
    """Tell whether the server needs a certificate: none yet, two thirds of its life over, or another CA's."""
    if control.server is None or not pki.is_issued_by(control.server.certificate, control.ca_certificate):
        return True
    not_before, not_after = pki.validity(control.server.certificate)
    issued = not_before + pki.SERVER_CLOCK_LEEWAY
    # A clock that was set back needs a new one as well: agents with the right time would refuse the old.
    return not not_before <= now < issued + (not_after - issued) * 2 / 3


def with_server_certificate(control: Control, vault_id: bytes, now_ns: int) -> Control:
    """Return the settings with a new key and certificate for the server that is on record there."""
    assert control.server is not None
    issued = pki.Authority(control.ca_certificate, control.ca_key).issue_server(vault_id, now_ns)
    server = msgspec.structs.replace(control.server, certificate=issued.certificate, key=issued.private_key)
    return msgspec.structs.replace(control, server=server)


def _requested_key(request: bytes) -> bytes:
    try:
        return pki.read_request(request)
    except AuthError as error:
        raise Refused("auth", error.what, why=error.why) from error


def _checked_token(control: Control, message: m.Enrol, hash: bytes) -> Token:
    token = next((token for token in control.tokens if token.id == message.token_id), None)
    if token is None or not hmac.compare_digest(token.hash, hash):
        raise Refused("auth", "there is no such token")
    if token.machine != message.machine:
        raise Refused("auth", "the token is for another machine")
    return token


def _unforgotten(tokens: tuple[Token, ...], now_ns: int) -> tuple[Token, ...]:
    kept_ns = round(TOKEN_KEPT.total_seconds() * 1e9)
    return tuple(token for token in tokens if now_ns < token.expires_ns + kept_ns)


def _with(machines: tuple[Machine, ...], changed: Machine) -> tuple[Machine, ...]:
    return (*(machine for machine in machines if machine.id != changed.id), changed)


def _serials(known: tuple[str, ...], certificate: bytes, now: datetime) -> tuple[str, ...]:
    peer_serial = pki.serial_of(certificate)
    live = [serial for serial in known if pki.expiry_of_serial(int(serial, 16)) > now]
    return (*live[-(SERIALS_KEPT - 1) :], f"{peer_serial:x}")


def _expiry(machine: Machine) -> datetime:
    return max(pki.expiry_of_serial(int(serial, 16)) for serial in machine.serials)


def _rfc3339(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")
