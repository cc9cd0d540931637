"""The sealed object: any flipped bit, any other place, any other key is noticed; a bomb is not unpacked."""

import secrets
import struct
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from farshore.compression import Codec
from farshore.errors import IntegrityError, NotFound, WrongKey
from process_server.vault import seal as module
from process_server.vault.commit import commit_name
from process_server.vault.keys import VaultKeys
from process_server.vault.pack import PackBuilder
from process_server.vault.seal import (
    TABLE_DTYPE,
    Kind,
    SealedObject,
    Sealer,
    first_section,
    seal,
)
from process_server.vault.store.memory import MemoryStore
from tests.fakes.store import FaultyStore

KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
NAME = "m/1/2/3"
SECTIONS = [b"a" * 5000, b"", bytes(range(256))]


def sample() -> bytes:
    return seal(KEYS, Kind.MAP, NAME, b"head", SECTIONS)


@given(st.binary(max_size=300), st.lists(st.binary(max_size=2000), max_size=5))
def test_what_is_sealed_is_opened(head: bytes, sections: list[bytes]) -> None:
    found = SealedObject.parse(KEYS, Kind.MAP, NAME, seal(KEYS, Kind.MAP, NAME, head, sections))
    assert found.head == head
    assert [found.section(index) for index in range(1, len(found) + 1)] == sections


def test_sections_are_compressed_where_that_helps_and_allowed() -> None:
    squeezed, plain = (
        SealedObject.parse(
            KEYS, Kind.MAP, NAME, seal(KEYS, Kind.MAP, NAME, b"", [b"a" * 5000], compress=[wish])
        )
        for wish in (True, False)
    )
    assert squeezed.table["stored"][0] < 100
    assert plain.table["stored"][0] == 5016
    assert plain.section(1) == squeezed.section(1) == b"a" * 5000


def test_one_section_costs_one_ranged_read_after_the_head() -> None:
    store = FaultyStore(MemoryStore())
    store.put_new(NAME, seal(KEYS, Kind.MAP, NAME, b"head", [bytes([n]) * 100_000 for n in range(40)]))
    store.calls.clear()
    found = SealedObject.open(store, KEYS, Kind.MAP, NAME)
    assert found.section(17) == b"\x10" * 100_000
    assert store.calls == [("get_range", NAME)] * 2


def test_a_long_head_is_read_to_its_end() -> None:
    store = MemoryStore()
    head = bytes(300_000)
    store.put_new(NAME, seal(KEYS, Kind.MAP, NAME, head, SECTIONS))
    found = SealedObject.open(store, KEYS, Kind.MAP, NAME)
    assert (found.head, found.section(1)) == (head, SECTIONS[0])
    assert found.bytes_total == store.size(NAME)
    with pytest.raises(NotFound):
        SealedObject.open(store, KEYS, Kind.MAP, "m/1/2/4")


def everything(body: bytes, keys: VaultKeys = KEYS, kind: Kind = Kind.MAP, name: str = NAME) -> None:
    found = SealedObject.parse(keys, kind, name, body)
    for index in range(1, len(found) + 1):
        found.section(index)


def test_every_flipped_bit_is_damage_and_never_called_a_wrong_key() -> None:
    body = sample()
    everything(body)
    for bit in range(8 * len(body)):
        flipped = bytearray(body)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError) as caught:
            everything(bytes(flipped))
        assert not isinstance(caught.value, WrongKey), f"bit {bit}"


def test_every_truncation_and_every_addition_is_damage() -> None:
    body = sample()
    for cut in [*(body[:length] for length in range(len(body))), body + b"\0", body + body]:
        with pytest.raises(IntegrityError):
            everything(cut)


def test_an_object_opens_only_as_what_it_was_sealed() -> None:
    body = sample()
    wrong: list[Callable[[], None]] = [
        lambda: everything(body, name="m/1/2/4"),
        lambda: everything(body, kind=Kind.COMMIT),
        lambda: everything(seal(KEYS, Kind.COMMIT, NAME, b"head", SECTIONS)),
    ]
    for call in wrong:
        with pytest.raises(IntegrityError) as caught:
            call()
        assert not isinstance(caught.value, WrongKey)


@pytest.mark.parametrize(
    "keys",
    [
        VaultKeys(b"v" * 16, 1, b"n" * 32),
        VaultKeys(b"w" * 16, 1, b"m" * 32),
        VaultKeys(b"v" * 16, 2, b"n" * 32),
    ],
)
def test_another_key_is_told_from_damage(keys: VaultKeys) -> None:
    with pytest.raises(WrongKey):
        everything(sample(), keys=keys)


def test_sections_cannot_change_places() -> None:
    body = seal(KEYS, Kind.MAP, NAME, b"", [b"1" * 64, b"2" * 64], compress=[False, False])
    first, second = body[-160:-80], body[-80:]
    with pytest.raises(IntegrityError, match="section 1 does not authenticate"):
        everything(body[:-160] + second + first)


def test_a_newer_version_says_so() -> None:
    body = bytearray(sample())
    body[8] = 2
    with pytest.raises(IntegrityError, match="use a newer version"):
        everything(bytes(body))


