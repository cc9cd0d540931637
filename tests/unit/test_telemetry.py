import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from farshore import __version__, telemetry
from farshore.errors import ConfigError
from farshore.telemetry import MetricsServer, make_registry, serve_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def restore_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("FARSHORE_LOG_LEVEL", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_is_one_json_object_that_begins_with_ts_level_event(
    capsys: pytest.CaptureFixture[str],
) -> None:
    telemetry.configure("agent")
    telemetry.get_logger(volume="vda").info("segment_sealed", bytes=3, digest=b"\x01\xff", path=Path("/j"))
    [line] = lines(capsys)
    assert list(line)[:4] == ["ts", "level", "event", "role"]
    assert str(line["ts"]).endswith("Z")
    expected = {"level": "info", "event": "segment_sealed", "role": "agent", "volume": "vda", "bytes": 3}
    assert line.items() >= (expected | {"digest": "01ff", "path": "/j"}).items()


def test_text_that_would_break_a_line_or_a_stream_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure("agent")
    telemetry.get_logger().warning("x", text="a\nb", name=os.fsdecode(b"\xff"))
    [line] = lines(capsys)
    assert (line["text"], line["name"]) == ("a\nb", "\udcff")


def test_an_exception_is_part_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure("server")
    try:
        raise KeyError("gone")
    except KeyError:
        telemetry.get_logger().error("ingest_failed", exc_info=True)
        logging.getLogger("asyncio").exception("task %s", 7)
    ours, theirs = lines(capsys)
    assert "KeyError: 'gone'" in str(ours["exception"])
    assert theirs.items() >= {"level": "error", "event": "task 7", "logger": "asyncio"}.items()
    assert "KeyError: 'gone'" in str(theirs["exception"])


def test_the_level_comes_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARSHORE_LOG_LEVEL", "WARNING")
    telemetry.configure("agent")
    telemetry.get_logger().info("quiet")
    logging.getLogger("x").info("quiet")
    telemetry.get_logger().warning("loud")
    assert [line["event"] for line in lines(capsys)] == ["loud"]
    monkeypatch.setenv("FARSHORE_LOG_LEVEL", "chatty")
    with pytest.raises(ConfigError, match="no such log level: FARSHORE_LOG_LEVEL: chatty"):
        telemetry.configure("agent")


@pytest.mark.parametrize(("offset", "prefix"), [(0, "<4>{"), (1, "{")])
def test_the_journal_prefix_is_written_to_the_journal_only(tmp_path: Path, offset: int, prefix: str) -> None:
    program = "from farshore import telemetry as t; t.configure('agent'); t.get_logger().warning('x')"
    with open(tmp_path / "journal", "w+b") as stream:
        status = os.fstat(stream.fileno())
        variable = f"{status.st_dev}:{status.st_ino + offset}"
        subprocess.run(
            [sys.executable, "-c", program],
            env={"JOURNAL_STREAM": variable},
            stderr=stream,
            cwd=ROOT,
            check=True,
        )
        stream.seek(0)
        assert stream.read().decode().startswith(prefix)


@pytest.fixture
def served() -> Iterator[MetricsServer]:
    health: Iterator[tuple[bool, dict[str, object]]] = iter(
        [(True, {"agents": 2}), (False, {"reason": "store unreachable"})]
    )
    server = serve_metrics("127.0.0.1", 0, make_registry("server"), lambda: next(health))
    yield server
    server.close()


def get(server: MetricsServer, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_metrics_name_the_build_and_have_no_created_series(served: MetricsServer) -> None:
    status, body = get(served, "/metrics?name=x")
    assert status == 200
    assert f'farshore_build_info{{role="server",version="{__version__}"}} 1.0' in body.decode()
    assert b"_created" not in body
    assert b"process_resident_memory_bytes" in body
    assert get(served, "/metrics", "HEAD") == (200, b"")


def test_health_is_200_or_503_with_the_reason(served: MetricsServer) -> None:
    status, body = get(served, "/healthz")
    assert (status, json.loads(body)) == (200, {"ok": True, "agents": 2})
    status, body = get(served, "/healthz")
    assert (status, json.loads(body)) == (503, {"ok": False, "reason": "store unreachable"})


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/metrics/"), ("GET", "/../etc/passwd"), ("POST", "/metrics")]
)
def test_everything_else_is_404(served: MetricsServer, method: str, path: str) -> None:
    assert get(served, path, method)[0] == 404


def test_a_request_line_is_bounded(served: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as peer:
        peer.sendall(b"GET /" + b"x" * telemetry.REQUEST_LINE_BYTES_MAX)
        assert b" 414 " in peer.recv(1000)


def test_silent_clients_cannot_use_up_threads_and_a_place_is_given_back(served: MetricsServer) -> None:
    before = threading.active_count()  # other tests of this process may have left some
    peers = [socket.create_connection(("127.0.0.1", served.port), timeout=10) for _ in range(20)]
    try:
        # The refused ones are closed at once; what is left are the places.
        assert sum(_is_closed(peer) for peer in peers) == len(peers) - telemetry.REQUESTS_AT_ONCE
        assert threading.active_count() <= before + telemetry.REQUESTS_AT_ONCE
    finally:
        for peer in peers:
            peer.close()
    for _ in range(100):
        try:
            assert get(served, "/metrics")[0] == 200
            return
        except ConnectionError:
            continue
    pytest.fail("no place was given back")


def _is_closed(peer: socket.socket) -> bool:
    peer.settimeout(0.2)
    try:
        return peer.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_an_address_in_use_is_a_configuration_error(served: MetricsServer) -> None:
    with pytest.raises(ConfigError, match=rf"cannot listen for metrics: 127.0.0.1:{served.port}: .*in use"):
        serve_metrics("127.0.0.1", served.port, make_registry("server"), lambda: (True, {}))


def test_a_port_that_nobody_chose_moves_when_it_is_taken(served: MetricsServer) -> None:
    def healthy() -> tuple[bool, dict[str, object]]:
        return True, {}

    moved = serve_metrics("127.0.0.1", served.port, make_registry("agent"), healthy, may_move=True)
    try:
        assert moved.port not in (0, served.port)
    finally:
        moved.close()


def test_closing_twice_is_harmless_and_frees_the_port() -> None:
    server = serve_metrics(
        "::1" if socket.has_ipv6 else "127.0.0.1", 0, make_registry("agent"), lambda: (True, {})
    )
    server.close()
    server.close()
    with pytest.raises(ConnectionError):
        socket.create_connection((server.host, server.port), timeout=5)
