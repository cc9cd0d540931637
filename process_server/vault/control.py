"""``control/``: what a server must know to serve a vault, kept in the vault, changed by compare-and-swap.

The newest object is the one that ``root`` names, with its digest; one that ``root`` never named was left by a
try that lost, or by a crash.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Final, Literal

import msgspec
from blake3 import blake3

from farshore.errors import Conflict, FarshoreError, IntegrityError, NotFound, Unreachable
from farshore.failpoints import failpoint
from farshore.ids import ID_BYTES, new_id
from process_server.vault.keys import VaultKeys
from process_server.vault.root import ROOT, Root, check_format, decode_root, encode_root
from process_server.vault.seal import Kind, SealedObject, seal
from process_server.vault.store.protocol import AlreadyExists, Precondition, Store

FORMAT: Final = 1
KEPT: Final = 16
"""Control objects kept below the newest: for a reader that read an older root, and for the curious."""
TRIES_MAX: Final = 64
_RECENT_MAX: Final = 64

_Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_TimeNs = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

MachineState = Literal["enrolled", "denied", "failed-over", "removed"]


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A protected server.

    Attributes:
        public_key: DER SubjectPublicKeyInfo of the key that it enrolled with.
        serials: Serial numbers of its certificates, in lower-case hex, oldest first; those that expired are
            dropped.
    """

    id: _Id
    name: str
    public_key: bytes
    serials: tuple[str, ...] = ()
    state: MachineState = "enrolled"
    created_ns: _TimeNs


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """An enrolment token: ``hash`` is BLAKE3 of its secret, ``machine`` the only name it is good for.

    ``used_by`` is the id of the machine that spent it, at ``used_ns``.
    """

    id: bytes
    hash: _Digest
    machine: str
    expires_ns: _TimeNs
    used_ns: _TimeNs | None = None
    used_by: _Id | None = None


class Denied(msgspec.Struct, frozen=True, kw_only=True):
    """A machine, or one certificate of it, that is refused from ``since_ns`` on. One of the two is set."""

    machine: _Id | None = None
    serial: str | None = None
    since_ns: _TimeNs
    reason: str = ""


class ServerIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """The server's id (the ``writer`` of its commits), certificate and key (PEM), and where it is reached."""

    id: _Id
    certificate: bytes
    key: bytes
    addresses: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"ServerIdentity(id={self.id.hex()}, addresses={self.addresses})"


class MachinePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What differs from the vault's defaults for one machine; None is the default."""

    machine: _Id
    point_interval_s: float | None = None
    rpo_threshold_s: float | None = None
    chunk_bytes: int | None = None


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """Everything in ``control/``. A new field needs a default; if old servers must not lose it, a new format.

    Attributes:
        ca_certificate, ca_key: PEM, empty before the first server made them.
        server: The identity of the server that serves the vault.
        updates: Nonces of the newest updates, which tell our own from another's after an unknown outcome.
    """

    format: int = FORMAT
    ca_certificate: bytes = b""
    ca_key: bytes = b""
    server: ServerIdentity | None = None
    machines: tuple[Machine, ...] = ()
    tokens: tuple[Token, ...] = ()
    denied: tuple[Denied, ...] = ()
    policies: tuple[MachinePolicy, ...] = ()
    point_interval_s: float = 1.0
    rpo_threshold_s: float = 60.0
    updates: tuple[_Id, ...] = ()

    def machine(self, id: bytes) -> Machine | None:
        """Return the machine with this id."""
        return next((machine for machine in self.machines if machine.id == id), None)

    def machine_named(self, name: str) -> Machine | None:
        """Return the machine with this name."""
        return next((machine for machine in self.machines if machine.name == name), None)

    def __repr__(self) -> str:
        return f"Control(machines={len(self.machines)}, tokens={len(self.tokens)}, denied={len(self.denied)})"


