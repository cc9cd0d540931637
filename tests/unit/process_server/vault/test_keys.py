"""Keys: typing errors, wrong keys and damage are told apart, and no secret shows."""

import os
import pickle

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from farshore.errors import Conflict, IntegrityError, NotFound, Unreachable, UsageError, WrongKey
from farshore.failpoints import InjectedFault, arm, disarm
from process_server.vault.keys import (
    HOLDERS_MAX,
    VaultKeys,
    add_server_slot,
    create_vault,
    keys_name,
    open_vault,
)
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.root import ROOT, Root, encode_root
from process_server.vault.store.memory import MemoryStore
from tests.fakes.store import Fault, FaultyStore

RECOVERY = RecoveryKey(bytes(range(32)))
SLOT = bytes(range(100, 132))
KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@given(st.binary(min_size=32, max_size=32))
def test_a_recovery_key_survives_paper(secret: bytes) -> None:
    text = RecoveryKey(secret).format()
    assert len(text) == len("FSRK-") + 14 * 5 - 1
    assert RecoveryKey.parse(text).secret == secret
    assert RecoveryKey.parse(f"  {text.lower().replace('-', ' ')}\n").secret == secret
    assert RecoveryKey.parse(text[:5] + text[5:].translate(str.maketrans("OIB", "018"))).secret == secret


@given(st.binary(min_size=32, max_size=32), st.integers(0, 55), st.integers(1, 31))
def test_one_mistyped_digit_is_noticed(secret: bytes, place: int, shift: int) -> None:
    digits = list(RecoveryKey(secret).format().removeprefix("FSRK-").replace("-", ""))
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
    digits[place] = alphabet[(alphabet.index(digits[place]) + shift) % 32]
    with pytest.raises(UsageError, match="mistyped"):
        RecoveryKey.parse("".join(digits))


@given(st.binary(min_size=32, max_size=32), st.integers(0, 54))
def test_two_digits_swapped_are_noticed(secret: bytes, place: int) -> None:
    digits = list(RecoveryKey(secret).format().removeprefix("FSRK-").replace("-", ""))
    if digits[place] == digits[place + 1]:
        return
    digits[place], digits[place + 1] = digits[place + 1], digits[place]
    with pytest.raises(UsageError, match="mistyped"):
        RecoveryKey.parse("".join(digits))


@pytest.mark.parametrize("text", ["", "FSRK-", "FSRK-ABCD", RECOVERY.format() + "A", "9" * 56, "ä" * 56])
def test_other_texts_are_no_recovery_keys(text: str) -> None:
    with pytest.raises(UsageError, match="not a recovery key") as caught:
        RecoveryKey.parse(text)
    assert len(text) < 20 or text not in str(caught.value)


def test_generated_keys_differ() -> None:
    assert RecoveryKey.generate() != RecoveryKey.generate()
    assert len({RECOVERY, RecoveryKey(RECOVERY.secret)}) == 1


def test_no_secret_shows() -> None:
    shown = repr([RECOVERY, KEYS]) + str(RECOVERY) + f"{KEYS}"
    for secret in (RECOVERY.secret, b"m" * 32, KEYS.id_key, KEYS.root_key, KEYS.seal_key):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(KEYS)


def test_keys_travel_to_a_worker() -> None:
    there = VaultKeys.from_bytes(KEYS.to_bytes())
    assert (there.vault_id, there.generation, there.id_key) == (KEYS.vault_id, 1, KEYS.id_key)
    assert (there.root_key, there.seal_key, there.key_check) == (
        KEYS.root_key,
        KEYS.seal_key,
        KEYS.key_check,
    )
    with pytest.raises(ValueError, match="not the keys"):
        VaultKeys.from_bytes(KEYS.to_bytes()[:-1])


def test_every_key_differs_with_vault_and_master() -> None:
    others = [VaultKeys(b"w" * 16, 1, b"m" * 32), VaultKeys(b"v" * 16, 1, b"n" * 32)]
    every = [key for keys in (KEYS, *others) for key in (keys.id_key, keys.root_key, keys.seal_key)]
    assert len(set(every)) == 9


def test_a_vault_opens_to_both_its_keys_and_no_other(store: MemoryStore) -> None:
    keys = create_vault(store, RECOVERY, SLOT)
    for holder in (RECOVERY, RECOVERY.secret, SLOT):
        assert open_vault(store, holder).to_bytes() == keys.to_bytes()
    for wrong in (RecoveryKey.generate(), os.urandom(32)):
        with pytest.raises(WrongKey, match="none of its 2 key slots"):
            open_vault(store, wrong)


def test_no_vault_is_not_found(store: MemoryStore) -> None:
    with pytest.raises(NotFound, match="no vault here"):
        open_vault(store, RECOVERY)


def test_an_existing_vault_is_never_made_again(store: MemoryStore) -> None:
    keys = create_vault(store, RECOVERY, SLOT)
    with pytest.raises(Conflict, match="there is a vault already"):
        create_vault(store, RecoveryKey.generate(), os.urandom(32))
    assert open_vault(store, RECOVERY).to_bytes() == keys.to_bytes()


def test_a_vault_half_made_does_not_stand_in_the_way(store: MemoryStore) -> None:
    arm("vault.create.after_keys=raise")
    try:
        with pytest.raises(InjectedFault):
            create_vault(store, RECOVERY, SLOT)
    finally:
        disarm()
    with pytest.raises(NotFound):
        open_vault(store, RECOVERY)
    create_vault(store, RECOVERY, SLOT)
    open_vault(store, RECOVERY)


