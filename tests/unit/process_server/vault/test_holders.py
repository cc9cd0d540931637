"""Holders: each opens the vault with its own secret, none with another's, and none passes for another."""

import os
import subprocess
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from farshore.errors import Conflict, IntegrityError, Unreachable, UsageError, WrongKey
from process_server.vault.holders import Argon2Cost, EscrowKey, Holder, Passphrase, Wrapper, parse_public_key
from process_server.vault.keys import VaultKeys, change_holders, create_vault, list_holders, open_vault
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.store.memory import MemoryStore
from tests.fakes.store import Fault, FaultyStore

RECOVERY = RecoveryKey(bytes(range(32)))
SLOT = bytes(range(100, 132))
MASTER = bytes(range(50, 82))
CHEAP = (8 * 1024, 1, 1)
WORDS = "correct horse battery staple"


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def keys(store: MemoryStore) -> VaultKeys:
    return create_vault(store, RECOVERY, SLOT)


def add(store: MemoryStore, keys: VaultKeys, holder: Holder) -> None:
    change_holders(store, keys, lambda holders: (*holders, holder))


def test_a_passphrase_opens_the_vault_and_another_does_not(store: MemoryStore, keys: VaultKeys) -> None:
    add(store, keys, keys.wrap(lambda w, master: w.for_passphrase(master, Passphrase(WORDS), "ops", CHEAP)))
    assert open_vault(store, Passphrase(WORDS)).to_bytes() == keys.to_bytes()
    with pytest.raises(WrongKey):
        open_vault(store, Passphrase(WORDS + " "))
    assert open_vault(store, RECOVERY).to_bytes() == keys.to_bytes()


def test_a_passphrase_is_the_same_however_it_was_typed(store: MemoryStore, keys: VaultKeys) -> None:
    composed, decomposed = "gr\u00fc\u00df dich, m\u00fcde Welt", "gru\u0308\u00df dich, mu\u0308de Welt"
    add(store, keys, keys.wrap(lambda w, master: w.for_passphrase(master, Passphrase(composed), "", CHEAP)))
    open_vault(store, Passphrase(decomposed))


def test_an_escrow_key_opens_the_vault_that_only_knew_its_public_half(
    store: MemoryStore, keys: VaultKeys
) -> None:
    escrow = EscrowKey(X25519PrivateKey.generate())
    add(store, keys, keys.wrap(lambda wrapper, master: wrapper.for_escrow(master, escrow.public, "lawyer")))
    assert open_vault(store, escrow).to_bytes() == keys.to_bytes()
    with pytest.raises(WrongKey):
        open_vault(store, EscrowKey(X25519PrivateKey.generate()))


def test_openssl_makes_keys_for_it(tmp_path: Path) -> None:
    private, public = tmp_path / "escrow.pem", tmp_path / "escrow.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "X25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    assert EscrowKey.parse(private.read_bytes()).public == parse_public_key(public.read_bytes())


