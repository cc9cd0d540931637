"""A new vault whose store goes away while it is made: no vault is ever left without the key that opens it."""

from pathlib import Path

import pytest

from farshore.errors import Conflict, NotFound, Unreachable
from process_server.control import setup
from process_server.recovery.access import read_opener
from process_server.vault.keys import open_vault
from process_server.vault.store.memory import MemoryStore
from tests.fakes.store import Fault, FaultyStore

URL = "s3://bucket/vault"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FaultyStore:
    """What every address means."""
    store = FaultyStore(MemoryStore())
    monkeypatch.setattr(setup, "open_store", lambda *_, **__: store)
    return store


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "server"


@pytest.fixture(params=["elsewhere", "inside"])
def key(request: pytest.FixtureRequest, tmp_path: Path, directory: Path) -> Path:
    return directory / "recovery.key" if request.param == "inside" else tmp_path / "recovery.key"


def test_a_vault_whose_making_was_not_answered_keeps_its_key_and_can_be_adopted(
    store: FaultyStore, directory: Path, key: Path
) -> None:
    store.plan(Fault("cas", "applied", prefix="root"))
    with pytest.raises(Unreachable, match=r"may have been made.*server adopt") as raised:
        setup.initialise(directory, recovery_key_file=key, vault=URL)
    assert str(key) in str(raised.value)
    open_vault(store, read_opener(key))
    made = setup.adopt(directory, vault=URL, recovery_key_file=key)
    assert made.vault == URL


def test_a_vault_that_cannot_be_taken_back_keeps_its_key(
    store: FaultyStore, directory: Path, key: Path
) -> None:
    store.plan(Fault("put_new", "refused", prefix="control/"), Fault("delete", "refused", prefix="root"))
    with pytest.raises(Unreachable, match="may have been made"):
        setup.initialise(directory, recovery_key_file=key, vault=URL)
    open_vault(store, read_opener(key))
    assert setup.adopt(directory, vault=URL, recovery_key_file=key).vault == URL


def test_a_vault_that_was_taken_back_leaves_nothing(store: FaultyStore, directory: Path, key: Path) -> None:
    store.plan(Fault("put_new", "refused", prefix="control/"))
    with pytest.raises(Unreachable, match="planned fault"):
        setup.initialise(directory, recovery_key_file=key, vault=URL)
    assert not key.exists()
    assert not directory.exists()
    with pytest.raises(NotFound):
        store.get("root")


def test_another_s_vault_is_no_reason_to_keep_a_key(store: FaultyStore, directory: Path, key: Path) -> None:
    setup.initialise(directory, recovery_key_file=key, vault=URL)
    other = directory.parent / "other"
    with pytest.raises(Conflict):
        setup.initialise(other, recovery_key_file=other / "recovery.key", vault=URL)
    assert not other.exists()
    open_vault(store, read_opener(key))
