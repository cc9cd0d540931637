"""Commits: what is encoded is decoded, and every rule of the format is checked on both sides."""

import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3

from farshore.errors import IntegrityError, NotFound
from process_server.vault import commit as module
from process_server.vault.commit import (
    NO_ROWS,
    ROW_DTYPE,
    ZEROS,
    Commit,
    CommitHead,
    CommitVolume,
    Rows,
    Timeline,
    commit_name,
    decode_commit,
    encode_commit,
    point_id,
)
from process_server.vault.keys import VaultKeys
from process_server.vault.pack import PackBuilder
from process_server.vault.seal import Kind, seal

KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
MACHINE = b"M" * 16
NAME = commit_name(MACHINE, 7)
A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
PACK = b"p" * 16


def volume(id: bytes, **changes: Any) -> CommitVolume:
    return msgspec.structs.replace(
        CommitVolume(
            id=id,
            name=id[:1].decode(),
            size_bytes=1_000_000,
            incarnation=b"i" * 16,
            ordinal=1,
            lsn=100,
            digest=b"d" * 32,
            fuzzy=False,
            copied=True,
            copy_end=0,
        ),
        **changes,
    )


HEAD = CommitHead(
    machine=MACHINE,
    machine_name="db1",
    seq=7,
    kind="data",
    previous=b"P" * 32,
    epoch=3,
    timeline=Timeline(id=b"t" * 16),
    writer=b"w" * 16,
    nonce=b"n" * 16,
    time_ns=1_700_000_000_000_000_000,
    cut_seq=9,
    tag="before the upgrade",
    consistency="crash",
    volumes=(volume(A), volume(B), volume(C)),
)


def rows(*values: tuple[int, ...]) -> Rows:
    """offset, length, lsn, pack, chunk, start"""
    table = np.zeros(len(values), ROW_DTYPE)
    for index, (offset, length, lsn, pack, chunk, start) in enumerate(values):
        table[index] = (offset, length, lsn, 5, pack, chunk, start, 0)
    return table


GOOD = rows((0, 4096, 0, 0, 0, 0), (4096, 900_000, 0, ZEROS, 0, 0), (512, 512, 99, 1, 3, 512))


def test_a_commit_comes_back_as_it_was_made() -> None:
    builder = PackBuilder(KEYS)
    builder.add(KEYS.chunk_id(blake3(b"data").digest()), b"data")
    inline = builder.build()
    body = encode_commit(KEYS, HEAD, {A: GOOD, C: GOOD[:1]}, [PACK, inline.id], {inline.id: inline.body})
    commit = decode_commit(KEYS, NAME, body)
    assert [found.extents for found in commit.head.volumes] == [3, 0, 1]
    assert commit.rows_of(A).tolist() == GOOD.tolist()
    assert commit.rows_of(B).tolist() == commit.rows_of(b"?" * 16).tolist() == []
    assert commit.rows_of(C).tolist() == GOOD[:1].tolist()
    assert commit.volume(B) == volume(B)
    assert commit.volume(b"?" * 16) is None
    assert [(pack.id, pack.inline) for pack in commit.head.packs] == [(PACK, None), (inline.id, 2)]
    assert commit.inline_ids == [inline.id]
    assert commit.inline_pack(inline.id) == inline.body
    assert commit.inline_reader().read_chunk(inline.id, 0) == b"data"
    assert (commit.digest, commit.size_bytes) == (blake3(body).digest(), len(body))
    with pytest.raises(NotFound):
        commit.inline_pack(PACK)
    assert msgspec.structs.replace(commit.head, volumes=HEAD.volumes, packs=()) == HEAD


def test_a_commit_without_rows_and_a_fence() -> None:
    fence = msgspec.structs.replace(HEAD, kind="fence", cut_seq=None, tag=None, consistency="fuzzy")
    for head in (HEAD, fence, msgspec.structs.replace(HEAD, volumes=())):
        commit = decode_commit(KEYS, NAME, encode_commit(KEYS, head, {}))
        assert (commit.head, len(commit.rows)) == (head, 0)


