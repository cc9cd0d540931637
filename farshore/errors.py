"""The error tree: one class per reaction of the caller, not per cause.

Every error says what failed, where, why and what to do about it, on one line. The exit code belongs to the
class, so that the command line needs no table of its own; only `farshore.cli` turns it into a process exit.
"""

from typing import ClassVar


class FarshoreError(Exception):
    """Base of every error that we raise on purpose. Never raised itself: take the class whose reaction fits.

    Attributes:
        exit_code: What the command line ends with (DESIGN, section 10).
        retryable: Trying the same again, unchanged, can succeed.
        what: What failed, as a short phrase: "cannot read the journal".
        where: The file, volume, machine, address or option concerned; may be empty.
        why: The reason, in the words of whoever refused; may be empty.
        fix: What the reader can do about it; may be empty.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    # Exception.__init__ is not called on purpose: __new__ has already kept the arguments as given, which is
    # what lets a subclass with another signature travel through pickle (worker processes).
    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __str__(self) -> str:
        """Return ``what: where: why; fix`` without the empty parts, always one line."""
        text = ": ".join(part for part in (self.what, self.where, self.why) if part)
        return " ".join((f"{text}; {self.fix}" if self.fix else text).split())

    def as_dict(self) -> dict[str, object]:
        """Return the parts for ``--json`` and logs; the keys are a contract."""
        return {
            "kind": type(self).__name__,
            "message": str(self),
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "fix": self.fix,
            "exit_code": self.exit_code,
            "retryable": self.retryable,
        }


class Failed(FarshoreError):
    """The operation was tried and did not succeed; nothing more precise is known."""


class UsageError(FarshoreError):
    """The caller asked for something that makes no sense as written."""

    exit_code: ClassVar[int] = 2


class ConfigError(FarshoreError):
    """A configuration file, environment variable or unit has to be changed by the operator."""

    exit_code: ClassVar[int] = 3


class AuthError(FarshoreError):
    """The peer or the user could not prove who it is, or may not do this."""

    exit_code: ClassVar[int] = 4


class NotFound(FarshoreError):
    """The thing named does not exist."""

    exit_code: ClassVar[int] = 5


class Conflict(FarshoreError):
    """The thing exists, is in use, or changed since it was looked at; look again before deciding."""

    exit_code: ClassVar[int] = 6


class Fenced(Conflict):
    """Somebody else owns this now. Step down; never retry under the old epoch, incarnation or timeline."""


class IntegrityError(FarshoreError):
    """Bytes are not what they were when we wrote them. Reading again cannot mend it."""

    exit_code: ClassVar[int] = 7


class WrongKey(IntegrityError):
    """The bytes are sound but sealed for another key: ask for the right one, do not call it damage."""


class CorruptRecord(IntegrityError):
    """A record or frame fails its own checks; whoever holds the volume decides between a cut and a resync.

    Attributes:
        at: Byte offset of the record in its file or stream.
        reason: Which check failed.
    """

    def __init__(self, at: int, reason: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(f"corrupt record at byte {at}", where=where, why=reason, fix=fix)
        self.at, self.reason = at, reason


class CapacityError(FarshoreError):
    """A disk, quota, memory bound or limit is full; free something or raise it."""

    exit_code: ClassVar[int] = 8


class Unreachable(FarshoreError):
    """A peer, store or database did not answer; the outcome of what was asked may be unknown."""

    exit_code: ClassVar[int] = 9
    retryable: ClassVar[bool] = True
