"""A server, tokens and agents through the command line, each its own process, and who must stay out."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import config as agent_config
from farshore import pki
from farshore.client import Client, load
from farshore.ids import new_id
from farshore.site import Daemon, Site, run
from farshore.wire import frames
from farshore.wire import messages as m
from tests.harness.faults import Injected


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    made = Site(tmp_path)
    made.init()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def running(site: Site) -> Site:
    site.start_server()
    return site


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A running server with the machines db1 and db2, for tests that leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("served")
        patch.setenv("XDG_CONFIG_HOME", str(directory / "xdg"))
        made = Site(directory)
        made.init()
        try:
            made.start_server()
            made.enrol("db1")
            made.enrol("db2")
            yield made
        finally:
            made.close()


def failed(*arguments: str | Path, code: int, env: dict[str, str] | None = None) -> str:
    """Run a command that must end with ``code`` and one line on stderr; return that line."""
    done = subprocess.run(
        [sys.executable, "-m", "farshore", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ")
    return errors[0]


def init(directory: Path, key: Path, *more: str) -> tuple[str | Path, ...]:
    return ("server", "init", directory, "--recovery-key-file", key, *more)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def tree(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


# --- making a server ---


def test_init_writes_private_files_and_keeps_no_secret_in_the_settings(site: Site) -> None:
    directory = site.server_dir
    for name in ("client.toml", "server.toml", "slot.key"):
        assert mode(directory / name) == 0o600
    assert mode(site.key) == 0o600
    assert mode(directory) == 0o700
    assert site.key.read_text().startswith("FSRK-")
    settings = (directory / "server.toml").read_text()
    assert load(directory / "client.toml").token not in settings
    assert (directory / "slot.key").read_bytes().hex() not in settings
    link = site.directory / "config/farshore/client.toml"
    assert link.resolve() == (directory / "client.toml").resolve()


def test_a_second_init_is_refused_and_changes_nothing(site: Site) -> None:
    before = tree(site.directory)
    other = site.directory / "other.key"
    assert "already" in failed(*init(site.server_dir, other), code=6)
    assert "vault already" in failed(*init(site.directory / "two", other, "--vault", site.vault), code=6)
    fresh = ("--vault", f"file://{site.directory}/v3")
    assert "exists already" in failed(*init(site.directory / "three", site.key, *fresh), code=6)
    assert tree(site.directory) == before


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--listen", "nowhere"), 2),
        (("--api", "127.0.0.1:99999"), 2),
        (("--vault", "ftp://x"), 3),
        (("--vault", "file://relative"), 3),
        (("--none",), 2),
    ],
)
def test_an_init_that_fails_leaves_nothing(tmp_path: Path, more: tuple[str, ...], code: int) -> None:
    failed(*init(tmp_path / "server", tmp_path / "key", *more), code=code)
    assert tree(tmp_path) == set()


@pytest.mark.fault("F1")
def test_an_init_that_dies_after_the_vault_was_made_can_be_adopted(
    tmp_path: Path, injected: Injected
) -> None:
    directory, key = tmp_path / "server", tmp_path / "key"
    env = {"FARSHORE_FAILPOINTS": "server.init.after_vault=kill", "XDG_CONFIG_HOME": str(tmp_path / "x")}
    done = subprocess.run(
        [sys.executable, "-m", "farshore", *map(str, init(directory, key))],
        env={**os.environ, **env},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    injected("F1")
    vault = f"file://{directory}/vault"
    run("server", "adopt", directory, "--vault", vault, "--recovery-key-file", key, env=env)
    assert (directory / "server.toml").exists()


@pytest.mark.fault("F1")
def test_an_adopt_that_dies_leaves_the_vault_to_the_old_server_and_to_the_next_adopt(
    tmp_path: Path, injected: Injected
) -> None:
    old, key = tmp_path / "old", tmp_path / "key"
    quiet = {"XDG_CONFIG_HOME": str(tmp_path / "x")}
    addresses = ("--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")
    run(*init(old, key, *addresses), env=quiet)
    vault = f"file://{old}/vault"

    def words(directory: Path) -> tuple[str | Path, ...]:
        return "server", "adopt", directory, "--vault", vault, "--recovery-key-file", key, *addresses

    done = subprocess.run(
        [sys.executable, "-m", "farshore", *map(str, words(tmp_path / "new"))],
        env={**os.environ, **quiet, "FARSHORE_FAILPOINTS": "server.adopt.after_slot=kill"},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    injected("F1")
    before = Daemon("server", "run", old, log=tmp_path / "old.log", env=quiet)
    assert before.stop() == 0
    run(*words(tmp_path / "next"), env=quiet)
    after = Daemon("server", "run", tmp_path / "next", log=tmp_path / "next.log", env=quiet)
    assert after.stop() == 0


def test_adopt_after_the_server_was_lost(running: Site) -> None:
    running.enrol("db1")
    before = agent_config.load(running.agent_dir("db1"))
    running.kill_server()
    shutil.rmtree(running.server_dir)
    adopt = ("server", "adopt", running.server_dir, "--vault", running.vault)
    any_port = ("--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")
    told = json.loads(run(*adopt, "--recovery-key-file", running.key, *any_port, "--json", env=running.env))
    assert told["machines"] == ["db1"]
    assert "already" in failed(*adopt, "--recovery-key-file", running.key, code=6)
    running.start_server()
    assert [entry["name"] for entry in running.json("machine", "list")["machines"]] == ["db1"]
    # The machine is known to the new server: the same key is answered again, by its old identity.
    running.enrol("db1")
    assert agent_config.load(running.agent_dir("db1")).machine_id == before.machine_id


def test_adopt_needs_the_right_key(site: Site) -> None:
    run(*init(site.directory / "s2", site.directory / "other.key"))
    adopt = ("server", "adopt", site.directory / "new", "--vault", site.vault, "--recovery-key-file")
    before = tree(site.directory)
    assert "does not open" in failed(*adopt, site.directory / "other.key", code=7)
    failed(*adopt, site.directory / "none", code=5)
    assert tree(site.directory) == before


# --- running it ---


def test_a_server_that_cannot_start_says_why_on_one_line(site: Site) -> None:
    assert "no process server here" in failed("server", "run", site.directory / "none", code=3)
    settings = site.server_dir / "server.toml"
    good = settings.read_text()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings.write_text(re.sub(r'listen = ".*"', f'listen = "127.0.0.1:{port}"', good))
        assert "cannot listen for agents" in failed("server", "run", site.server_dir, code=3)
        settings.write_text(re.sub(r'api = ".*"', f'api = "127.0.0.1:{port}"', good))
        assert "cannot listen for the API" in failed("server", "run", site.server_dir, code=3)
    settings.write_text(good + "extra = 1\n")
    assert "extra" in failed("server", "run", site.server_dir, code=3)
    settings.write_text(good)
    slot = site.server_dir / "slot.key"
    key = slot.read_bytes()
    slot.write_bytes(bytes(32))
    assert "does not open the vault" in failed("server", "run", site.server_dir, code=7)
    slot.write_bytes(key)
    slot.chmod(0o644)
    assert "others can read" in failed("server", "run", site.server_dir, code=3)
    slot.chmod(0o600)
    (site.directory / "vault").rename(site.directory / "away")
    assert "cannot open the vault" in failed("server", "run", site.server_dir, code=5)


def test_one_vault_has_one_server(running: Site) -> None:
    failed("server", "run", running.server_dir, code=6)


def test_a_server_stops_in_order(running: Site) -> None:
    assert running.server is not None
    assert running.server.stop() == 0
    running.server = None
    assert "does not answer" in failed("status", code=9, env=running.env)


# --- enrolling ---


def test_from_nothing_to_an_enrolled_machine(running: Site) -> None:
    made = running.json("token", "create", "--machine", "db1", "--ttl", "5m")
    assert set(made) == {"token", "expires"}
    token = running.directory / "token"
    token.write_text(made["token"])
    assert running.server is not None
    address = str(running.server.ready["listen"])
    enrol = ("agent", "enrol", running.agent_dir("db1"), "--server", address, "--token-file", token)
    told = json.loads(run(*enrol, "--json"))
    assert (told["machine"], told["servers"]) == ("db1", [address])
    assert json.loads(run(*enrol, "--json"))["renewed"]
    # Another key for the name: another directory has one.
    other = ("agent", "enrol", running.directory / "other", "--server", address, "--token-file", token)
    assert "on record with another key" in failed(*other, code=6)
    assert mode(running.agent_dir("db1") / "identity/key.pem") == 0o600
    status = running.json("status")["machines"]
    assert [(entry["name"], entry["health"]) for entry in status] == [("db1", "warning")]
    assert "WARNING db1" in running.cli("status")
    failed("point", "create", "db1", "--tag", "x", code=9, env=running.env)
    failed("point", "create", "db9", "--tag", "x", code=5, env=running.env)
    assert "token_reused" in running.server.log.read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ("token", "create"),
        ("token", "create", "--machine", "Not A Name"),
        ("token", "create", "--machine", "db1", "--ttl", "2h"),
        ("token", "create", "--machine", "db1", "--ttl", "soon"),
        ("agent", "enrol", "/none", "--server", "gw:0", "--token-file", "/dev/null"),
        ("agent", "enrol", "/none", "--server", "gw:9443", "--token-file", "/dev/null"),
        ("agent", "enrol", "/none"),
        ("server", "init", "/none"),
        ("server", "adopt", "/none", "--recovery-key-file", "/none"),
        ("machine", "revoke"),
        ("point", "create", "db1"),
        ("point", "create", "db1", "--tag", "x", "--timeout", "never"),
        ("point", "create", "db1", "--tag", "x", "--wait", "captured"),
        ("status", "--wath"),
    ],
)
def test_wrong_words_are_usage_errors(arguments: tuple[str, ...]) -> None:
    failed(*arguments, code=2)


def test_secrets_are_in_no_log_and_no_command_line(running: Site) -> None:
    assert running.server is not None
    token = running.cli("token", "create", "--machine", "db1").strip()
    (running.directory / "token").write_text(token)
    running.enrol("db1")
    secrets = [
        pki.decode_token(token).secret.hex(),
        token.removeprefix("fst1.")[40:80],
        load(running.server_dir / "client.toml").token,
        running.key.read_text().strip(),
        (running.server_dir / "slot.key").read_bytes().hex(),
        "PRIVATE KEY",
    ]
    logged = running.server.log.read_text()
    commands = [
        path.read_bytes().decode("utf-8", "replace")
        + (path.parent / "environ").read_bytes().decode("utf-8", "replace")
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.parent.name in {str(running.server.process.pid)}
    ]
    assert commands
    stored = b"".join(
        path.read_bytes() for path in (running.directory / "vault").rglob("*") if path.is_file()
    )
    for secret in secrets:
        assert secret not in logged
        assert secret not in commands[0]
        assert secret.encode() not in stored


# --- on the wire ---


def connect(site: Site, context: ssl.SSLContext) -> ssl.SSLSocket:
    assert site.server is not None
    host, port = agent_config.parse_address(str(site.server.ready["listen"]))
    return context.wrap_socket(socket.create_connection((host, port), timeout=20))


def ask(connection: ssl.SSLSocket, message: m.Message) -> m.Message:
    connection.sendall(frames.encode(message))
    head = read(connection, frames.HEADER.size)
    header = frames.decode_header(head)
    return frames.decode_message(header, read(connection, header.meta_bytes))


def read(connection: ssl.SSLSocket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError(f"{len(data)} of {size} bytes")
        data += more
    return data


def agent_context(site: Site, machine: str = "db1") -> ssl.SSLContext:
    directory = site.agent_dir(machine) / "identity"
    return pki.client_context(
        (directory / "ca.pem").read_bytes(),
        agent_config.load(site.agent_dir(machine)).vault_bytes,
        certificate=(directory / "cert.pem").read_bytes(),
        private_key=(directory / "key.pem").read_bytes(),
    )


def hello(site: Site, machine: str = "db1") -> m.Hello:
    settings = agent_config.load(site.agent_dir(machine))
    return m.Hello(m.PROTOCOL, settings.machine_bytes, machine, "test", 0, ())


def vault_authority(site: Site) -> pki.Authority:
    """The vault's own CA, as nobody but its servers has it."""
    from process_server.vault.control import ControlStore
    from process_server.vault.keys import open_vault
    from process_server.vault.recovery_key import RecoveryKey
    from process_server.vault.store import open_store

    with contextlib.closing(open_store(site.vault)) as store:
        keys = open_vault(store, RecoveryKey.parse(site.key.read_text()))
        control = ControlStore(store, keys).load()
    return pki.Authority(control.ca_certificate, control.ca_key)


