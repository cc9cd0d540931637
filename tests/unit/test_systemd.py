import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from farshore import systemd


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@farshore-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0"))
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield receiver


def test_messages_reach_the_manager(manager: socket.socket) -> None:
    assert systemd.ready("listening on 9443\nREADY=0")
    assert manager.recv(1000) == b"READY=1\nSTATUS=listening on 9443 READY=0"
    assert systemd.ready()
    assert manager.recv(1000) == b"READY=1"
    assert systemd.status("3 agents")
    assert manager.recv(1000) == b"STATUS=3 agents"
    assert systemd.alive()
    assert manager.recv(1000) == b"WATCHDOG=1"
    assert systemd.stopping("draining")
    assert manager.recv(1000) == b"STOPPING=1\nSTATUS=draining"


@pytest.mark.parametrize("address", [None, "", "relative", "/absent/socket"])
def test_without_a_manager_nothing_happens(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not systemd.ready()


@pytest.mark.parametrize(
    ("timeout", "pid", "seconds"),
    [
        ("30000000", None, 30.0),
        ("500000", "self", 0.5),
        ("30000000", "1", None),
        ("", None, None),
        ("0", None, None),
    ],
)
def test_the_watchdog_period(
    timeout: str, pid: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", timeout)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "self" else pid)
    assert systemd.watchdog_s() == seconds
