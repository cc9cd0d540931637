"""Hosts of their own in network namespaces, with a router between them that can swallow what it is sent."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_CLONE_NEWNET: Final = 0x40000000
_ESTABLISHED: Final = "01"
_libc: Final = ctypes.CDLL(None, use_errno=True)


def ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, (words, done.stderr)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """What this thread opens, and every process it starts, is in ``namespace``."""
    with open("/proc/thread-self/ns/net") as before:
        with open(f"/run/netns/{namespace}") as there:
            _enter(there.fileno())
        try:
            yield
        finally:
            _enter(before.fileno())


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Network:
    """Two hosts, ``left`` and ``right``, and the router that their only way leads over.

    Attributes:
        left, right, router: Names of the namespaces.
        left_address, right_address: Of the hosts.
    """

    def __init__(self) -> None:
        mark = os.getpid() % 100_000
        self.left, self.right, self.router = (f"fs-{side}-{mark}" for side in ("left", "right", "router"))
        self.left_address, self.right_address = "10.77.1.2", "10.77.2.2"

    def make(self) -> None:
        for name in (self.left, self.right, self.router):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for number, name in ((1, self.left), (2, self.right)):
            ip(*("-n", self.router, "link", "add", f"to{number}"), *("type", "veth", "peer", "name", "eth0"))
            ip("-n", self.router, "link", "set", "eth0", "netns", name)
            ip("-n", self.router, "addr", "add", f"10.77.{number}.1/24", "dev", f"to{number}")
            ip("-n", self.router, "link", "set", f"to{number}", "up")
            ip("-n", name, "addr", "add", f"10.77.{number}.2/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "route", "add", "default", "via", f"10.77.{number}.1")
        with inside(self.router):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    def swallow(self) -> None:
        """From now on nothing gets through and nobody is told: no FIN, no RST, no ICMP, the links stay up."""
        for address in (self.left_address, self.right_address):
            ip("-n", self.router, "route", "add", "blackhole", f"{address}/32")

    def let_through(self) -> None:
        for address in (self.left_address, self.right_address):
            ip("-n", self.router, "route", "del", "blackhole", f"{address}/32")

    def unplug_left(self) -> None:
        """The host is gone with its link: what its processes still say when they end is not heard."""
        ip("-n", self.router, "link", "del", "to1")

    def remove_left(self) -> None:
        ip("netns", "del", self.left)

    def close(self) -> None:
        for name in (self.left, self.right, self.router):
            ip("netns", "del", name, check=False)


@contextmanager
def network() -> Iterator[Network]:
    made = Network()
    try:
        made.make()
        yield made
    finally:
        made.close()


def established(namespace: str, port: int) -> int:
    """How many connections to local ``port`` the kernel of ``namespace`` holds."""
    with inside(namespace):
        lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(int(at[1].split(":")[1], 16) == port and at[3] == _ESTABLISHED for at in fields)
