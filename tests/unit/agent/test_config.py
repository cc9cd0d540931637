"""agent.toml: what enrol writes is what run reads."""

from pathlib import Path

import pytest

from agent import config
from farshore.errors import ConfigError

GOOD = config.AgentConfig("db1", "0" * 32, "f" * 32, ("gateway:9443", "[::1]:9443"), metrics_port=0)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    config.save(tmp_path, GOOD)
    assert config.load(tmp_path) == GOOD


def test_an_agent_that_is_not_enrolled_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not enrolled"):
        config.load(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["servers = []\n", 'servers = ["gateway:0"]\n', 'servers = ["a:1"]\nmetrics_port = 70000\n', "x = 1\n"],
)
def test_a_value_without_sense_is_refused(tmp_path: Path, line: str) -> None:
    text = f'machine = "db1"\nmachine_id = "{"0" * 32}"\nvault_id = "{"f" * 32}"\n{line}'
    config.Layout(tmp_path).config.write_text(text)
    with pytest.raises(ConfigError):
        config.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("gateway:9443", ("gateway", 9443)),
        ("gateway", ("gateway", 9443)),
        ("[::1]:1", ("::1", 1)),
        ("[::1]", ("::1", 9443)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert config.parse_address(text) == address
