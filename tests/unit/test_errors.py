import inspect
import pickle

import pytest

from farshore import errors
from farshore.errors import (
    CapacityError,
    Conflict,
    CorruptRecord,
    FarshoreError,
    Fenced,
    IntegrityError,
    NotFound,
    Unreachable,
    WrongKey,
)

CLASSES: list[type[FarshoreError]] = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, FarshoreError) and found.__module__ == errors.__name__
]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NotFound("no such machine"), "no such machine"),
        (NotFound("no such machine", where="db1"), "no such machine: db1"),
        (NotFound("no such machine", fix="see status"), "no such machine; see status"),
        (CapacityError("full", where="/j", why="quota", fix="raise it"), "full: /j: quota; raise it"),
        (Unreachable("store", why="line one\n  line two"), "store: line one line two"),
        (CorruptRecord(4096, "checksum", where="7.hrl"), "corrupt record at byte 4096: 7.hrl: checksum"),
    ],
)
def test_an_error_is_one_line_of_what_where_why_fix(error: FarshoreError, text: str) -> None:
    assert str(error) == text
    assert error.as_dict()["message"] == text


def test_exit_codes_are_the_contract() -> None:
    assert {found.__name__: found.exit_code for found in CLASSES} == {
        "FarshoreError": 1,
        "Failed": 1,
        "UsageError": 2,
        "ConfigError": 3,
        "AuthError": 4,
        "NotFound": 5,
        "Conflict": 6,
        "Fenced": 6,
        "IntegrityError": 7,
        "WrongKey": 7,
        "CorruptRecord": 7,
        "CapacityError": 8,
        "Unreachable": 9,
    }


def test_only_what_can_pass_by_itself_is_retried() -> None:
    assert [found.__name__ for found in CLASSES if found.retryable] == ["Unreachable"]


def test_reactions_that_include_another() -> None:
    assert issubclass(Fenced, Conflict)
    assert issubclass(WrongKey, IntegrityError)
    assert issubclass(CorruptRecord, IntegrityError)


@pytest.mark.parametrize(
    "error",
    [CapacityError("full", where="/j", why="quota", fix="raise it"), CorruptRecord(512, "torn", where="x")],
)
def test_an_error_survives_the_way_back_from_a_worker_process(error: FarshoreError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.as_dict() == error.as_dict()
