"""What an object store answered, and which of our errors that is.

obstore gives a refusal as text: a sentence, the store's own reply, then the insides of its client. Taken from
it are a status, a code and a kind, never the text itself: the request's address is in it, perhaps signed.
"""

import re
from dataclasses import dataclass
from typing import Final

from farshore.errors import CapacityError, ConfigError, Failed, FarshoreError, NotFound, Unreachable

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>")
_KIND: Final = re.compile(r"\bkind: (Connect|Timeout|Interrupted|Request|Decode|Unknown)\b")
_REASON: Final = re.compile(r'\b(?:message|error): "([^"\\]{1,120})"')

_NO_BUCKET: Final = frozenset({"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"})
_SKEWED: Final = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
_EXPIRED: Final = frozenset({"ExpiredToken", "TokenRefreshRequired"})
_ELSEWHERE: Final = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
_FULL: Final = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage"})
_ARCHIVED: Final = frozenset({"InvalidObjectState", "BlobArchived", "BlobBeingRehydrated"})
_EXISTS: Final = frozenset({"BlobAlreadyExists", "PreconditionFailed"})
_AGAIN: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_FULL_STATUS: Final = 507
_METADATA: Final = ("169.254.169.254", "/latest/api/token", "/latest/meta-data/", "/oauth2/")
_UNTRUSTED: Final = ("UnknownIssuer", "invalid peer certificate", "NotValidForName", "CertExpired")


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said.

    Attributes:
        status: HTTP status, 0 when there was no whole answer.
        code: The store's own word for it, or empty.
        kind: Of a connection that failed: ``Connect``, ``Timeout``, …; or empty.
        reason: Why, in the words of the system; or empty.
        is_missing: There is no such object, or no such bucket.
        is_past_the_end: Of a range: the object ends before it.
        is_redirected: The bucket is elsewhere, and it was not said where.
        is_untrusted: The certificate of whoever answered is not good.
        is_unknown_caller: No credentials were found, or the place where they are given out failed.
        ignores_ranges: All of the object came where a part was asked for.
    """

    status: int = 0
    code: str = ""
    kind: str = ""
    reason: str = ""
    is_missing: bool = False
    is_past_the_end: bool = False
    is_redirected: bool = False
    is_untrusted: bool = False
    is_unknown_caller: bool = False
    ignores_ranges: bool = False

    @classmethod
    def of(cls, exc: BaseException) -> "Answer":
        """Return what the library's error says."""
        text = str(exc)
        first = text.partition("\n")[0]
        status, code = _STATUS.search(text), _CODE.search(text)
        kind, reason = _KIND.search(text), _REASON.search(text)
        return cls(
            status=int(status[1]) if status else 0,
            code=code[1] if code else "",
            kind=kind[1] if kind else "",
            reason=reason[1] if reason else "",
            is_missing=isinstance(exc, FileNotFoundError),
            is_past_the_end=bool(status and status[1] == "416") or "StartTooLarge" in text,
            is_redirected="BareRedirect" in text,
            is_untrusted=any(mark in text for mark in _UNTRUSTED),
            is_unknown_caller=any(mark in first for mark in _METADATA),
            ignores_ranges="non-partial response" in text,
        )

    @property
    def is_no_bucket(self) -> bool:
        """There is no such bucket, whatever else was asked."""
        return self.code in _NO_BUCKET

    @property
    def is_undecided(self) -> bool:
        """A create was refused, and not because the object exists."""
        return self.status == 409 and self.code not in _EXISTS

    @property
    def told(self) -> str:
        """Status and code, for a message."""
        return " ".join(filter(None, (str(self.status or ""), self.code)))


def error_of(answer: Answer, what: str, name: str, store: str) -> FarshoreError:
    """Return the error that ``answer`` is to the caller.

    Args:
        what: What failed, as in `FarshoreError`.
        name: The object.
        store: The store's address without its options.
    """
    return _setting(answer, store) or _outcome(answer, what, name)


def _setting(answer: Answer, store: str) -> FarshoreError | None:
    """Return the error that is about the store as a whole and not about one object, if it is one."""
    if answer.is_untrusted:
        return ConfigError(
            "the store's certificate is not trusted",
            where=store,
            fix="check endpoint, or name the authority that signed it with ca=FILE",
        )
    if answer.is_unknown_caller:
        # A busy metadata service is asked again; where there is none, nothing may answer at all.
        silent = answer.kind in ("Timeout", "Interrupted") or answer.status in _AGAIN
        error = Unreachable if silent else ConfigError
        return error(
            "there are no credentials for the store",
            where=store,
            why="the metadata of this instance did not answer" if silent else answer.told,
            fix="set the provider's variables in the environment, or LoadCredential= in the unit",
        )
    if answer.is_no_bucket:
        return ConfigError(
            "there is no such bucket", where=store, why=answer.code, fix="make it first, or check the address"
        )
    if answer.code in _SKEWED:
        return ConfigError(
            "this host's clock differs from the store's", where=store, why=answer.code, fix="set the clock"
        )
    if answer.code in _ELSEWHERE or answer.is_redirected or 300 <= answer.status < 400:
        return ConfigError(
            "the bucket is in another region",
            where=store,
            why=answer.told,
            fix="add region=NAME to the address",
        )
    if answer.code in _ARCHIVED:
        return ConfigError(
            "an object lies in an archive",
            where=store,
            why=answer.code,
            fix="restore it to a tier that can be read at once",
        )
    if answer.code in _EXPIRED or (answer.status in (401, 403) and answer.code not in _FULL):
        return ConfigError(
            "the store refuses the credentials",
            where=store,
            why=answer.told,
            fix="they must be valid, and allow to get, put, delete and list objects",
        )
    return None


def _outcome(answer: Answer, what: str, name: str) -> FarshoreError:
    if answer.is_missing:
        return NotFound("no such object", where=name)
    if answer.status == _FULL_STATUS or answer.code in _FULL:
        return CapacityError(
            what, where=name, why=answer.told, fix="free space in the store, or raise its quota"
        )
    if answer.ignores_ranges:
        return Failed(what, where=name, why="the store answers a part of an object with all of it")
    if answer.status in _AGAIN:
        return Unreachable(what, where=name, why=f"the store answered {answer.told}")
    if answer.status:
        return Failed(what, where=name, why=f"the store answered {answer.told}")
    words = {"Timeout": "no answer in time", "Connect": "no connection"}.get(
        answer.kind, "the connection was lost"
    )
    return Unreachable(what, where=name, why=": ".join(filter(None, (words, answer.reason))))
