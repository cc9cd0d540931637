"""The API behind real TLS: who may ask, what a bad request gets, and what the client makes of it."""

import asyncio
import contextlib
import http.client
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from farshore import pki
from farshore.client import Client, ClientConfig, load
from farshore.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    Conflict,
    Failed,
    FarshoreError,
    Fenced,
    NotFound,
    Unreachable,
    UsageError,
)
from process_server.control.api import (
    BODY_BYTES_MAX,
    ApiServer,
    hash_token,
    make_app,
    new_bearer_token,
)

VAULT = bytes(range(16))
AUTHORITY = pki.Authority.create(VAULT, time.time_ns())
TOKEN = new_bearer_token()


@dataclass
class FakeServices:
    is_ready: bool = True
    failure: Exception | None = None
    asked: list[tuple[object, ...]] = field(default_factory=list)

    def _did(self, *what: object) -> None:
        self.asked.append(what)
        if self.failure:
            raise self.failure

    def ready(self) -> bool:
        return self.is_ready

    def status(self) -> dict[str, object]:
        self._did("status")
        return {"machines": [{"name": "db1", "rpo_seconds": None}]}

    def machines(self) -> list[dict[str, object]]:
        return [{"name": "db1"}]

    async def create_token(self, machine: str, ttl_s: float) -> tuple[str, str]:
        self._did("token", machine, ttl_s)
        return "fst1.x", "2026-11-21T09:00:00Z"

    async def revoke(self, machine: str) -> None:
        self._did("revoke", machine)

    async def points(self, machine: str) -> list[dict[str, object]]:
        self._did("points", machine)
        return [{"id": "rp-1"}]

    async def create_point(self, machine: str, tag: str, timeout_s: float, *, allow_fuzzy: bool) -> str:
        self._did("point", machine, tag, timeout_s, *(("fuzzy",) if allow_fuzzy else ()))
        return "rp-2"


@dataclass
class Site:
    services: FakeServices
    port: int
    config: ClientConfig
    client: Client

    async def call(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        """Send a request as no client of ours would, with the right token unless told otherwise."""
        given = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}

        def request() -> tuple[int, Any]:
            context = pki.client_context(AUTHORITY.certificate, VAULT, alpn=pki.ALPN_HTTP)
            with contextlib.closing(
                http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=context)
            ) as connection:
                connection.request(method, path, body, given)
                response = connection.getresponse()
                return response.status, json.loads(response.read() or b"null")

        return await asyncio.to_thread(request)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    issued = AUTHORITY.issue_server(VAULT, time.time_ns())
    context = pki.server_context(
        issued.certificate,
        issued.private_key,
        AUTHORITY.certificate,
        alpn=pki.ALPN_HTTP,
        client_certificates=False,
    )
    services = FakeServices()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = ApiServer(make_app(services, [hash_token("other"), hash_token(TOKEN)]), listener, context)
    config = ClientConfig(f"https://127.0.0.1:{port}", VAULT.hex(), AUTHORITY.certificate.decode(), TOKEN)
    async with asyncio.TaskGroup() as group:
        group.create_task(server.run())
        yield Site(services, port, config, Client(config))
        server.stop()


async def test_what_the_command_line_asks_is_answered(site: Site) -> None:
    client = site.client
    assert (await asyncio.to_thread(client.get, "status"))["machines"][0]["name"] == "db1"
    assert await asyncio.to_thread(client.get, "machines") == {"machines": [{"name": "db1"}]}
    made = await asyncio.to_thread(client.post, "tokens", body={"machine": "db1", "ttl_seconds": 60})
    assert made == {"token": "fst1.x", "expires": "2026-11-21T09:00:00Z"}
    await asyncio.to_thread(client.post, "machines", "db1", "revoke", body={})
    assert await asyncio.to_thread(client.get, "machines", "db1", "points") == [{"id": "rp-1"}]
    point = await asyncio.to_thread(client.post, "machines", "db1", "points", body={"tag": "x"})
    assert point == {"point": "rp-2"}
    body: dict[str, object] = {"tag": "y", "timeout_seconds": 5, "allow_fuzzy": True}
    assert await asyncio.to_thread(client.post, "machines", "db1", "points", body=body) == {"point": "rp-2"}
    assert site.services.asked == [
        ("status",),
        ("token", "db1", 60.0),
        ("revoke", "db1"),
        ("points", "db1"),
        ("point", "db1", "x", 60.0),
        ("point", "db1", "y", 5.0, "fuzzy"),
    ]


