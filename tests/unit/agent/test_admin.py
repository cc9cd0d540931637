"""The agent's own socket: an answer, or the very error that was raised."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent.admin import AdminServer, ask
from agent.config import Layout
from farshore.errors import Conflict, FarshoreError, NotFound, Unreachable


async def _handle(verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    match verb:
        case "echo":
            return arguments
        case "missing":
            raise NotFound("no such volume", where="data", fix="look again")
        case "busy":
            raise Conflict("the disk is mounted", where="/dev/sdb")
    raise ZeroDivisionError("a mistake")


async def test_answers_and_errors_arrive_as_they_were(tmp_path: Path) -> None:
    Layout(tmp_path).run.mkdir()
    server = AdminServer(Layout(tmp_path).agent_socket, _handle)
    await server.start()
    assert Layout(tmp_path).agent_socket.stat().st_mode & 0o777 == 0o600
    assert await asyncio.to_thread(ask, tmp_path, "echo", name="data", size=5) == {"name": "data", "size": 5}
    with pytest.raises(NotFound, match="no such volume: data; look again"):
        await asyncio.to_thread(ask, tmp_path, "missing")
    with pytest.raises(Conflict):
        await asyncio.to_thread(ask, tmp_path, "busy")
    with pytest.raises(FarshoreError, match="internal error: ZeroDivisionError"):
        await asyncio.to_thread(ask, tmp_path, "wrong")
    await server.close()
    with pytest.raises(Unreachable, match="farshore agent run"):
        ask(tmp_path, "echo")


async def test_a_dead_agents_socket_is_replaced(tmp_path: Path) -> None:
    Layout(tmp_path).run.mkdir()
    Layout(tmp_path).agent_socket.write_text("")
    server = AdminServer(Layout(tmp_path).agent_socket, _handle)
    await server.start()
    assert await asyncio.to_thread(ask, tmp_path, "echo", a=1) == {"a": 1}
    await server.close()