def test_an_enrolled_machine_is_welcome_until_it_is_revoked(running: Site) -> None:
    running.enrol("db1")
    with connect(running, agent_context(running)) as live:
        answer = ask(live, hello(running))
        assert isinstance(answer, m.Welcome)
        running.cli("machine", "revoke", "db1")
        began = time.monotonic()
        codes = []
        with contextlib.suppress(EOFError, OSError):
            while True:
                header = frames.decode_header(read(live, frames.HEADER.size))
                message = frames.decode_message(header, read(live, header.meta_bytes))
                codes.append(message.code if isinstance(message, m.Error) else "")
        assert time.monotonic() - began < 10
        assert codes[-1] == "denied"
    with connect(running, agent_context(running)) as again, contextlib.suppress(EOFError, OSError):
        answer = ask(again, hello(running))
        assert isinstance(answer, m.Error)
        assert answer.code == "denied"


CERTIFICATES: dict[str, dict[str, Any]] = {
    "expired": {"age_s": 2 * 86_400},
    "not yet valid": {"age_s": -86_400},
    "another ca": {"authority": "foreign"},
    "another vault": {"vault_id": bytes(16)},
    "a machine nobody knows": {"machine_id": new_id()},
    "another key": {},
    "a server's": {"server": True},
    "none": {"none": True},
}


