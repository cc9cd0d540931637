"""``farshore agent run DIR``: puts the agent together and runs it until SIGTERM."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import uvloop

from agent import config
from agent.service import Service
from agent.volume_admin import agent_lock
from farshore import systemd, telemetry
from farshore.clock import SystemClock
from farshore.errors import FarshoreError


def main(directory: Path) -> int:
    """Run in the foreground; returns the exit code of an orderly stop.

    Raises:
        ConfigError: The machine is not enrolled, or its settings or the metrics port cannot be used.
        Conflict: Another agent runs there.
    """
    telemetry.configure("agent")
    settings = config.load(directory)
    with agent_lock(directory):
        uvloop.run(_run(directory, settings))
    return 0


async def _run(directory: Path, settings: config.AgentConfig) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    registry = telemetry.make_registry("agent")
    service = Service(directory, settings, SystemClock(), registry)
    port = settings.metrics_port
    metrics = telemetry.serve_metrics(
        settings.metrics_host, port, registry, service.healthz, may_move=port == config.METRICS_PORT
    )

    def ready() -> None:
        line = {
            "event": "ready",
            "machine": settings.machine,
            "metrics": f"{metrics.host}:{metrics.port}",
            "admin": str(config.Layout(directory).agent_socket),
            "pid": os.getpid(),
        }
        # Not print: this is the contract of the command, and nobody may interleave with it.
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        systemd.ready(f"{settings.machine}: replicating")

    try:
        await service.run(stopping, ready)
    except BaseExceptionGroup as group:
        # Unwrapped once, here: what ended the agent is one error with one exit code.
        known = next((error for error in _leaves(group) if isinstance(error, FarshoreError)), None)
        if known is not None:
            raise known from group
        raise
    finally:
        systemd.stopping()
        metrics.close()


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
