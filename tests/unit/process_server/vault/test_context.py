"""What an object's key and its authenticated context are made of, one part at a time."""

import pytest

from farshore.errors import IntegrityError
from process_server.vault.keys import VaultKeys
from process_server.vault.seal import Kind, SealedObject, seal

KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
NAME = "c/" + "0" * 32 + "/00000000000000000001"


def test_the_same_object_sealed_again_has_another_key() -> None:
    """A host that was rolled back seals what it sealed before, and what it seals next is something else."""
    commitments = {seal(KEYS, Kind.COMMIT, NAME, b"head", [b"one", b"two"])[80:112] for _ in range(100)}
    assert len(commitments) == 100


def test_the_vault_is_part_of_it_even_where_the_master_key_is_the_same() -> None:
    other = VaultKeys(b"w" * 16, 1, b"m" * 32)
    for name in ("id_key", "root_key", "seal_key", "key_check"):
        setattr(other, name, getattr(KEYS, name))
    body = seal(KEYS, Kind.COMMIT, NAME, b"head", [b"one"])
    assert SealedObject.parse(KEYS, Kind.COMMIT, NAME, body).section(1) == b"one"
    with pytest.raises(IntegrityError):
        SealedObject.parse(other, Kind.COMMIT, NAME, body)