async def test_a_name_with_a_slash_reaches_no_other_route(site: Site) -> None:
    with pytest.raises(NotFound):
        await asyncio.to_thread(site.client.post, "machines", "db1/revoke", "x", body={})
    assert site.services.asked == []


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"],
    # The token is a new one in each process that collects this file.
    ids=["none", "nothing", "another", "basic", "longer", "shorter"],
)
@pytest.mark.parametrize(
    "path", ["/api/v1/status", "/api/v1/machines/none/points", "/none", "/api/v1/tokens"]
)
async def test_without_the_token_every_route_looks_the_same(
    site: Site, authorization: str, path: str
) -> None:
    status, problem = await site.call("GET", path, Authorization=authorization)
    assert status == 401
    assert {**problem, "request_id": ""} == {
        "type": "about:blank",
        "title": "a valid bearer token is needed",
        "status": 401,
        "code": "unauthorized",
        "request_id": "",
    }
    assert site.services.asked == []


async def test_life_and_readiness_need_no_token(site: Site) -> None:
    assert await site.call("GET", "/livez", Authorization="") == (200, {"ok": True})
    assert await site.call("GET", "/readyz", Authorization="") == (200, {"ok": True})
    site.services.is_ready = False
    assert await site.call("GET", "/readyz", Authorization="") == (503, {"ok": False})


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/api/v1/none", b"", {}, 404),
        ("GET", "/api/v1/status/", b"", {}, 404),
        ("GET", "/api/v1/machines/../../etc", b"", {}, 404),
        ("DELETE", "/api/v1/status", b"", {}, 405),
        ("GET", "/api/v1/tokens", b"", {}, 405),
        ("POST", "/api/v1/tokens", b"{}", {"Content_Type": "text/plain"}, 415),
        ("POST", "/api/v1/tokens", b"x" * (BODY_BYTES_MAX + 1), {}, 413),
        ("POST", "/api/v1/tokens", b"", {}, 400),
        ("POST", "/api/v1/tokens", b"{", {}, 400),
        ("POST", "/api/v1/tokens", b"[]", {}, 400),
        ("POST", "/api/v1/tokens", b"{}", {}, 400),
        ("POST", "/api/v1/tokens", b'{"machine":"db1","x":1}', {}, 400),
        ("POST", "/api/v1/tokens", b'{"machine":"db1","ttl_seconds":NaN}', {}, 400),
        ("POST", "/api/v1/tokens", b'{"machine":"db1","ttl_seconds":-1}', {}, 400),
        ("POST", "/api/v1/tokens", b'{"machine":"db1","ttl_seconds":3601}', {}, 400),
        ("POST", "/api/v1/tokens", b'{"machine":"\xff"}', {}, 400),
        ("POST", "/api/v1/tokens", b"[" * 60_000, {}, 400),
        ("POST", "/api/v1/machines/db1/points", b'{"tag":""}', {}, 400),
    ],
)
async def test_a_bad_request_gets_a_problem_and_changes_nothing(
    site: Site, method: str, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    got, problem = await site.call(method, path, body, **headers)
    assert (got, problem["status"]) == (status, status)
    assert problem["request_id"]
    assert site.services.asked == []


async def test_a_body_that_grows_past_the_bound_is_cut(site: Site) -> None:
    context = pki.client_context(AUTHORITY.certificate, VAULT, alpn=pki.ALPN_HTTP)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=context)
    head = f"POST /api/v1/tokens HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head.encode())
    with contextlib.suppress(ConnectionError):
        for _ in range(40):
            writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
            await writer.drain()
    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.transport.abort()


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (NotFound("no such machine", where="db9", fix="look"), 404),
        (Conflict("the point is fuzzy", why="resync"), 409),
        (Fenced("not ours"), 409),
        (AuthError("no"), 403),
        (UsageError("bad name"), 422),
        (CapacityError("too many"), 507),
        (Unreachable("the agent is not connected"), 503),
        (Failed("the point was not vaulted in time"), 500),
    ],
)
async def test_the_client_raises_what_the_server_raised(
    site: Site, raised: FarshoreError, status: int
) -> None:
    site.services.failure = raised
    assert (await site.call("GET", "/api/v1/status"))[0] == status
    with pytest.raises(type(raised)) as caught:
        await asyncio.to_thread(site.client.get, "status")
    assert caught.value.as_dict() == raised.as_dict()


