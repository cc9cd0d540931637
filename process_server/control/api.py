"""The HTTPS API: a thin face of the services, for the command line and for scripts.

Every route below ``/api/`` needs a bearer token, checked before anything else is: a stranger cannot tell a
route or a machine that exists from one that does not. Errors are problem+json (RFC 9457) and carry the error
as the server raised it, so that the client raises the same.
"""

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final, Protocol, TypeVar

import msgspec
import uvicorn
from msgspec import Meta
from prometheus_client import CollectorRegistry, Counter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farshore.errors import (
    AuthError,
    CapacityError,
    Conflict,
    Failed,
    FarshoreError,
    NotFound,
    Unreachable,
    UsageError,
)
from farshore.telemetry import get_logger
from farshore.units import KIB

BODY_BYTES_MAX: Final = 64 * KIB
BODY_S: Final = 10.0
CONNECTIONS_MAX: Final = 64
TAG_CHARS_MAX: Final = 200
WAIT_S_MAX: Final = 86_400.0
TROUBLE_LINES_PER_S: Final = 2

_STATUS: Final[tuple[tuple[type[FarshoreError], int], ...]] = (
    (UsageError, 422),
    (AuthError, 403),
    (NotFound, 404),
    (Conflict, 409),
    (CapacityError, 507),
    (Unreachable, 503),
)

log = get_logger()

_Body = TypeVar("_Body", bound=msgspec.Struct)


class Services(Protocol):
    """What the API shows; `process_server.main` puts it together. Every method may raise FarshoreError."""

    def ready(self) -> bool:
        """Tell whether agents can connect and commits be made."""
        ...

    def status(self) -> dict[str, object]: ...

    def machines(self) -> list[dict[str, object]]: ...

    async def create_token(self, machine: str, ttl_s: float) -> tuple[str, str]:
        """Return the token and until when it is good, RFC 3339."""
        ...

    async def revoke(self, machine: str) -> None: ...

    async def points(self, machine: str) -> list[dict[str, object]]: ...

    async def create_point(self, machine: str, tag: str, timeout_s: float, *, allow_fuzzy: bool) -> str: ...


class TokenRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    machine: Annotated[str, Meta(min_length=1, max_length=63)]
    ttl_seconds: Annotated[float, Meta(gt=0, le=3600)] = 3600.0


class PointRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tag: Annotated[str, Meta(min_length=1, max_length=TAG_CHARS_MAX)]
    timeout_seconds: Annotated[float, Meta(gt=0, le=WAIT_S_MAX)] = 60.0
    allow_fuzzy: bool = False


def hash_token(token: str) -> str:
    """Return what ``server.toml`` keeps of a bearer token."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_bearer_token() -> str:
    """Return a new bearer token: 256 random bits."""
    return "fsat_" + secrets.token_urlsafe(32)


def make_app(
    services: Services, token_sha256: Sequence[str], registry: CollectorRegistry | None = None
) -> ASGIApp:
    """Return the application; ``token_sha256`` are the hashes of the tokens it accepts."""

    async def livez(request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def readyz(request: Request) -> Response:
        ready = services.ready()
        return JSONResponse({"ok": ready}, 200 if ready else 503)

    async def status(request: Request) -> Response:
        return JSONResponse(services.status())

    async def machines(request: Request) -> Response:
        return JSONResponse({"machines": services.machines()})

    async def create_token(request: Request) -> Response:
        asked = await read_body(request, TokenRequest)
        token, expires = await services.create_token(asked.machine, asked.ttl_seconds)
        return JSONResponse({"token": token, "expires": expires}, 201)

    async def revoke(request: Request) -> Response:
        name = request.path_params["machine"]
        await services.revoke(name)
        return JSONResponse({"name": name, "revoked": True})

    async def points(request: Request) -> Response:
        return JSONResponse(await services.points(request.path_params["machine"]))

    async def create_point(request: Request) -> Response:
        asked = await read_body(request, PointRequest)
        machine = request.path_params["machine"]
        point = await services.create_point(
            machine, asked.tag, asked.timeout_seconds, allow_fuzzy=asked.allow_fuzzy
        )
        return JSONResponse({"point": point}, 201)

    base = "/api/v1"
    app = Starlette(
        routes=[
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route(f"{base}/status", status),
            Route(f"{base}/tokens", create_token, methods=["POST"]),
            Route(f"{base}/machines", machines),
            Route(f"{base}/machines/{{machine}}/revoke", revoke, methods=["POST"]),
            Route(f"{base}/machines/{{machine}}/points", points, methods=["GET"]),
            Route(f"{base}/machines/{{machine}}/points", create_point, methods=["POST"]),
        ],
        exception_handlers={
            FarshoreError: _on_our_error,  # type: ignore[dict-item]  # starlette's type is for Exception
            HTTPException: _on_http_error,  # type: ignore[dict-item]
            Exception: _on_anything,
        },
    )
    app.router.redirect_slashes = False
    return _Guard(app, token_sha256, registry)


async def read_body(request: Request, kind: type[_Body]) -> _Body:
    """Return the request's JSON as ``kind``.

    Raises:
        HTTPException: 415 not JSON by its type, 413 too long, 408 too slow, 400 not what is asked for.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be application/json")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > BODY_BYTES_MAX:
        raise HTTPException(413, f"the body is longer than {BODY_BYTES_MAX} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > BODY_BYTES_MAX:
                    raise HTTPException(413, f"the body is longer than {BODY_BYTES_MAX} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {BODY_S:g} s") from None
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"the body is not what is asked for: {error}") from error