@pytest.mark.parametrize("case", CERTIFICATES)
def test_a_stranger_is_not_welcome(served: Site, case: str) -> None:
    """Each certificate but for one thing is as the server's own CA makes it."""
    asked = CERTIFICATES[case]
    settings = agent_config.load(served.agent_dir("db1"))
    ours = vault_authority(served)
    now_ns = time.time_ns() - int(asked.get("age_s", 0) * 1e9)
    foreign = pki.Authority.create(settings.vault_bytes, time.time_ns())
    authority = foreign if asked.get("authority") else ours
    vault_id = asked.get("vault_id", settings.vault_bytes)
    key = pki.new_key()
    certificate = authority.issue_agent(
        vault_id, asked.get("machine_id", settings.machine_bytes), "db1", pki.public_key_of(key), now_ns
    )
    private_key = pki.key_to_pem(key)
    if asked.get("server"):
        issued = ours.issue_server(settings.vault_bytes, now_ns)
        certificate, private_key = issued.certificate, issued.private_key
    context = pki.client_context(
        ours.certificate,
        settings.vault_bytes,
        certificate=None if asked.get("none") else certificate,
        private_key=private_key,
    )
    with contextlib.suppress(EOFError, OSError), connect(served, context) as connection:
        answer = ask(connection, hello(served))
        assert isinstance(answer, m.Error)
        assert answer.code in ("auth", "denied")
    # Those who belong are not disturbed by it.
    with connect(served, agent_context(served)) as connection:
        assert isinstance(ask(connection, hello(served)), m.Welcome)