def test_the_swap_matrix_every_kind_under_every_name() -> None:
    builder = PackBuilder(KEYS)
    builder.add(KEYS.chunk_id(blake3(b"x").digest()), b"x")
    pack = builder.build()
    machine = b"m" * 16
    objects = {
        (Kind.PACK, pack.name): bytes(pack.body),
        **{
            (kind, name): seal(KEYS, kind, name, b"head", [b"rows"])
            for kind, name in [
                (Kind.PACK, "p/00/" + "0" * 32),
                (Kind.COMMIT, commit_name(machine, 1)),
                (Kind.COMMIT, commit_name(machine, 2)),
                (Kind.COMMIT, commit_name(b"n" * 16, 1)),
                (Kind.MAP, "m/1/2/3"),
                (Kind.MAP, "m/1/2/4"),
                (Kind.CONTROL, "control/1"),
                (Kind.CONTROL, "control/2"),
            ]
        },
    }
    for (kind, name), body in objects.items():
        everything(body, kind=kind, name=name)
        for other_kind, other_name in objects:
            if other_name != name:
                for as_kind in {kind, other_kind}:
                    with pytest.raises(IntegrityError):
                        everything(body, kind=as_kind, name=other_name)


def _forge(stored: bytes, plain_bytes: int, flag: int, *, count: int = 2, rows: int = 1) -> bytes:
    """Return an object that authenticates, with a section as somebody with the key might have made it."""
    table = np.zeros(rows, TABLE_DTYPE)
    if rows:
        table[0] = (bytes(32), len(stored) + 16, plain_bytes, flag, 0)
    first = first_section(table, b"")
    sealer = Sealer.new(KEYS, Kind.MAP, NAME, bytes(32), count, len(first), 3)
    body = bytearray(128 + len(first) + len(stored) + 32)
    body[:128] = sealer.header
    with memoryview(body) as view:
        sealer.seal_into(0, first, len(first), bytes(32), view[128 : 144 + len(first)])
        sealer.seal_into(1, stored, plain_bytes, bytes(32), view[144 + len(first) :])
    return bytes(body)


def _frame(plain: bytes, **parameters: int) -> bytes:
    made = zstandard.ZstdCompressionParameters(**parameters)
    return zstandard.ZstdCompressor(compression_params=made).compress(plain)


FRAME = _frame(b"a" * 1000)


@pytest.mark.parametrize(
    ("stored", "plain_bytes", "flag"),
    [
        (FRAME, 999, 1),
        (FRAME, 1001, 1),
        (FRAME, 2**32 - 1, 1),
        (FRAME, 1000, 0),
        (FRAME, 1000, 2),
        (FRAME + b"\0", 1000, 1),
        (FRAME + FRAME, 2000, 1),
        (FRAME[:-1], 1000, 1),
        (b"", 0, 1),
        (b"no frame", 1000, 1),
        (_frame(bytes(2**25), window_log=24, enable_ldm=1), 2**25, 1),
        (_frame(b"a" * 1000, write_content_size=0), 1000, 1),
    ],
)
def test_a_section_that_is_not_what_its_table_says_is_refused(
    stored: bytes, plain_bytes: int, flag: int
) -> None:
    with pytest.raises(IntegrityError):
        everything(_forge(stored, plain_bytes, flag))


def test_the_forgery_itself_is_sound() -> None:
    everything(_forge(FRAME, 1000, 1))


@pytest.mark.parametrize(("count", "rows"), [(2, 0), (1, 1), (3, 1), (0, 1), (2**32 - 1, 1)])
def test_counts_that_disagree_are_refused(count: int, rows: int) -> None:
    with pytest.raises(IntegrityError):
        everything(_forge(FRAME, 1000, 1, count=count, rows=rows))


@pytest.mark.parametrize("index", [0, -1, 4])
def test_a_section_that_is_not_there_is_refused(index: int) -> None:
    found = SealedObject.parse(KEYS, Kind.MAP, NAME, sample())
    with pytest.raises(IntegrityError, match="no section"):
        found.section(index)


def test_a_compressor_that_lies_is_caught_before_anything_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar:
        def compress(self, plain: bytes) -> bytes:
            return FRAME

    codec = Codec(1)
    monkeypatch.setattr(codec, "_compressor", Liar())
    codec.compress(b"a" * 1000)
    for plain in (b"a" * 999 + b"b", b"b" + b"a" * 999):
        with pytest.raises(IntegrityError, match="suspect this host's memory"):
            codec.compress(plain)
    with pytest.raises((IntegrityError, zstandard.ZstdError)):
        codec.compress(b"a" * 1001)


def test_an_object_too_large_is_our_own_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECTION_BYTES_MAX", 1000)
    with pytest.raises(ValueError, match="a section of 1001"):
        seal(KEYS, Kind.MAP, NAME, b"", [bytes(1001)])
    with pytest.raises(ValueError, match="a first section"):
        seal(KEYS, Kind.MAP, NAME, bytes(1000))


def test_no_two_objects_share_a_key_even_with_the_same_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_bytes", lambda length: bytes(length))
    tags = {
        seal(KEYS, kind, name, head, sections)[80:112]
        for kind, name, head, sections in [
            (Kind.MAP, NAME, b"head", [b"rows"]),
            (Kind.MAP, NAME, b"heaD", [b"rows"]),
            (Kind.MAP, NAME, b"head", [b"rowS"]),
            (Kind.MAP, NAME + "4", b"head", [b"rows"]),
            (Kind.COMMIT, NAME, b"head", [b"rows"]),
        ]
    }
    levels = {
        Sealer.new(KEYS, Kind.PACK, NAME, bytes(32), 1, 8, level).header[80:112] for level in (-1, 1, 3)
    }
    assert len(tags) == 5
    assert len(levels) == 3


def test_the_header_is_as_the_page_says() -> None:
    body = sample()
    assert body[:8] == b"FARSHSEA"
    assert struct.unpack_from("<HHI", body, 8) == (1, 3, 1)
    assert struct.unpack_from("<I", body, 112) == (4,)
    assert struct.unpack_from("<Hh", body, 124)[1] == 3
