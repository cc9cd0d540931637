import pytest

from farshore.units import GIB, KIB, MIB, format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("64K", 64 * KIB),
        ("64k", 64 * KIB),
        ("64KiB", 64 * KIB),
        ("64 KiB", 64 * KIB),
        (" 10MiB ", 10 * MIB),
        ("10MB", 10_000_000),
        ("1.5GiB", 3 * GIB // 2),
        ("2T", 2 * 1024 * GIB),
        ("1P", 1024 * 1024 * GIB),
    ],
)
def test_parse_size_reads_what_people_write(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", " ", "-1", "1.5", "1,5G", "G", "1X", "1GiBs", "1  G", "1e9", "٣", "0x10", "9" * 40]
)
def test_parse_size_refuses_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (64 * KIB, "64 KiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (150 * MIB + 1, "150 MiB"),
        (-2 * MIB, "-2 MiB"),
        (5 * 1024**5, "5 PiB"),
        (20_000 * 1024**5, "20000 PiB"),
    ],
)
def test_format_size_is_short(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize("size", [0, 512, 64 * KIB, 10 * MIB, 3 * GIB])
def test_an_exact_size_is_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("60", 60.0),
        ("60s", 60.0),
        ("500ms", 0.5),
        ("20us", 0.00002),
        ("1.5h", 5400.0),
        ("1h30m", 5400.0),
        ("1h 30min", 5400.0),
        ("7d", 604_800.0),
        ("2w", 1_209_600.0),
    ],
)
def test_parse_duration_reads_what_people_write(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-5s", "5 parsecs", "1h30", "1y", "inf", "nan", "1e3s", "5S"])
def test_parse_duration_refuses_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.00005, "50us"),
        (0.35, "350ms"),
        (0.9999, "1s"),
        (12.5, "12.5s"),
        (59.99, "1m"),
        (65, "1m5s"),
        (5400, "1h30m"),
        (86_400 * 3 + 7200 + 59, "3d2h"),
        (-90, "-1m30s"),
    ],
)
def test_format_duration_uses_two_units_at_most(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
