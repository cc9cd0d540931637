"""A block device in front of a volume, for workloads that do not speak NBD.

``loop``: Debian's qemu-storage-daemon is the NBD client and shows the volume as a file (FUSE); a loop device
lies over that file. The daemon outlives the agent and the tap: while the tap is away it waits and connects
again, so that a tap that is killed or upgraded is a pause for the workload, no error. ``nbd``: the kernel's
own client, where there is one.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from agent.config import Layout
from farshore.errors import Conflict, Failed, NotFound

RECONNECT_S: Final = 86_400
"""How long the client keeps requests while the tap is away: a workload that waits is better than one that was
told EIO and has remounted its file system read-only."""
APPEAR_S: Final = 20.0
_SYS_BLOCK: Final = Path("/sys/class/block")
_PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def node_path(directory: Path, name: str) -> Path:
    """The file that FUSE shows the volume as."""
    return Layout(directory).run / f"{name}.disk"


def device_of(directory: Path, name: str) -> str | None:
    """The block device in front of a volume, ``/dev/loopN`` or ``/dev/nbdN``; None when there is none.

    Looks into sysfs only: asking the file itself would wait for the tap.
    """
    node = os.path.abspath(node_path(directory, name))
    for link in _SYS_BLOCK.glob("loop[0-9]*"):
        with suppress(OSError):
            if (link / "loop" / "backing_file").read_text().rstrip("\n") == node:
                return f"/dev/{link.name}"
    with suppress(OSError):
        device = _nbd_note(directory, name).read_text().strip()
        if (_SYS_BLOCK / device.removeprefix("/dev/") / "pid").exists():
            return device
    return None


def attach(directory: Path, name: str, how: str, socket: Path) -> str:
    """Return the block device in front of the volume, making it when it is not there. Blocks.

    Args:
        how: ``loop`` or ``nbd``.
        socket: Where the tap serves the volume; it must do so now.

    Raises:
        NotFound: A program or the kernel's part of it is missing; the text names the Debian package.
        Failed: It was started and did not work.
    """
    if how == "loop":
        return attach_loop(directory, name, socket)
    return _attach_nbd(directory, name, socket)


def attach_loop(directory: Path, name: str, socket: Path) -> str:
    """As `attach` with ``loop``. What is there and works is taken as it is."""
    daemon = _program("qemu-storage-daemon", "qemu-system-common")
    losetup = _program("losetup", "mount")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise NotFound("cannot attach", where="/dev/fuse", why="it is missing", fix="modprobe fuse")
    if not Path("/dev/loop-control").exists():
        why = "this kernel has no loop devices"
        raise NotFound("cannot attach", where="/dev/loop-control", why=why, fix="modprobe loop")
    node = node_path(directory, name)
    if _daemon_pid(directory, name) is None:
        stale = device_of(directory, name)
        if stale is not None:
            raise Conflict(
                "the daemon behind the device is gone",
                where=stale,
                why="what it had not written is lost",
                fix=f"unmount it and run losetup --detach {stale}",
            )
        _start_daemon(daemon, directory, name, socket, node)
    found = device_of(directory, name)
    if found is not None:
        return found
    done = _run(losetup, "--find", "--show", node)
    return done.strip()


def detach(directory: Path, name: str) -> None:
    """Take the device away again; does nothing where there is none. Blocks.

    Raises:
        Conflict: It is in use.
        Failed: It does not go.
    """
    device = device_of(directory, name)
    if device is not None and device.startswith("/dev/nbd"):
        _run(_program("nbd-client", "nbd-client"), "-d", device)
        _nbd_note(directory, name).unlink(missing_ok=True)
        return
    if device is not None:
        link = _SYS_BLOCK / device.removeprefix("/dev/")
        if _is_mounted(device) or any((link / "holders").iterdir()):
            raise Conflict("the device is in use", where=device, fix="unmount it first")
        _run(_program("losetup", "mount"), "--detach", device)
        # The kernel detaches when the last user closes it, and may say so later.
        if not _within(5.0, lambda: device_of(directory, name) is None):
            raise Conflict("the device is in use", where=device, why="somebody has it open")
    pid = _daemon_pid(directory, name)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if not _within(20.0, lambda: _daemon_pid(directory, name) is None):
            raise Failed("qemu-storage-daemon does not end", where=f"process {pid}")
    _pid_file(directory, name).unlink(missing_ok=True)
    with suppress(OSError):
        node_path(directory, name).unlink(missing_ok=True)


def _start_daemon(daemon: str, directory: Path, name: str, socket: Path, node: Path) -> None:
    node.touch(mode=0o600)
    blockdev = {
        "driver": "nbd",
        "node-name": "tap",
        "server": {"type": "unix", "path": str(socket)},
        "export": name,
        "reconnect-delay": RECONNECT_S,
    }
    export = {
        "type": "fuse",
        "id": "disk",
        "node-name": "tap",
        "mountpoint": str(node),
        "writable": True,
        "growable": False,
        "allow-other": "off",
    }
    # --daemonize: its own session, and it returns when the export is there or could not be made.
    _run(
        daemon,
        *("--daemonize", "--pidfile", _pid_file(directory, name)),
        *("--blockdev", json.dumps(blockdev), "--export", json.dumps(export)),
    )
    if not _within(APPEAR_S, lambda: node.stat().st_size > 0):
        raise Failed("cannot attach", where=str(node), why="the FUSE export did not appear")


def _attach_nbd(directory: Path, name: str, socket: Path) -> str:
    found = device_of(directory, name)
    if found is not None:
        return found
    client = _program("nbd-client", "nbd-client")
    free = [link for link in sorted(_SYS_BLOCK.glob("nbd[0-9]*")) if not (link / "pid").exists()]
    if not free:
        why = "this kernel has no free nbd device"
        raise NotFound("cannot attach", where="/dev/nbd0", why=why, fix="modprobe nbd, or use --attach loop")
    device = f"/dev/{free[0].name}"
    _run(client, "-unix", socket, "-name", name, "-persist", "-timeout", "0", device)
    _nbd_note(directory, name).write_text(device)
    return device


def _program(name: str, package: str) -> str:
    path = shutil.which(name, path=_PATH)
    if path is None:
        raise NotFound("cannot attach", where=name, why="it is not installed", fix=f"apt install {package}")
    return path


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode:
        why = " ".join(done.stderr.split()) or f"it ended with {done.returncode}"
        raise Failed("cannot attach", where=Path(command[0]).name, why=why)
    return done.stdout


def _pid_file(directory: Path, name: str) -> Path:
    return Layout(directory).run / f"{name}.qsd"


def _nbd_note(directory: Path, name: str) -> Path:
    return Layout(directory).run / f"{name}.nbd"


def _daemon_pid(directory: Path, name: str) -> int | None:
    """The daemon of this volume, if it runs; a process that only has its number does not count."""
    try:
        pid = int(_pid_file(directory, name).read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, ValueError, IndexError):
        return None
    ours = os.fsencode(_pid_file(directory, name)) in words
    return pid if ours and state != "Z" else None


def _is_mounted(device: str) -> bool:
    number = Path(f"{_SYS_BLOCK}/{device.removeprefix('/dev/')}/dev").read_text().strip()
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return any(line.split()[2] == number for line in lines)


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
