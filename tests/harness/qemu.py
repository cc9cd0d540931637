"""A loop device over QEMU's storage daemon: whatever a block driver of QEMU can do to a disk, a test can."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

APPEARS_S: Final = 10.0
STATES_S: Final = 5.0


@contextmanager
def loop_over(
    directory: Path, chain: dict[str, Any], size_bytes: int, device: str = ""
) -> Iterator[tuple[Path, "subprocess.Popen[bytes]"]]:
    """Export ``chain`` (a blockdev) by FUSE into ``directory`` and put a loop device over it.

    Args:
        device: The loop device to use; any free one when empty.

    Yields:
        The device, and the daemon that answers for it.
    """
    node = directory / "disk.fuse"
    node.touch()
    export = {
        "type": "fuse",
        "id": "disk",
        "node-name": chain["node-name"],
        "mountpoint": str(node),
        "writable": True,
        "growable": False,
    }
    daemon = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", json.dumps(chain), "--export", json.dumps(export)],
        stdin=subprocess.DEVNULL,
    )
    made = ""
    try:
        deadline = time.monotonic() + APPEARS_S
        while node.stat().st_size != size_bytes:
            assert daemon.poll() is None, "qemu-storage-daemon ended"
            assert time.monotonic() < deadline, "the FUSE export did not appear"
            time.sleep(0.02)
        where = [device] if device else ["--find", "--show"]
        done = subprocess.run(["losetup", *where, node], check=True, stdout=subprocess.PIPE, text=True)
        made = device or done.stdout.strip()
        yield Path(made), daemon
    finally:
        daemon.send_signal(signal.SIGCONT)  # a stopped one would keep us, and the kernel, waiting
        if made:
            subprocess.run(["losetup", "--detach", made], check=False)
        daemon.terminate()
        daemon.wait(timeout=20)


class HangingDevice:
    """A block device that can stop answering: no error, no timeout, only silence, until it goes on.

    The process behind it is stopped, so each request stays with the kernel and whoever waits for one is in
    uninterruptible sleep, as over a dead path of a storage network. What already lies in the page cache can
    still be read, and written to.
    """

    def __init__(self, path: Path, daemon: "subprocess.Popen[bytes]") -> None:
        self.path, self._daemon = path, daemon

    def forget_cached(self) -> None:
        """Drop the clean pages that the kernel has of it; not while it hangs."""
        subprocess.run(["blockdev", "--flushbufs", self.path], check=True)

    @contextmanager
    def hung(self) -> Iterator[float]:
        """No request is answered in here. Yields the monotonic time since when that is so."""
        self._daemon.send_signal(signal.SIGSTOP)
        try:
            deadline = time.monotonic() + STATES_S
            while not self._is_stopped():
                assert time.monotonic() < deadline, "qemu-storage-daemon does not stop"
                time.sleep(0.005)
            yield time.monotonic()
        finally:
            self._daemon.send_signal(signal.SIGCONT)

    def _is_stopped(self) -> bool:
        """Every thread is: requests are served by more than one."""
        threads = Path(f"/proc/{self._daemon.pid}/task").iterdir()
        return all((at / "stat").read_text().rsplit(")", 1)[1].split()[0] == "T" for at in threads)


@contextmanager
def hanging_device(directory: Path, size_bytes: int) -> Iterator[HangingDevice]:
    """Make a device of ``size_bytes`` whose data lie in ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / "disk.img"
    data.touch()
    os.truncate(data, size_bytes)
    chain = {"driver": "file", "node-name": "disk", "filename": str(data)}
    with loop_over(directory, chain, size_bytes) as (device, daemon):
        yield HangingDevice(device, daemon)