class ControlStore:
    """Loads and changes `Control`. Any number of threads, processes and servers may do so at once.

    Args:
        store: The vault's.
        keys: Of the vault.
    """

    def __init__(self, store: Store, keys: VaultKeys) -> None:
        self._store, self._keys = store, keys

    def load(self) -> Control:
        """Return the newest state; an empty one in a new vault.

        Raises:
            IntegrityError: ``root`` or the object it names is damaged, missing, or of a newer format.
            FarshoreError: Of the store.
        """
        return self._load()[2]

    def root(self) -> Root:
        """Return ``root``, authenticated. Raises as `load`."""
        return self._load_root()[0]

    def update(self, change: Callable[[Control], Control]) -> Control:
        """Replace the state by ``change`` of it, atomically, and return what is stored; durable on return.

        Args:
            change: A pure function; called again when another update came first. What it raises is passed on
                and nothing is changed.

        Raises:
            Conflict: Others kept coming first.
            Unreachable: The store did not answer; the change may have been made, or be made yet. To repeat it
                is safe when ``change`` looks at what is there.
            FarshoreError: Of the store; or as `load`.
        """
        nonce = new_id()
        for _ in range(TRIES_MAX):
            root, etag, control = self._load()
            if nonce in control.updates:  # our try, whose answer was lost
                return control
            wanted = change(control)
            wanted = msgspec.structs.replace(
                wanted, format=FORMAT, updates=(*control.updates, nonce)[-_RECENT_MAX:]
            )
            number, digest = self._store_control(root.control, wanted)
            failpoint("vault.control.before_root")
            new_root = msgspec.structs.replace(
                root,
                control=number,
                control_digest=digest,
                chains=tuple(sorted({*root.chains, *(machine.id for machine in wanted.machines)})),
            )
            try:
                self._store.cas(ROOT, encode_root(new_root, self._keys.root_key), etag)
            except Precondition:
                continue
            except Unreachable:
                # It may be there, or come yet: only a root that has changed can say which.
                if self._load_root()[1] == etag:
                    raise
                continue
            failpoint("vault.control.after_root")
            with suppress(FarshoreError):
                self._drop_old(number)
            return wanted
        raise Conflict("cannot change the vault's settings", why="others kept changing them", fix="try again")

    def _load_root(self) -> tuple[Root, str]:
        body, etag = self._store.get_with_etag(ROOT)
        return decode_root(body, self._keys.root_key), etag

    def _load(self) -> tuple[Root, str, Control]:
        for _ in range(TRIES_MAX):
            root, etag = self._load_root()
            if root.control == 0:
                return root, etag, Control()
            name = control_name(root.control)
            try:
                body = self._store.get(name)
            except NotFound as exc:
                if self._load_root()[1] == etag:
                    raise IntegrityError("the vault's settings are missing", where=name) from exc
                continue  # replaced and dropped between our two reads
            if blake3(body).digest() != root.control_digest:
                raise IntegrityError(
                    "the vault's settings are damaged", where=name, why="not the object that root names"
                )
            sealed = SealedObject.parse(self._keys, Kind.CONTROL, name, body)
            check_format(sealed.head, name)
            try:
                return root, etag, msgspec.msgpack.decode(sealed.head, type=Control)
            except msgspec.MsgspecError as exc:
                raise IntegrityError("the vault's settings are damaged", where=name, why=str(exc)) from exc
        raise Conflict("cannot read the vault's settings", why="they kept changing", fix="try again")

    def _store_control(self, current: int, control: Control) -> tuple[int, bytes]:
        """Create the next control object whose number is free; return number and digest."""
        head = msgspec.msgpack.encode(control)
        for number in range(current + 1, current + 1 + TRIES_MAX):
            body = seal(self._keys, Kind.CONTROL, control_name(number), head)
            try:
                self._store.put_new(control_name(number), body)
            except AlreadyExists:
                continue
            return number, blake3(body).digest()
        raise Conflict(
            "cannot change the vault's settings", why="every next number is taken", fix="try again"
        )

    def _drop_old(self, newest: int) -> None:
        for name in list(self._store.list("control/")):
            tail = name.removeprefix("control/")
            if len(tail) == 20 and tail.isdigit() and int(tail) < newest - KEPT:
                self._store.delete(name)


def control_name(number: int) -> str:
    """Return the object name of a state."""
    return f"control/{number:020}"
