"""``DIR/run/agent.sock``: how the ``volume`` verbs talk to the running agent.

One request and one reply per connection, MessagePack with its length before it. Whoever may open the socket
(mode 0600) may do what the agent may, so nothing in here asks for more than that.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.config import Layout
from farshore import errors
from farshore.telemetry import get_logger
from farshore.units import MIB

REQUEST_BYTES_MAX: Final = MIB
REPLY_S: Final = 120.0
"""The longest verb is protect: opening a journal on a slow disk."""
_LENGTH: Final = struct.Struct("<I")

log = get_logger()

Handle = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]


class NotRunning(errors.Unreachable):
    """There is no agent, so nothing was asked of it."""


class AdminServer:
    """Listens until closed; each request is answered by ``handle(verb, arguments)``."""

    def __init__(self, path: Path, handle: Handle) -> None:
        self._path, self._handle = path, handle
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. The caller holds the agent's lock, so a socket that lies there is a dead agent's."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=REQUEST_BYTES_MAX)
        finally:
            os.umask(mask)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                if size > REQUEST_BYTES_MAX:
                    return
                request = msgspec.msgpack.decode(await reader.readexactly(size), type=dict[str, Any])
            reply = await self._answer(request)
            body = msgspec.msgpack.encode(reply)
            writer.write(_LENGTH.pack(len(body)) + body)
            await writer.drain()
        except (OSError, EOFError, TimeoutError, msgspec.MsgspecError) as error:
            log.debug("admin_request_dropped", error=str(error))
        finally:
            writer.close()

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        verb = str(request.pop("verb", ""))
        try:
            return {"result": await self._handle(verb, request)}
        except errors.FarshoreError as error:
            return {"error": error.as_dict()}
        except Exception as error:
            log.exception("admin_request_failed", verb=verb)
            return {
                "error": errors.Failed("internal error", why=f"{type(error).__name__}: {error}").as_dict()
            }


def ask(directory: Path, verb: str, **arguments: object) -> dict[str, Any]:
    """Ask the running agent of ``directory`` and return its answer. Blocks.

    Raises:
        NotRunning: No agent runs there.
        Unreachable: It ended, or took too long; whether it did what was asked is not known.
        FarshoreError: What the agent raised, as the same class.
    """
    path = Layout(directory).agent_socket
    body = msgspec.msgpack.encode({"verb": verb, **arguments})
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(REPLY_S)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionError) as error:
            raise NotRunning(
                "the agent does not run",
                where=str(directory),
                fix=f"start it with 'farshore agent run {directory}'",
            ) from error
        try:
            connection.sendall(_LENGTH.pack(len(body)) + body)
            (size,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
            reply = msgspec.msgpack.decode(_receive(connection, size), type=dict[str, Any])
        except (ConnectionError, TimeoutError) as error:
            raise errors.Unreachable(
                "the agent did not answer",
                where=str(directory),
                why=error.strerror or str(error),
                fix="what was asked may have happened: look with 'farshore volume list'",
            ) from error
    if "error" in reply:
        raise _raised(reply["error"])
    result = reply["result"]
    assert isinstance(result, dict)
    return result


def _receive(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionResetError("the agent ended in the middle of its answer")
        received += part
    return bytes(received)


def _raised(told: dict[str, Any]) -> errors.FarshoreError:
    """The error as it was on the other side; a class this program does not know by its exit code."""
    parts = {key: str(told.get(key, "")) for key in ("where", "why", "fix")}
    what = str(told.get("what", "failed"))
    known = getattr(errors, str(told.get("kind")), None)
    if (
        isinstance(known, type)
        and issubclass(known, errors.FarshoreError)
        and known is not errors.CorruptRecord
    ):
        raised: errors.FarshoreError = known(what, **parts)
        return raised
    code = told.get("exit_code", 1)
    by_code = (
        errors.Failed, errors.UsageError, errors.ConfigError, errors.AuthError, errors.NotFound,
        errors.Conflict, errors.IntegrityError, errors.CapacityError, errors.Unreachable,
    )  # fmt: skip
    return next((kind for kind in by_code if kind.exit_code == code), errors.Failed)(what, **parts)
