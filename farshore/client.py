"""The API as the command line uses it: where the server is, who we are to it, one request at a time."""

import http.client
import json
import os
import ssl
import stat
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote, urlsplit

import msgspec

from farshore import errors, pki
from farshore.config import load_config
from farshore.errors import AuthError, ConfigError, Failed, FarshoreError, NotFound, Unreachable
from farshore.ids import id_from_hex
from farshore.units import KIB, MIB

REQUEST_S: Final = 30.0
ANSWER_BYTES_MAX: Final = 64 * MIB
TOKEN_FILE_BYTES_MAX: Final = 4 * KIB

_BY_STATUS: Final[dict[int, type[FarshoreError]]] = {
    401: AuthError,
    403: AuthError,
    404: NotFound,
    409: errors.Conflict,
    429: Unreachable,
    502: Unreachable,
    503: Unreachable,
    504: Unreachable,
    507: errors.CapacityError,
}


class ClientConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``client.toml``: private (0600), since ``token`` lets its reader do what an operator may.

    Attributes:
        api: ``https://HOST:PORT``.
        vault_id: 32 hexadecimal digits; the server's certificate must be of this vault.
        ca: PEM of the CA that signed it.
        token: Bearer token.
    """

    api: str
    vault_id: str
    ca: str
    token: str

    def __repr__(self) -> str:
        """Return it without the token: a repr ends in logs and tracebacks."""
        return f"ClientConfig({self.api!r}, vault {self.vault_id})"


def places() -> list[Path]:
    """Return where ``client.toml`` is looked for when no option or variable names it, in order."""
    return [user_place(), Path("/etc/farshore/client.toml")]


def user_place() -> Path:
    """Return ``$XDG_CONFIG_HOME/farshore/client.toml``, by default below ``~/.config``."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # A relative path is to be ignored (XDG Base Directory Specification).
    root = Path(base) if base.startswith("/") else Path.home() / ".config"
    return root / "farshore" / "client.toml"


def load(explicit: Path | None = None) -> ClientConfig:
    """Return the configuration by ``--client``, ``FARSHORE_CLIENT``, or the first of `places`.

    ``FARSHORE_API_URL`` and ``FARSHORE_TOKEN_FILE`` override what the file says.

    Raises:
        ConfigError: There is none, others can read it, or it makes no sense.
    """
    path = _path(explicit)
    if path is None:
        raise ConfigError(
            "do not know where the process server is",
            why="there is no client.toml",
            fix="name it with --client or FARSHORE_CLIENT, or put it in " + str(places()[0]),
        )
    config = load_config(path, ClientConfig)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError("others can read the token", where=str(path), fix="chmod 600 it")
    if url := os.environ.get("FARSHORE_API_URL"):
        config = msgspec.structs.replace(config, api=url)
    if token_file := os.environ.get("FARSHORE_TOKEN_FILE"):
        config = msgspec.structs.replace(config, token=_read_token(Path(token_file)))
    try:
        _ = _address(config.api), id_from_hex(config.vault_id)
        if not config.token or not config.token.isascii() or any(c.isspace() for c in config.token):
            raise ValueError("token: not a token")
    except ValueError as error:
        raise ConfigError("cannot use the configuration", where=str(path), why=str(error)) from error
    return config


def server_directory() -> Path | None:
    """Return the directory of the server that ``client.toml`` was made by, when that is on this host."""
    path = _path(None)
    directory = path.resolve().parent if path else None
    return directory if directory and (directory / "server.toml").exists() else None


def _path(explicit: Path | None) -> Path | None:
    named = explicit or (Path(given) if (given := os.environ.get("FARSHORE_CLIENT")) else None)
    return named or next((place for place in places() if place.exists()), None)


class Client:
    """Requests to one server; each opens a connection, so one object may be used from several threads."""

    def __init__(self, config: ClientConfig) -> None:
        self._host, self._port = _address(config.api)
        self._where = config.api
        self._token = config.token
        try:
            self._context = pki.client_context(
                config.ca.encode(), id_from_hex(config.vault_id), alpn=pki.ALPN_HTTP
            )
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError("cannot use the CA certificate", where="client.toml", why=str(error)) from error

    def get(self, *path: str, timeout_s: float = REQUEST_S) -> Any:
        """Return what ``GET /api/v1/<path>`` answers, decoded. Raises as `request`."""
        return self.request("GET", path, None, timeout_s)

    def post(self, *path: str, body: dict[str, object], timeout_s: float = REQUEST_S) -> Any:
        """Return what ``POST /api/v1/<path>`` answers, decoded. Raises as `request`."""
        return self.request("POST", path, body, timeout_s)

    def request(
        self, method: str, path: tuple[str, ...], body: dict[str, object] | None, timeout_s: float
    ) -> Any:
        """Send one request.

        Args:
            path: Parts below ``/api/v1``; each is quoted, so a name cannot reach another route.
            timeout_s: Longest silence that is waited through.

        Raises:
            Unreachable: No answer; a POST may have had its effect.
            AuthError: The server is of another vault, or does not accept our token.
            FarshoreError: What the server answered, as the class it was raised as there.
        """
        target = "/api/v1/" + "/".join(quote(part, safe="") for part in path)
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection = http.client.HTTPSConnection(
            self._host, self._port, timeout=timeout_s, context=self._context
        )
        try:
            connection.request(method, target, content, headers)
            response = connection.getresponse()
            answer = response.read(ANSWER_BYTES_MAX + 1)
        except ssl.SSLCertVerificationError as error:
            raise AuthError(
                "this is not the process server of our vault",
                where=self._where,
                why=error.verify_message,
                fix="check the address and the clock of this host",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreachable(
                "the process server does not answer",
                where=self._where,
                why=str(why),
                fix="see that 'farshore server run' is running",
            ) from error
        finally:
            connection.close()
        if len(answer) > ANSWER_BYTES_MAX:
            raise Failed("the answer is too long", where=self._where)
        return _decode(response.status, answer, self._where)


def _decode(status: int, answer: bytes, where: str) -> Any:
    try:
        decoded = json.loads(answer) if answer else None
    except ValueError:
        decoded = None
        if status < 400:
            raise Failed("the process server's answer cannot be read", where=where) from None
    if status < 400:
        return decoded
    problem = decoded if isinstance(decoded, dict) else {}
    told = problem.get("error")
    told = told if isinstance(told, dict) else {}
    text = {key: str(told.get(key, "")) for key in ("what", "where", "why", "fix")}
    kind = getattr(errors, str(told.get("kind", "")), None)
    simple = isinstance(kind, type) and issubclass(kind, FarshoreError) and kind is not errors.CorruptRecord
    error = cast(type[FarshoreError], kind) if simple else _BY_STATUS.get(status, Failed)
    what = text.pop("what") or str(problem.get("title", "")) or f"the process server answered {status}"
    raise error(what, **text)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ValueError(f"api: {url!r} is not https://HOST:PORT")
    return parts.hostname, parts.port or 443


def _read_token(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(TOKEN_FILE_BYTES_MAX)
    except OSError as error:
        raise ConfigError(
            "cannot read the token", where=str(path), why=error.strerror or str(error)
        ) from error
    # A pipe (<(…) of a shell) has no mode that matters.
    if stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError("others can read the token", where=str(path), fix="chmod 600 it")
    return text.decode("ascii", "replace").strip()