def test_of_two_that_make_a_vault_at_once_one_has_it() -> None:
    inner = MemoryStore()

    class Late(FaultyStore):
        def cas(self, name: str, body: object, expected: str | None) -> str:
            winner.append(create_vault(inner, RECOVERY, SLOT))
            return super().cas(name, body, expected)  # type: ignore[arg-type]  # passed through

    winner: list[VaultKeys] = []
    with pytest.raises(Conflict, match="there is a vault already"):
        create_vault(Late(inner), RecoveryKey.generate(), os.urandom(32))
    assert open_vault(inner, RECOVERY).to_bytes() == winner[0].to_bytes()


def test_another_server_gets_a_slot_once(store: MemoryStore) -> None:
    keys = create_vault(store, RECOVERY, SLOT)
    other = os.urandom(32)
    add_server_slot(store, keys, other)
    size = store.size(keys_name(keys.vault_id, 1))
    add_server_slot(store, keys, other)
    assert store.size(keys_name(keys.vault_id, 1)) == size
    for holder in (RECOVERY.secret, SLOT, other):
        assert open_vault(store, holder).to_bytes() == keys.to_bytes()


def test_a_slot_survives_a_race_and_a_lost_reply(store: MemoryStore) -> None:
    keys = create_vault(store, RECOVERY, SLOT)
    first, second = os.urandom(32), os.urandom(32)
    with FaultyStore(store, Fault("cas", "applied")) as faulty:
        with pytest.raises(Unreachable):
            add_server_slot(faulty, keys, first)
        add_server_slot(faulty, keys, first)
        add_server_slot(faulty, keys, second)
    for holder in (first, second, SLOT):
        open_vault(store, holder)


def test_slots_are_bounded(store: MemoryStore) -> None:
    keys = create_vault(store, RECOVERY, SLOT)
    for _ in range(HOLDERS_MAX - 2):
        add_server_slot(store, keys, os.urandom(32))
    with pytest.raises(Conflict, match="64 keys"):
        add_server_slot(store, keys, os.urandom(32))


def test_every_flipped_bit_of_root_and_keys_is_damage_not_a_wrong_key(store: MemoryStore) -> None:
    keys = create_vault(store, RECOVERY, SLOT)
    for name in (ROOT, keys_name(keys.vault_id, 1)):
        body, etag = store.get_with_etag(name)
        for bit in range(8 * len(body)):
            flipped = bytearray(body)
            flipped[bit // 8] ^= 1 << bit % 8
            etag = store.cas(name, flipped, etag)
            with pytest.raises(IntegrityError) as caught:
                open_vault(store, RECOVERY)
            assert not isinstance(caught.value, WrongKey), f"bit {bit} of {name}"
        store.cas(name, body, etag)
    open_vault(store, RECOVERY)


def test_every_truncation_of_root_and_keys_is_damage(store: MemoryStore) -> None:
    keys = create_vault(store, RECOVERY, SLOT)
    for name in (ROOT, keys_name(keys.vault_id, 1)):
        body, etag = store.get_with_etag(name)
        for length in range(len(body)):
            etag = store.cas(name, body[:length], etag)
            with pytest.raises(IntegrityError):
                open_vault(store, RECOVERY)
        store.cas(name, body, etag)


def test_missing_keys_are_damage(store: MemoryStore) -> None:
    keys = create_vault(store, RECOVERY, SLOT)
    store.delete(keys_name(keys.vault_id, 1))
    with pytest.raises(IntegrityError, match="missing"):
        open_vault(store, RECOVERY)


def test_a_newer_format_is_refused_by_name(store: MemoryStore) -> None:
    keys = create_vault(store, RECOVERY, SLOT)
    root = Root(format=2, vault=keys.vault_id, key_generation=1)
    store.cas(ROOT, encode_root(root, keys.root_key), store.get_with_etag(ROOT)[1])
    with pytest.raises(IntegrityError, match=r"format 2, and this is made for 1; use a newer version"):
        open_vault(store, RECOVERY)


def test_keys_of_another_vault_under_our_name_are_damage(store: MemoryStore) -> None:
    other = MemoryStore()
    keys, others = create_vault(store, RECOVERY, SLOT), create_vault(other, RECOVERY, SLOT)
    name = keys_name(keys.vault_id, 1)
    store.cas(name, other.get(keys_name(others.vault_id, 1)), store.get_with_etag(name)[1])
    with pytest.raises(IntegrityError, match="another vault's keys"):
        open_vault(store, RECOVERY)


def test_a_holder_cannot_be_passed_for_another(store: MemoryStore) -> None:
    """Kind and id are authenticated with the wrapped key, also for somebody who can fix the checksum."""
    keys = create_vault(store, RECOVERY, SLOT)
    name = keys_name(keys.vault_id, 1)
    body, etag = store.get_with_etag(name)
    content = msgspec.msgpack.decode(body[:-32])
    content["holders"][1]["kind"] = "recovery"
    changed = msgspec.msgpack.encode(content)
    store.cas(name, changed + blake3(changed).digest(), etag)
    with pytest.raises(IntegrityError, match="wrapped master key is damaged"):
        open_vault(store, SLOT)