def test_a_machine_cannot_take_another_ones_session(served: Site) -> None:
    with connect(served, agent_context(served, "db1")) as connection:
        answer = ask(connection, hello(served, "db2"))
        assert isinstance(answer, m.Error)
        assert answer.code == "auth"


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n", b"\0" * 64])
def test_who_does_not_speak_tls_is_sent_away(served: Site, said: bytes) -> None:
    assert served.server is not None
    host, port = agent_config.parse_address(str(served.server.ready["listen"]))
    with socket.create_connection((host, port), timeout=20) as plain:
        plain.sendall(said)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while more := plain.recv(4096):
                answer += more
        assert b"HTTP" not in answer
    assert len(served.json("status")["machines"]) == 2


def test_tls_1_2_is_refused_by_the_running_server(served: Site) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError, match=r"(?i)protocol|alert|reset|closed|eof"):
        connect(served, old)


def test_the_api_wants_our_token(served: Site) -> None:
    import msgspec

    config = load(served.server_dir / "client.toml")
    assert len(Client(config).get("status")["machines"]) == 2
    client_file = served.directory / "wrong.toml"
    wrong = msgspec.structs.replace(config, token="fsat_wrong")
    from process_server.control.setup import write_client

    write_client(client_file, wrong)
    failed("status", "--client", client_file, code=4)