async def test_what_nobody_expected_is_told_without_its_details(site: Site) -> None:
    site.services.failure = ValueError("secret detail")
    status, problem = await site.call("GET", "/api/v1/status")
    assert status == 500
    assert "secret detail" not in json.dumps(problem)
    with pytest.raises(Failed, match="the server failed"):
        await asyncio.to_thread(site.client.get, "status")


async def test_a_server_of_another_vault_gets_no_token(site: Site) -> None:
    other = Client(msgspec.structs.replace(site.config, vault_id="f" * 32))
    with pytest.raises(AuthError, match="not the process server of our vault"):
        await asyncio.to_thread(other.get, "status")
    foreign = pki.Authority.create(VAULT, time.time_ns()).certificate.decode()
    with pytest.raises(AuthError, match="not the process server of our vault"):
        await asyncio.to_thread(Client(msgspec.structs.replace(site.config, ca=foreign)).get, "status")
    assert site.services.asked == []


async def test_nobody_there_is_unreachable(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gone = Client(msgspec.structs.replace(site.config, api=f"https://127.0.0.1:{port}"))
    with pytest.raises(Unreachable, match="does not answer"):
        await asyncio.to_thread(gone.get, "status")


# --- where the client's configuration is found ---


def write(path: Path, config: dict[str, str], mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    path.chmod(mode)
    return path


GOOD = {"api": "https://gw:9444", "vault_id": "0" * 32, "ca": "x", "token": "one"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("FARSHORE_CLIENT", "FARSHORE_API_URL", "FARSHORE_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    return tmp_path


def test_the_nearest_configuration_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="do not know where"):
        load()
    write(home / "xdg/farshore/client.toml", {**GOOD, "token": "xdg"})
    assert load().token == "xdg"
    monkeypatch.setenv("FARSHORE_CLIENT", str(write(home / "env.toml", {**GOOD, "token": "env"})))
    assert load().token == "env"
    assert load(write(home / "option.toml", {**GOOD, "token": "option"})).token == "option"
    token = home / "token"
    token.write_text(" file\n")
    token.chmod(0o600)
    monkeypatch.setenv("FARSHORE_TOKEN_FILE", str(token))
    monkeypatch.setenv("FARSHORE_API_URL", "https://[::1]:1")
    assert (load().token, load().api) == ("file", "https://[::1]:1")
    token.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read the token"):
        load()


def test_a_configuration_that_others_can_read_is_refused(home: Path) -> None:
    path = write(home / "client.toml", GOOD, 0o640)
    with pytest.raises(ConfigError, match="others can read the token"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"api": "http://gw:9444"},
        {"api": "gw:9444"},
        {"api": "https://gw:x"},
        {"api": "https://gw/x"},
        {"vault_id": "x"},
        {"token": ""},
        {"token": "a b"},
        {"extra": "x"},
    ],
)
def test_a_configuration_without_sense_is_refused(home: Path, change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"client\.toml"):
        load(write(home / "client.toml", {**GOOD, **change}))


def test_a_token_is_in_no_repr() -> None:
    config = msgspec.convert(GOOD | {"token": TOKEN}, ClientConfig)
    assert TOKEN not in repr(config)
    assert hash_token(TOKEN) != TOKEN
