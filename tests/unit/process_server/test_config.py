"""server.toml: what init writes is what run reads."""

from pathlib import Path

import pytest

from farshore.errors import ConfigError
from process_server import config

KEYS = config.KeysConfig("file:slot.key")
GOOD = config.ServerConfig("file:///srv/vault", "f" * 32, KEYS, ("0" * 64,))


@pytest.mark.parametrize(
    "settings",
    [
        GOOD,
        config.ServerConfig(
            'file:///odd "name"\\\x7f\n',
            "0" * 32,
            KEYS,
            (),
            listen="[::]:0",
            addresses=("gw.example:9443", "[::1]:1"),
            ingest=config.IngestConfig(workers=1, point_interval_s=2.5),
        ),
    ],
)
def test_what_was_saved_is_loaded(tmp_path: Path, settings: config.ServerConfig) -> None:
    config.save(tmp_path, settings)
    assert config.load(tmp_path) == settings
    assert config.Layout(tmp_path).config.stat().st_mode & 0o777 == 0o600


def test_a_directory_without_a_server_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no process server here"):
        config.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"vault_id": "F" * 32},
        {"listen": "9443"},
        {"api": "[::1:9444"},
        {"metrics": "localhost:70000"},
        {"addresses": ("gw",)},
        {"api_token_sha256": ("secret",)},
        {"keys": config.KeysConfig("env:KEY")},
        {"ingest": config.IngestConfig(workers=0)},
    ],
)
def test_a_value_without_sense_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    fields = {name: getattr(GOOD, name) for name in GOOD.__struct_fields__}
    config.save(tmp_path, config.ServerConfig(**{**fields, **change}))
    with pytest.raises(ConfigError, match=r"server\.toml"):
        config.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "gw", "gw:", ":1", "::1:9443", "[gw]:1", "gw:65536", "gw:-1", "gw:\u0661", "gw:1 "]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="no HOST:PORT"):
        config.parse_listen(text)


@pytest.mark.parametrize(("text", "address"), [("[::1]:0", ("::1", 0)), ("0.0.0.0:9443", ("0.0.0.0", 9443))])
def test_addresses_go_both_ways(text: str, address: tuple[str, int]) -> None:
    assert config.parse_listen(text) == address
    assert config.format_address(*address) == text