class _Guard:
    """Looks at the token before anything else, and puts the same headers on every answer."""

    def __init__(self, app: ASGIApp, token_sha256: Sequence[str], registry: CollectorRegistry | None) -> None:
        self._app = app
        self._hashes = [entry.encode() for entry in token_sha256]
        self._lines: list[float] = []
        self._failures = Counter(
            "farshore_api_auth_failures", "Requests without a valid bearer token.", registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        assert scope["type"] == "http", scope["type"]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"cache-control", b"no-store"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        if scope["path"] not in ("/livez", "/readyz") and not self._accepts(scope):
            self._failures.inc()
            self._complain(scope)
            answer = _problem(401, "a valid bearer token is needed", headers={"WWW-Authenticate": "Bearer"})
            await answer(scope, receive, send_with_headers)
            return
        # Starlette answers 500 by our handler, which logs it, and raises it again for the server to log.
        with contextlib.suppress(Exception):
            await self._app(scope, receive, send_with_headers)

    def _accepts(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        kind, _, token = given[0].partition(b" ")
        if kind.lower() != b"bearer":
            return False
        shown = hashlib.sha256(token.strip()).hexdigest().encode()
        # All of them, each in constant time: how long it takes says nothing about which one was close.
        matches = [hmac.compare_digest(shown, entry) for entry in self._hashes]
        return any(matches)

    def _complain(self, scope: Scope) -> None:
        now = time.monotonic()
        self._lines = [at for at in self._lines if now - at < 1.0]
        if len(self._lines) < TROUBLE_LINES_PER_S:
            self._lines.append(now)
            peer = scope.get("client") or ("",)
            log.warning("api_request_refused", peer=str(peer[0]), reason="no valid bearer token")


async def _on_our_error(request: Request, error: FarshoreError) -> Response:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    return _problem(status, error.what, str(error), error=error.as_dict())


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    return _problem(error.status_code, str(error.detail), headers=error.headers)


async def _on_anything(request: Request, error: Exception) -> Response:
    failed = Failed("the server failed on this request", why="see its log")
    log.error("api_request_failed", path=request.url.path, exc_info=error)
    return _problem(500, failed.what, str(failed), error=failed.as_dict())


def _problem(
    status: int,
    title: str,
    detail: str = "",
    *,
    error: dict[str, object] | None = None,
    headers: Any = None,
) -> Response:
    body: dict[str, object] = {"type": "about:blank", "title": title, "status": status}
    body |= {"code": HTTPStatus(status).name.lower(), "request_id": secrets.token_hex(8)}
    if detail:
        body["detail"] = detail
    if error:
        body["error"] = error
    return JSONResponse(body, status, headers, media_type="application/problem+json")


class ApiServer:
    """uvicorn inside our own loop: no signal handlers, no logging of its own, our socket and TLS context.

    Args:
        context: See `farshore.pki.server_context`; loading a renewed certificate into it is enough.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, context: ssl.SSLContext) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=16 * KIB,
            ssl_context_factory=lambda config, default: context,
        )
        self._listener = listener
        self._server = _Embedded(config)

    async def run(self) -> None:
        """Serve until `stop` or cancelled; requests under way get 5 s."""
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            self._listener.close()

    def stop(self) -> None:
        """Take no more requests."""
        self._server.should_exit = True


class _Embedded(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # SIGTERM is ours
