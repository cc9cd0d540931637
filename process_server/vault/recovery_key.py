"""The recovery key: the secret that people keep on paper."""

import base64
import hmac
import re
import secrets
from typing import Final

from blake3 import blake3

from farshore.errors import UsageError

SECRET_BYTES: Final = 32

_PREFIX: Final = "FSRK-"
_CHECKSUM_BYTES: Final = 3
_DIGITS: Final = 8 * (SECRET_BYTES + _CHECKSUM_BYTES) // 5
_BASE32: Final = re.compile(r"[A-Z2-7]*")
# Digits that Base32 does not have, written for the letters they look like. A wrong guess meets the checksum.
_LOOKALIKES: Final = str.maketrans("018", "OIB")


class RecoveryKey:
    """The secret that opens a vault when everything else is lost. 32 random bytes; never in a repr or log."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a recovery key has {SECRET_BYTES} bytes, not {len(secret)}")
        self._secret = secret

    @classmethod
    def generate(cls) -> "RecoveryKey":
        """Return a new key."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> "RecoveryKey":
        """Return the key that `format` wrote; case, spaces, dashes and 0, 1, 8 for O, I, B do not matter.

        Raises:
            UsageError: Not a recovery key, or mistyped. The message does not repeat what was typed.
        """
        digits = re.sub(r"[\s-]", "", text).upper().removeprefix(_PREFIX[:-1]).translate(_LOOKALIKES)
        if len(digits) != _DIGITS or not _BASE32.fullmatch(digits):
            raise UsageError(
                "not a recovery key",
                why=f"{len(digits)} digits after {_PREFIX}, or one that is none",
                fix=f"it is {_PREFIX} and {_DIGITS} letters and digits 2 to 7, in groups of 4",
            )
        raw = base64.b32decode(digits)
        secret, checksum = raw[:SECRET_BYTES], raw[SECRET_BYTES:]
        if not hmac.compare_digest(checksum, _checksum(secret)):
            raise UsageError(
                "the recovery key is mistyped",
                why="its checksum does not match",
                fix="compare it with the original, group by group",
            )
        return cls(secret)

    def format(self) -> str:
        """Return the text to print or store: ``FSRK-`` and 14 groups of 4 digits."""
        digits = base64.b32encode(self._secret + _checksum(self._secret)).decode()
        return _PREFIX + "-".join(digits[at : at + 4] for at in range(0, _DIGITS, 4))

    @property
    def secret(self) -> bytes:
        """The 32 bytes themselves."""
        return self._secret

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecoveryKey) and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash((RecoveryKey, self._secret))

    def __repr__(self) -> str:
        return "RecoveryKey(…)"


def _checksum(secret: bytes) -> bytes:
    return blake3(b"farshore recovery key 1" + secret).digest(length=_CHECKSUM_BYTES)
