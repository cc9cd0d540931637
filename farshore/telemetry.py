"""Logs for journald and metrics for Prometheus: how a running role is looked at."""

import errno
import json
import logging
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, cast

import structlog
from prometheus_client import CollectorRegistry, Info, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from farshore import __version__
from farshore.errors import ConfigError

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
# sd-daemon(3): what journald takes from the front of a line as its PRIORITY (syslog severity).
_JOURNAL_PREFIX: Final = {"critical": "<2>", "error": "<3>", "warning": "<4>", "info": "<6>", "debug": "<7>"}

REQUEST_LINE_BYTES_MAX: Final = 4096
"""Ours are "GET /metrics HTTP/1.1"; scrapers add a short query at most."""
REQUESTS_AT_ONCE: Final = 8
"""A scraper sends one; the bound keeps a port scan from costing a protected server threads."""
REQUEST_TIMEOUT_S: Final = 10.0

_Event = MutableMapping[str, Any]


def configure(role: str) -> None:
    """Send structlog and stdlib logging to stderr, one JSON object per line: ts, level, event, role, …

    ``FARSHORE_LOG_LEVEL`` (debug, info, warning, error, critical; default info) is read here, once.

    Raises:
        ConfigError: The level is none of these.
    """
    name = os.environ.get("FARSHORE_LOG_LEVEL", "info").lower()
    if name not in _LEVELS:
        raise ConfigError(
            "no such log level", where="FARSHORE_LOG_LEVEL", why=name, fix="use " + ", ".join(_LEVELS)
        )
    render = _Renderer(role, journal=_stderr_is_journal())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[name]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # asyncio, uvicorn and SQLAlchemy speak stdlib logging; they get the same lines.
    logging.basicConfig(handlers=[_StdlibHandler(render)], level=_LEVELS[name], force=True)
    logging.captureWarnings(True)


def get_logger(**context: object) -> structlog.typing.FilteringBoundLogger:
    """Return a logger that adds ``context`` to each of its lines; may be made before `configure`."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger(**context))


class _Renderer:
    """Makes the line: a processor at the end of structlog's chain, and called by the stdlib handler."""

    def __init__(self, role: str, *, journal: bool) -> None:
        self._role = role
        self._prefixes: Mapping[str, str] = _JOURNAL_PREFIX if journal else {}

    def __call__(self, logger: object, method: str, event: _Event) -> str:
        del logger
        level = str(event.pop("level", method))
        now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        line = {"ts": f"{now}Z", "level": level, "event": event.pop("event", ""), "role": self._role, **event}
        # ensure_ascii: a file name that is not UTF-8 arrives as lone surrogates, which no stream can encode.
        return self._prefixes.get(level, "") + json.dumps(line, default=_plain, ensure_ascii=True)


class _StdlibHandler(logging.Handler):
    def __init__(self, render: _Renderer) -> None:
        super().__init__()
        self._render = render

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event: _Event = {
                "level": record.levelname.lower(),
                "event": record.getMessage(),
                "logger": record.name,
            }
            if record.exc_info:
                event["exception"] = logging.Formatter().formatException(record.exc_info)
            sys.stderr.write(self._render(None, record.levelname.lower(), event) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _plain(value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(value)


def _stderr_is_journal() -> bool:
    # systemd.exec(5): the variable is inherited by children whose stderr is something else, so it holds the
    # device and inode to compare with.
    stream = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


def make_registry(role: str) -> CollectorRegistry:
    """Return a registry with ``farshore_build_info{version,role}`` and the ``process_*`` metrics.

    Not the library's global one: a test, or one process with several roles, makes as many as it needs.
    """
    # A *_created series per counter doubles the scrape and nobody reads it. The function has no types.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    info = Info("farshore_build", "Version and role of the running program.", registry=registry)
    info.info({"version": __version__, "role": role})
    return registry


class MetricsServer:
    """A listening ``/metrics`` and ``/healthz``, served by threads of its own until `close`."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        self.host, self.port = str(server.server_address[0]), int(server.server_address[1])
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening and return when the port is free. Calling it again does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(
    host: str,
    port: int,
    registry: CollectorRegistry,
    healthz: Callable[[], tuple[bool, dict[str, object]]],
    *,
    may_move: bool = False,
) -> MetricsServer:
    """Serve ``/metrics`` from ``registry`` and ``/healthz`` from ``healthz``; everything else is 404.

    Threads and not the event loop: when the loop is stuck, this is what still says so.

    Args:
        host: Address to listen on; an IPv6 address makes an IPv6 socket.
        port: 0 lets the kernel choose, see ``MetricsServer.port``.
        registry: From `make_registry`.
        healthz: Called in a server thread: healthy (200) or not (503), and what to show as JSON.
        may_move: Take any free port, with a warning, when this one is taken: for a port that nobody chose. A
            second agent on a host must not leave its disks unprotected for want of a port for figures.

    Raises:
        ConfigError: The address cannot be listened on.
    """

    class Server(_BoundedServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    def answer(path: str) -> tuple[int, str, bytes]:
        match path.partition("?")[0]:
            case "/metrics":
                return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry)
            case "/healthz":
                healthy, details = healthz()
                code = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
                body = json.dumps({"ok": healthy, **details}, default=_plain)
                return code, "application/json", body.encode() + b"\n"
            case _:
                return HTTPStatus.NOT_FOUND, "text/plain", b"only /metrics and /healthz\n"

    class Handler(_Handler):
        answer_path = staticmethod(answer)

    try:
        return MetricsServer(Server((host, port), Handler))
    except (OSError, OverflowError) as error:
        if may_move and isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            moved = serve_metrics(host, 0, registry, healthz)
            get_logger().warning("metrics_moved", wanted=port, port=moved.port)
            return moved
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            "cannot listen for metrics", where=f"{host}:{port}", why=why, fix="choose another address"
        ) from error


class _BoundedServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # the inherited 5 lets a burst of connections wait for a SYN to be sent again

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._places = threading.BoundedSemaphore(REQUESTS_AT_ONCE)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # The inherited one asks DNS for our own name, which can take seconds on a host in trouble.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A scraper that went away is no news; what else went wrong in a handler is.
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            get_logger().error("metrics_request_failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_TIMEOUT_S
    server_version = "farshore"
    sys_version = ""
    answer_path: Callable[[str], tuple[int, str, bytes]]

    def handle_one_request(self) -> None:
        """Answer one request and close: as the inherited method, with a shorter line and two known paths."""
        self.close_connection = True
        self.raw_requestline = self.rfile.readline(REQUEST_LINE_BYTES_MAX + 1)
        if len(self.raw_requestline) > REQUEST_LINE_BYTES_MAX:
            self.requestline = self.request_version = self.command = ""
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return
        if not self.raw_requestline or not self.parse_request():
            return
        self.close_connection = True
        code, kind, body = self.answer_path(self.path if self.command in ("GET", "HEAD") else "")
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a line per scrape says nothing that the scrape does not."""
