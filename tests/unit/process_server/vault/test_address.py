"""Addresses of object stores: what they say, and that none holds a secret."""

from pathlib import Path

import pytest

from farshore.errors import ConfigError
from process_server.vault.store import open_store
from process_server.vault.store.address import ObjectAddress, parse_object_address, read_ca


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
        *("AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR"),
        "AZURE_STORAGE_ACCOUNT_NAME",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("s3://bucket", ObjectAddress("s3", "bucket")),
        ("s3://bucket/", ObjectAddress("s3", "bucket")),
        ("s3://a-b.c/Deep/er_1/", ObjectAddress("s3", "a-b.c", "Deep/er_1")),
        ("s3://bucket/p?region=eu-west-1", ObjectAddress("s3", "bucket", "p", region="eu-west-1")),
        (
            "s3://bucket/p?endpoint=https://s3.example:8333/&ca=/etc/ca.pem",
            ObjectAddress("s3", "bucket", "p", endpoint="https://s3.example:8333", ca="/etc/ca.pem"),
        ),
        (
            "s3://bucket?endpoint=http%3A%2F%2F10.0.0.1%3A9000&allow_http=true",
            ObjectAddress("s3", "bucket", endpoint="http://10.0.0.1:9000", allow_http=True),
        ),
        (
            "az://box/p?account=me&endpoint=http://127.0.0.1:10000/me",
            ObjectAddress("az", "box", "p", account="me", endpoint="http://127.0.0.1:10000/me"),
        ),
    ],
)
def test_an_address_says_where_the_store_is(url: str, address: ObjectAddress) -> None:
    assert parse_object_address(url) == address


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://", "not the name of a bucket"),
        ("s3://ab", "not the name of a bucket"),
        ("s3://Bucket", "not the name of a bucket"),
        ("s3://bucket:80/x", "not the name of a bucket"),
        ("s3://bucket/a//b", "prefix has characters"),
        ("s3://bucket/../x", "prefix has characters"),
        ("s3://bucket/a%20b", "prefix has characters"),
        ("s3://bucket/" + "x" * 300, "prefix has characters"),
        ("s3://bucket?colour=red", "no option 'colour'"),
        ("s3://bucket?account=me", "no option 'account'"),
        ("az://box?account=me&region=x", "no option 'region'"),
        ("az://box", "no storage account"),
        ("s3://bucket?region=a&region=b", "there twice"),
        ("s3://bucket#x", "something follows a #"),
        ("s3://bucket?region=", "region is not a name"),
        ("s3://bucket?allow_http=yes", "true or false"),
        ("s3://bucket?endpoint=ftp://x", "not an http"),
        ("s3://bucket?endpoint=here", "not an http"),
        ("s3://bucket?endpoint=http://h:port", "not an http"),
        ("s3://bucket?endpoint", "bad query field"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:hunter2@bucket/x",
        "s3://hunter2@bucket",
        "s3://bucket?secret_access_key=hunter2",
        "s3://bucket?password=hunter2&colour=red",
        "s3://bucket?endpoint=https://me:hunter2@host",
        "s3://bucket?endpoint=https://host/?sig%3Dhunter2",
        "az://box?account=me&sig=hunter2",
        "az://box?account_key=hunter2",
        "az://box?account=me&sas_token=hunter2",
    ],
)
def test_an_address_with_a_secret_is_refused_without_saying_it(url: str) -> None:
    with pytest.raises(ConfigError, match="holds no secret") as refused:
        open_store(url)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("endpoint", "allowed"),
    [
        ("http://127.0.0.1:8333", True),
        ("http://127.8.9.1", True),
        ("http://[::1]:8333", True),
        ("http://localhost:8333", True),
        ("http://10.0.0.1:8333", False),
        ("http://localhost.example", False),
        ("http://s3.example", False),
    ],
)
def test_without_tls_only_this_host_is_asked_unless_told_so(endpoint: str, allowed: bool) -> None:
    if allowed:
        assert parse_object_address(f"s3://bucket?endpoint={endpoint}").is_plain_http
    else:
        with pytest.raises(ConfigError, match="without TLS"):
            parse_object_address(f"s3://bucket?endpoint={endpoint}")
    assert parse_object_address(f"s3://bucket?endpoint={endpoint}&allow_http=true").is_plain_http


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("s3://bucket", "AWS_ENDPOINT_URL"),
        ("s3://bucket", "AWS_ENDPOINT_URL_S3"),
        ("az://box?account=me", "AZURE_STORAGE_USE_EMULATOR"),
    ],
)
def test_the_environment_cannot_say_where_the_vault_is(
    url: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "https://elsewhere.example")
    with pytest.raises(ConfigError, match=rf"another store: {variable}"):
        parse_object_address(url)


def test_the_account_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "me")
    assert parse_object_address("az://box").account == ""


def test_a_named_authority_must_be_there(tmp_path: Path) -> None:
    assert read_ca(ObjectAddress("s3", "bucket")) is None
    with pytest.raises(ConfigError, match="cannot read the store's CA"):
        open_store(f"s3://bucket?ca={tmp_path}/none.pem")
    (tmp_path / "bad.pem").write_text("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
    with pytest.raises(ConfigError, match="cannot open the vault"):
        open_store(f"s3://bucket?ca={tmp_path}/bad.pem")


def test_a_message_calls_it_by_bucket_and_prefix() -> None:
    assert str(parse_object_address("s3://bucket/p?region=eu-west-1")) == "s3://bucket/p"
    assert str(parse_object_address("s3://bucket")) == "s3://bucket"
