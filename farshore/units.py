"""Sizes and durations as people write them, in bytes and seconds."""

import re
from fractions import Fraction
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

SECTOR_BYTES: Final = 512
"""Smallest unit a disk is addressed in (ATA and SCSI sector); offsets and lengths are multiples of it."""

# A letter alone or with "iB" is binary, as in qemu-img, dd and systemd; "kB", "MB" are decimal, as in SI.
_SIZE_UNITS: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    **{
        spelling: 1024**power
        for power, letter in enumerate("kmgtp", start=1)
        for spelling in (letter, f"{letter}ib")
    },
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", start=1)},
}
_SIZE_STEPS: Final = (("PiB", 1024**5), ("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB))
_SIZE: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})")

_DURATION_UNITS: Final[dict[str, Fraction]] = {
    "us": Fraction(1, 1_000_000),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86_400),
    "w": Fraction(7 * 86_400),
}
_DURATION_PART: Final = re.compile(r" ?([0-9]{1,12}(?:\.[0-9]{1,9})?) ?(us|ms|min|[smhdw])")
_SECONDS: Final = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,9})?")


def parse_size(text: str) -> int:
    """Return the bytes that ``text`` means: ``"4096"``, ``"64K"``, ``"64KiB"``, ``"1.5 GiB"``, ``"10MB"``.

    Raises:
        ValueError: Not a size, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write for example 512, 64KiB, 10GiB or 10GB")
    size = Fraction(match[1]) * factor
    if size.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return size.numerator


def format_size(size_bytes: int) -> str:
    """Return ``size_bytes`` for a person, rounded to three digits or so: ``"1.5 GiB"``.

    An exact multiple is printed exactly, so that a size given as ``64KiB`` is shown as ``64 KiB``.
    """
    sign, size = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    for unit, factor in _SIZE_STEPS:
        if size >= factor:
            whole, rest = divmod(size, factor)
            return (
                f"{sign}{whole} {unit}" if rest == 0 or whole >= 100 else f"{sign}{size / factor:.1f} {unit}"
            )
    return f"{sign}{size} B"


def parse_duration(text: str) -> float:
    """Return the seconds that ``text`` means: ``"500ms"``, ``"60s"``, ``"1h30m"``; a bare number is seconds.

    Raises:
        ValueError: Not a duration.
    """
    stripped = text.strip()
    if _SECONDS.fullmatch(stripped):
        return float(stripped)
    at, total = 0, Fraction(0)
    while match := _DURATION_PART.match(stripped, at):
        total += Fraction(match[1]) * _DURATION_UNITS[match[2]]
        at = match.end()
    if at == 0 or at != len(stripped):
        raise ValueError(f"{text!r} is not a duration; write for example 500ms, 60s, 1h30m or 7d")
    return float(total)


def format_duration(duration_s: float) -> str:
    """Return ``duration_s`` for a person, in at most two units: ``"350ms"``, ``"12.5s"``, ``"1h30m"``."""
    if duration_s < 0:
        return f"-{format_duration(-duration_s)}"
    if duration_s < 0.001:
        return f"{duration_s * 1e6:.0f}us" if duration_s else "0s"
    if duration_s < 0.9995:
        return f"{duration_s * 1000:.0f}ms"
    if duration_s < 59.95:
        return f"{duration_s:.1f}s".replace(".0s", "s")
    seconds = round(duration_s)
    for large, small, small_s in (("d", "h", 3600), ("h", "m", 60), ("m", "s", 1)):
        large_s = int(_DURATION_UNITS[large])
        if seconds >= large_s:
            whole, rest = divmod(seconds, large_s)
            return f"{whole}{large}{rest // small_s}{small}" if rest >= small_s else f"{whole}{large}"
    return f"{seconds}s"