def test_rows_of_a_commit_cannot_be_changed_by_their_reader() -> None:
    commit = decode_commit(KEYS, NAME, encode_commit(KEYS, HEAD, {A: GOOD}, [PACK, B]))
    with pytest.raises(ValueError, match="read-only"):
        commit.rows["offset"] = 0


def test_names() -> None:
    assert f"c/{MACHINE.hex()}/00000000000000000007" == NAME
    assert point_id(MACHINE, 7) == "rp-4d4d4d4d-7"
    assert ROW_DTYPE.itemsize == 48


BROKEN: dict[str, tuple[CommitHead, dict[bytes, Rows], list[bytes]]] = {
    "outside": (HEAD, {A: rows((999_999, 2, 0, ZEROS, 0, 0))}, []),
    "outside, longer than the volume": (HEAD, {A: rows((0, 1_000_001, 0, ZEROS, 0, 0))}, []),
    "outside, wrapping around": (HEAD, {A: rows((2**64 - 512, 1024, 0, ZEROS, 0, 0))}, []),
    "outside of an empty volume": (
        msgspec.structs.replace(HEAD, volumes=(volume(A, size_bytes=0),)),
        {A: rows((0, 1, 0, ZEROS, 0, 0))},
        [],
    ),
    "no length": (HEAD, {A: rows((0, 0, 0, ZEROS, 0, 0))}, []),
    "no such pack": (HEAD, {A: rows((0, 1, 0, 1, 0, 0))}, [PACK]),
    "no packs": (HEAD, {A: rows((0, 1, 0, 0, 0, 0))}, []),
    "LSN past the cut": (HEAD, {A: rows((0, 1, 101, ZEROS, 0, 0))}, []),
    "LSNs out of order": (HEAD, {A: rows((0, 1, 2, ZEROS, 0, 0), (0, 1, 1, ZEROS, 0, 0))}, []),
    "copied after records": (HEAD, {A: rows((0, 1, 2, ZEROS, 0, 0), (0, 1, 0, ZEROS, 0, 0))}, []),
    "zeros with a chunk": (HEAD, {A: rows((0, 1, 0, ZEROS, 1, 0))}, []),
    "zeros with a start": (HEAD, {A: rows((0, 1, 0, ZEROS, 0, 1))}, []),
    "longer than a chunk": (
        msgspec.structs.replace(HEAD, volumes=(volume(A, size_bytes=2**40),)),
        {A: rows((0, 2**20 + 1, 0, 0, 0, 0))},
        [PACK],
    ),
    "past the longest chunk": (HEAD, {A: rows((0, 2, 0, 0, 0, 2**20 - 1))}, [PACK]),
    "a pack twice": (HEAD, {}, [PACK, PACK]),
    "a volume twice": (msgspec.structs.replace(HEAD, volumes=(volume(A), volume(A))), {}, []),
    "a fence with a cut": (msgspec.structs.replace(HEAD, kind="fence", tag=None), {}, []),
    "a fence with a tag": (msgspec.structs.replace(HEAD, kind="fence", cut_seq=None), {}, []),
    "a fence with rows": (
        msgspec.structs.replace(HEAD, kind="fence", cut_seq=None, tag=None),
        {A: GOOD[1:2]},
        [],
    ),
    "data without a cut": (msgspec.structs.replace(HEAD, cut_seq=None), {}, []),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_never_written_and_never_read(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, tables, packs = BROKEN[case]
    with pytest.raises(ValueError, match=r"."):
        encode_commit(KEYS, head, tables, packs)
    with monkeypatch.context() as blind:
        blind.setattr(module, "_broken_rule", lambda head, rows: "")
        body = encode_commit(KEYS, head, tables, packs)
    with pytest.raises(IntegrityError, match="cannot read the commit"):
        decode_commit(KEYS, NAME, body)


def test_a_field_that_must_be_zero_is_looked_at() -> None:
    bad = GOOD[1:2].copy()
    bad["zero"] = 1
    with pytest.raises(ValueError, match="must be zero"):
        encode_commit(KEYS, HEAD, {A: bad})


def test_rows_and_packs_of_nobody_are_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="not in the head"):
        encode_commit(KEYS, HEAD, {b"?" * 16: NO_ROWS})
    with pytest.raises(ValueError, match="not in the table"):
        encode_commit(KEYS, HEAD, {}, [PACK], {A: b"pack"})


def _raw(change: Callable[[dict[str, Any]], object], sections: list[bytes] | None = None) -> Commit:
    """Decode a commit whose head was changed below the types, by somebody who has the key."""
    content = msgspec.msgpack.decode(msgspec.msgpack.encode(HEAD))
    change(content)
    body = seal(KEYS, Kind.COMMIT, NAME, msgspec.msgpack.encode(content), sections or [b""])
    return decode_commit(KEYS, NAME, body)


def test_an_unknown_key_is_ignored() -> None:
    assert _raw(lambda head: head.update(later="value")).head == HEAD


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("format", "1"),
        ("machine", b"short"),
        ("machine", b"X" * 16),
        ("seq", 8),
        ("seq", 0),
        ("seq", 2**64 - 1),
        ("kind", "other"),
        ("previous", bytes(31)),
        ("epoch", 0),
        ("epoch", -1),
        ("volumes", {}),
        ("consistency", "fine"),
        ("machine_name", "n" * 1000),
        ("packs", [{"id": PACK, "inline": 2}]),
        ("packs", [{"id": PACK, "inline": 1}]),
        ("packs", [{"id": PACK, "inline": 0}]),
        ("packs", [{"id": PACK, "inline": -1}]),
    ],
)
def test_a_head_that_breaks_the_format_is_refused(key: str, value: object) -> None:
    with pytest.raises(IntegrityError):
        _raw(lambda head: head.update({key: value}))


