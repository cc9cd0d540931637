"""Credentials of object stores, as systemd hands them over."""

from pathlib import Path

import pytest

from farshore.errors import ConfigError
from process_server.vault.store.credentials import azure_credentials, s3_credentials


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    return tmp_path


def test_without_systemd_the_client_looks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert s3_credentials() is None
    assert azure_credentials() is None


def test_credentials_for_other_things_are_not_ours(folder: Path) -> None:
    (folder / "slot.key").write_bytes(bytes(32))
    assert s3_credentials() is None
    assert azure_credentials() is None


def test_a_pair_of_keys_is_read_without_the_line_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of other keys")
    (folder / "aws_access_key_id").write_text("AKIA\n")
    (folder / "aws_secret_access_key").write_text("hunter2\n")
    give = s3_credentials()
    assert give is not None
    assert give() == {
        "access_key_id": "AKIA",
        "secret_access_key": "hunter2",
        "token": None,
        "expires_at": None,
    }


@pytest.mark.parametrize("there", ["aws_access_key_id", "aws_secret_access_key"])
def test_half_a_pair_is_refused(folder: Path, there: str) -> None:
    (folder / there).write_text("hunter2")
    with pytest.raises(ConfigError, match="a credential is missing"):
        s3_credentials()


@pytest.mark.parametrize("content", [b"", b"\n", b"hunter2\x00", b"hunter2" * 5000, b"\xff\xfe\x01"])
def test_what_is_no_credential_is_refused_without_saying_it(folder: Path, content: bytes) -> None:
    (folder / "azure_storage_account_key").write_bytes(content)
    with pytest.raises(ConfigError, match="not a credential: azure_storage_account_key") as refused:
        azure_credentials()
    assert "hunter2" not in str(refused.value)


def test_azure_takes_a_key_or_a_signature(folder: Path) -> None:
    (folder / "azure_storage_sas_token").write_text("?sv=1&sig=x")
    give = azure_credentials()
    assert give is not None
    assert give() == {"sas_token": "sv=1&sig=x", "expires_at": None}
    (folder / "azure_storage_account_key").write_text("a2V5")
    give = azure_credentials()
    assert give is not None
    assert give() == {"access_key": "a2V5", "expires_at": None}