def test_keys_of_another_kind_are_refused(tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ED25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    with pytest.raises(UsageError, match="X25519"):
        EscrowKey.parse(private.read_bytes())
    with pytest.raises(UsageError, match="X25519"):
        parse_public_key(public.read_bytes())
    with pytest.raises(UsageError, match="not a private key"):
        EscrowKey.parse(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(UsageError, match="not a public key"):
        parse_public_key(b"FSRK-")


def test_what_one_vault_entrusted_opens_no_other() -> None:
    escrow = EscrowKey(X25519PrivateKey.generate())
    one, other = Wrapper(b"1" * 16, 1), Wrapper(b"2" * 16, 1)
    holder = one.for_escrow(MASTER, escrow.public)
    assert one.unwrap(holder, escrow) == MASTER
    assert other.unwrap(holder, escrow) is None
    assert Wrapper(b"1" * 16, 2).unwrap(holder, escrow) is None


@pytest.mark.parametrize("field", ["id", "salt", "check", "wrapped", "ephemeral"])
def test_no_part_of_a_holder_can_be_changed(field: str) -> None:
    escrow, wrapper = EscrowKey(X25519PrivateKey.generate()), Wrapper(b"1" * 16, 1)
    holder = wrapper.for_escrow(MASTER, escrow.public)
    value = bytearray(getattr(holder, field))
    value[0] ^= 1
    changed = msgspec.structs.replace(holder, **{field: bytes(value)})
    try:
        assert wrapper.unwrap(changed, escrow) is None
    except IntegrityError:
        pass
    else:
        assert field not in ("id", "wrapped")


def test_a_store_cannot_make_a_passphrase_cost_all_memory() -> None:
    holder = Wrapper(b"1" * 16, 1).for_passphrase(MASTER, Passphrase(WORDS), "", CHEAP)
    body = msgspec.msgpack.encode(holder)
    assert msgspec.msgpack.decode(body, type=Holder) == holder
    content = msgspec.msgpack.decode(body)
    for cost in ((2**24, 1, 1), (8 * 1024, 10**6, 1), (8 * 1024, 1, 10**4), (0, 1, 1)):
        content["argon2"] = cost
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(content), type=Holder)


def test_holders_from_before_labels_are_written_as_before() -> None:
    """A reader of version 1 that knows nothing of labels meets none of the new keys."""
    holder = Wrapper(b"1" * 16, 1).for_secret(MASTER, "recovery", RECOVERY.secret)
    assert set(msgspec.msgpack.decode(msgspec.msgpack.encode(holder))) == {
        *("kind", "id", "salt", "check", "wrapped")
    }


def test_short_passphrases_are_refused_when_they_are_made() -> None:
    Passphrase("twelve chars").check_new()
    with pytest.raises(UsageError, match="too short"):
        Passphrase("eleven char").check_new()


def test_somebody_but_a_server_always_holds_a_key(store: MemoryStore, keys: VaultKeys) -> None:
    with pytest.raises(Conflict, match="only servers"):
        change_holders(store, keys, lambda holders: tuple(h for h in holders if h.kind == "server"))
    assert [holder.kind for holder in list_holders(store, keys)] == ["recovery", "server"]


def test_of_two_that_change_the_holders_at_once_both_are_heard(store: MemoryStore, keys: VaultKeys) -> None:
    first, second = os.urandom(32), os.urandom(32)
    inner = keys.wrap(lambda wrapper, master: wrapper.for_secret(master, "recovery", first))
    outer = keys.wrap(lambda wrapper, master: wrapper.for_secret(master, "recovery", second))
    calls: list[int] = []

    def change(holders: tuple[Holder, ...]) -> tuple[Holder, ...]:
        if not calls:
            add(store, keys, inner)
        calls.append(1)
        return (*holders, outer)

    change_holders(store, keys, change)
    assert len(calls) == 2
    for secret in (first, second):
        open_vault(store, RecoveryKey(secret))


def test_a_change_whose_answer_was_lost_can_be_made_again(store: MemoryStore, keys: VaultKeys) -> None:
    fresh = keys.wrap(lambda w, master: w.for_passphrase(master, Passphrase(WORDS), "", CHEAP))

    def once(holders: tuple[Holder, ...]) -> tuple[Holder, ...]:
        return holders if fresh in holders else (*holders, fresh)

    with FaultyStore(store, Fault("cas", "applied")) as faulty:
        with pytest.raises(Unreachable):
            change_holders(faulty, keys, once)
        change_holders(faulty, keys, once)
    assert len(list_holders(store, keys)) == 3


def test_no_secret_shows() -> None:
    assert WORDS not in repr(Passphrase(WORDS))
    private = X25519PrivateKey.generate()
    assert private.private_bytes_raw().hex() not in repr(EscrowKey(private))
    assert Argon2Cost(*CHEAP).memory_kib == CHEAP[0]
