"""All failpoints of the tree, as one list: the names are used by crash tests and must not collide."""

import re

from farshore.failpoints import known_failpoints


def test_every_failpoint_is_named_area_dot_place_and_marks_one_place() -> None:
    known = known_failpoints()
    assert [name for name in known if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name)] == []
    assert {name: places for name, places in known.items() if len(places) > 1} == {}
