"""The units: accepted by systemd, as narrow as they claim, and their commands really start."""

import configparser
import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from farshore.cli.main import VERBS
from farshore.cli.main import main as farshore

FOLDER = Path(__file__).parents[3] / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
VENV = "/opt/farshore/venv/bin/"
# systemd-analyze security, in tenths of the tool's scale from 0 (narrow) to 10.
EXPOSURE_MAX = {"farshore-server": 20, "farshore-agent": 45, "farshore-tap": 30}


class Unit(configparser.RawConfigParser):
    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, delimiters=("=",), comment_prefixes=("#",), interpolation=None)
        self.optionxform = str  # type: ignore[assignment,method-assign]  # keys have capitals
        self.read(path)

    def command(self) -> list[str]:
        return shlex.split(self["Service"]["ExecStart"])


@pytest.fixture
def copies(tmp_path: Path) -> list[Path]:
    """The units as they would lie on a host, with a program that exists here in place of ours."""
    program = shutil.which("true")
    assert program is not None
    made = []
    for unit in UNITS:
        text = unit.read_text()
        for name in ("farshore", "python"):
            text = text.replace(f"{VENV}{name} ", f"{program} ")
        made.append(tmp_path / unit.name)
        made[-1].write_text(text)
    return made


@pytest.mark.needs("systemd-analyze")
def test_systemd_accepts_the_units(copies: list[Path]) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, copies)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    complaints = [line for line in done.stderr.splitlines() if "farshore" in line]
    assert (done.returncode, complaints) == (0, [])


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize("name", EXPOSURE_MAX)
def test_a_unit_is_as_narrow_as_it_was(copies: list[Path], name: str) -> None:
    unit = next(path for path in copies if path.stem == name)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager"]
    done = subprocess.run(
        [*command, f"--threshold={EXPOSURE_MAX[name]}", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_every_unit_is_known_here() -> None:
    assert [unit.stem for unit in UNITS] == sorted(EXPOSURE_MAX)


def test_the_tap_outlives_the_rest() -> None:
    tap, agent = Unit(FOLDER / "farshore-tap.service"), Unit(FOLDER / "farshore-agent.service")
    assert tap["Service"]["OOMScoreAdjust"] == "-1000"
    assert not [key for key in tap["Service"] if key.startswith("Memory") and key != "MemoryAccounting"]
    assert "local-fs.target" in tap["Unit"]["After"]
    # Started before what is mounted _netdev, so stopped after it was unmounted.
    assert tap["Unit"]["Before"] == "remote-fs-pre.target"
    assert agent["Service"]["Environment"] == "FARSHORE_TAP_UNIT=1"
    assert "farshore-tap.service" in agent["Unit"]["After"]
    # Wants, not Requires: a tap that fails must not take its agent along, nor the other way round.
    assert "Requires" not in agent["Unit"]
    assert "BindsTo" not in agent["Unit"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_no_unit_can_dump_core_or_give_up(unit: Path) -> None:
    parsed = Unit(unit)
    assert parsed["Service"]["LimitCORE"] == "0"
    assert (parsed["Service"]["Restart"], parsed["Unit"]["StartLimitIntervalSec"]) == ("always", "0")


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_the_command_of_a_unit_exists(unit: Path) -> None:
    program, *words = Unit(unit).command()
    assert program.startswith(VENV)
    if program == f"{VENV}python":
        assert words[0] == "-m"
        assert importlib.util.find_spec(f"{words[1]}.__main__") is not None
    else:
        assert program == f"{VENV}farshore"
        assert words[0] in VERBS
        assert farshore([*words[:2], "--help"]) == 0


def test_the_servers_command_starts_and_tells_systemd(tmp_path: Path) -> None:
    state = tmp_path / "server"
    any_port = ["--listen", "127.0.0.1:0", "--api", "127.0.0.1:0"]
    key = tmp_path / "recovery.key"
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    farshore_command = [sys.executable, "-m", "farshore"]
    subprocess.run(
        [*farshore_command, "server", "init", str(state), *any_port, "--recovery-key-file", str(key)],
        check=True,
        capture_output=True,
        env=environment,
        timeout=60,
    )
    # As the unit's LoadCredential gives it.
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (state / "slot.key").rename(credentials / "slot.key")
    settings = state / "server.toml"
    settings.write_text(settings.read_text().replace("file:slot.key", "credential:slot.key"))
    command = Unit(FOLDER / "farshore-server.service").command()
    assert command[0] == f"{VENV}farshore"
    words = [word.replace("/var/lib/farshore-server", str(state)) for word in command[1:]]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        notify = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "CREDENTIALS_DIRECTORY": str(credentials)}
        with subprocess.Popen(
            [*farshore_command, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, **notify},
        ) as process:
            try:
                assert manager.recv(4096).startswith(b"READY=1\n")
                assert process.stdout is not None
                assert json.loads(process.stdout.readline())["event"] == "ready"
                process.terminate()
                assert manager.recv(4096).startswith(b"STOPPING=1\n")
                assert process.wait(timeout=60) == 0
            finally:
                process.kill()
