"""Vaults in real object stores: who is let in, what is refused, and in which words."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from farshore.errors import ConfigError, NotFound, Unreachable
from farshore.site import free_port
from process_server.vault.store import open_store
from process_server.vault.store.address import parse_object_address
from process_server.vault.store.object import ObjectStore
from process_server.vault.store.probe import probe
from process_server.vault.store.protocol import AlreadyExists
from tests.harness.object_stores import AZURE_KEY, BUCKET, S3_KEYS, Peer

both = pytest.mark.parametrize(
    "peer",
    [
        pytest.param("seaweedfs", marks=pytest.mark.needs("weed")),
        pytest.param("azurite", marks=pytest.mark.needs("azurite-blob")),
    ],
    indirect=True,
)


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Peer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Peer)
    return found


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No credentials in the environment, and no instance to ask for any."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_")):
            monkeypatch.delenv(name)
    return monkeypatch


@both
def test_a_body_as_large_as_a_pack_is_created_whole_or_not_at_all(peer: Peer) -> None:
    store = open_store(peer.url())
    body = os.urandom(33 * 2**20 + 1)
    store.put_new("p/aa/x", [body[:1000], memoryview(body)[1000:]])
    with pytest.raises(AlreadyExists):
        store.put_new("p/aa/x", bytes(len(body)))
    assert store.get("p/aa/x") == body
    assert store.get_range("p/aa/x", 2**25, 2**25) == body[2**25 :]


@both
def test_credentials_come_from_systemd(peer: Peer, nobody: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nobody.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    nobody.setenv("AWS_SESSION_TOKEN", "that belongs to other keys")
    for name, value in {**S3_KEYS, "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY}.items():
        (tmp_path / name.lower()).write_text(f"{value}\n")
    store = open_store(peer.url())
    probe(store)
    store.put_new("x", b"1")
    assert store.get("x") == b"1"


@both
def test_the_environment_moves_no_vault_and_weakens_no_request(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_BUCKET": "another",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
        "AWS_UNSIGNED_PAYLOAD": "true",
        "AWS_ALLOW_INVALID_CERTIFICATES": "true",
        "AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:1",
        "AZURE_STORAGE_USE_EMULATOR": "true",
        "AZURE_CONTAINER_NAME": "another",
        "AZURE_STORAGE_ACCOUNT_NAME": "another",
    }.items():
        monkeypatch.setenv(name, value)
    store = ObjectStore(parse_object_address(peer.url()))
    store.put_new("x", b"1")
    assert store.get("x") == b"1"


@both
def test_wrong_credentials_are_one_line_without_them(
    peer: Peer, nobody: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nobody.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "aws_access_key_id").write_text(S3_KEYS["AWS_ACCESS_KEY_ID"])
    (tmp_path / "aws_secret_access_key").write_text("hunter2")
    (tmp_path / "azure_storage_account_key").write_text("aHVudGVyMg==")
    store = open_store(peer.url())
    calls = (
        lambda: store.put_new("x", b"1"),
        lambda: store.get("x"),
        lambda: store.size("x"),
        lambda: list(store.list("")),
        lambda: store.cas("x", b"1", None),
        lambda: store.cas("x", b"1", '"etag"'),
        lambda: store.delete("x"),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="the store refuses the credentials") as refused:
            call()
        assert "hunter2" not in str(refused.value)
        assert "aHVudGVyMg" not in str(refused.value)
        assert refused.value.__suppress_context__  # a traceback would print what the library said


@pytest.mark.needs("azurite-blob")
def test_a_signed_address_is_in_no_message(azurite: Peer, nobody: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nobody.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "azure_storage_sas_token").write_text("sv=2021-08-06&sr=c&sp=rw&sig=aHVudGVyMg%3D%3D")
    store = open_store(azurite.url())
    with pytest.raises(ConfigError, match="refuses the credentials") as refused:
        store.get("x")
    assert "sig" not in str(refused.value)
    with pytest.raises(Unreachable) as lost:
        ObjectStore(parse_object_address(azurite.url(free_port()))).get("x")
    assert "sig" not in str(lost.value)


@pytest.mark.needs("azurite-blob")
def test_a_container_that_is_not_there_is_said_so(azurite: Peer) -> None:
    store = open_store(azurite.url().replace(BUCKET, "another-box"))
    for call in (lambda: store.put_new("x", b"1"), lambda: store.get("x"), lambda: list(store.list(""))):
        with pytest.raises(ConfigError, match="no such bucket: az://another-box"):
            call()


def test_nobody_who_answers_is_unreachable(nobody: pytest.MonkeyPatch) -> None:
    for name, value in S3_KEYS.items():
        nobody.setenv(name, value)
    url = f"s3://{BUCKET}/x?endpoint=http://127.0.0.1:{free_port()}"
    with pytest.raises(Unreachable, match="no connection: Connection refused"):
        ObjectStore(parse_object_address(url)).get("x")


@pytest.mark.needs("rclone")
def test_a_store_that_ignores_conditions_is_refused_by_name(rclone_s3: Peer) -> None:
    store = open_store(rclone_s3.url())
    with pytest.raises(
        ConfigError, match=r"cannot hold a vault.*a create never replaces an object"
    ) as refused:
        probe(store)
    assert refused.value.exit_code == 3


@both
def test_strays_are_not_objects_and_folders_are_none(peer: Peer) -> None:
    store = ObjectStore(parse_object_address(peer.url()))
    store.put_new("a/b", b"1")
    store.put_new("a/b/c", b"2")
    with pytest.raises(NotFound):
        store.get("a")
    assert set(store.list("a/b")) == {"a/b", "a/b/c"}


@both
def test_a_listing_of_several_pages_is_whole(peer: Peer) -> None:
    url = peer.url()
    names = [f"c/m/{number:020}" for number in range(1, 1101)]  # S3 gives a thousand at once
    with ThreadPoolExecutor(8) as pool:
        store = open_store(url)
        list(pool.map(lambda name: store.put_new(name, b"1"), names))
    assert sorted(open_store(url).list("c/m/")) == names
