"""``python -m agent.tap DIR``: the tap of one machine, in the foreground, until SIGTERM."""

import argparse
import asyncio
import json
import os
import signal
import sys
import threading
from pathlib import Path

import uvloop

from agent import config
from agent.tap import process
from agent.tap.service import Tap
from farshore import systemd, telemetry
from farshore.clock import SystemClock
from farshore.errors import FarshoreError


def die(what: threading.ExceptHookArgs) -> None:
    """A thread of a volume has met what nobody expects: its state is unknown. A new start redoes the rest."""
    telemetry.get_logger().critical(
        "tap_thread_failed",
        thread=what.thread.name if what.thread else "",
        exc_info=(what.exc_type, what.exc_value, what.exc_traceback),
    )
    os._exit(70)


async def serve(directory: Path) -> int:
    """Run until SIGTERM, SIGINT, or a stop by the control socket; returns the exit code."""
    machine = config.load(directory).machine_bytes
    tap = Tap(directory, machine, SystemClock())
    loop = asyncio.get_running_loop()
    wanted = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, wanted.set)
    await tap.start()
    process.settle()
    volumes = [
        {"name": volume.name, "uri": volume.uri, "mode": volume.mode, "why": volume.why}
        for volume in tap.status().volumes
    ]
    line = {
        "event": "ready",
        "control": str(config.Layout(directory).tap_socket),
        "pid": os.getpid(),
        "volumes": volumes,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    systemd.ready(f"{len(volumes)} volumes")
    waits = [asyncio.ensure_future(wanted.wait()), asyncio.ensure_future(tap.stopped.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    systemd.stopping()
    clean = await tap.stop()
    for wait in waits:
        wait.cancel()
    await asyncio.sleep(0.05)  # the answer to a stop by the control socket
    return 0 if clean else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agent.tap", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="the agent's directory")
    directory = parser.parse_args(arguments).directory.absolute()
    try:
        telemetry.configure("tap")
        process.prepare()
        threading.excepthook = die
        return uvloop.run(serve(directory))
    except FarshoreError as error:
        telemetry.get_logger().error("tap_not_started", **error.as_dict())
        return error.exit_code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that wait for a hung disk would keep the interpreter from ending.
    os._exit(code)
