"""All failpoints of the tree, as one list: the names are used by crash tests and must not collide."""

import re
from pathlib import Path

from farshore.failpoints import known_failpoints

KILLED_BY_AREA = ("journal.", "ingest.", "vault.chain.")
"""A crash test goes through all failpoints there are below these names."""


def test_every_failpoint_is_named_area_dot_place_and_marks_one_place() -> None:
    known = known_failpoints()
    assert [name for name in known if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name)] == []
    assert {name: places for name, places in known.items() if len(places) > 1} == {}


def test_every_failpoint_is_reached_by_a_test() -> None:
    """A place where nobody has ever died is only a claim."""
    folder = Path(__file__).parents[1]
    texts = "".join(path.read_text() for path in sorted(folder.rglob("test_*.py")) if path != Path(__file__))
    named = set(re.findall(r'["\'](?:\w+=)?([a-z_]+(?:\.[a-z_]+)+)[=:"\']', texts))
    others = {name for name in known_failpoints() if not name.startswith(KILLED_BY_AREA)}
    assert others - named == set()
    assert all(any(name.startswith(area) for name in known_failpoints()) for area in KILLED_BY_AREA)