def test_a_head_without_a_key_is_refused() -> None:
    for key in msgspec.structs.asdict(HEAD):
        if key in ("tag", "idle_since_ns", "consistency", "generation", "packs", "cut_seq", "volumes"):
            continue
        if key == "previous_header":  # not in the first commits of format 1
            continue
        with pytest.raises(IntegrityError):
            _raw(lambda head, key=key: head.pop(key))  # type: ignore[misc]  # a default binds the loop's value


@pytest.mark.parametrize("sections", [[b"x" * 47], [b"x" * 48], [b"", b"stray section"]])
def test_sections_that_do_not_fit_are_refused(sections: list[bytes]) -> None:
    with pytest.raises(IntegrityError):
        _raw(lambda head: None, sections)


def test_a_commit_without_an_extent_table_is_refused() -> None:
    body = seal(KEYS, Kind.COMMIT, NAME, msgspec.msgpack.encode(HEAD), [])
    with pytest.raises(IntegrityError):
        decode_commit(KEYS, NAME, body)


def test_a_head_that_is_no_messagepack_is_refused() -> None:
    for head in (b"", b"\xc1", b"\x00", struct.pack("<I", 7)):
        with pytest.raises(IntegrityError):
            decode_commit(KEYS, NAME, seal(KEYS, Kind.COMMIT, NAME, head, [b""]))


def test_every_flipped_bit_of_a_commit_is_damage() -> None:
    head = msgspec.structs.replace(HEAD, volumes=(volume(A),))
    body = encode_commit(KEYS, head, {A: GOOD}, [PACK, B])
    for bit in range(8 * len(body)):
        flipped = bytearray(body)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            decode_commit(KEYS, NAME, bytes(flipped))


def test_a_commit_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    body = encode_commit(KEYS, HEAD, {})
    monkeypatch.setattr(module, "COMMIT_BYTES_MAX", len(body) - 1)
    with pytest.raises(ValueError, match="a commit of"):
        encode_commit(KEYS, HEAD, {})
    with pytest.raises(IntegrityError):
        decode_commit(KEYS, NAME, body)
