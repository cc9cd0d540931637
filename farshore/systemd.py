"""Telling systemd how we are: sd_notify(3) without a library."""

import os
import socket


def notify(state: str) -> bool:
    """Send ``state`` ("READY=1", "STATUS=text", several joined by newlines) to the service manager.

    Never raises: a lost notification must not stop a service that works. Safe to call from any thread.

    Returns:
        True when the manager was given the message, False when there is none or it cannot be reached.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            # "@" stands for the NUL byte of the abstract namespace.
            sender.connect("\0" + address[1:] if address[0] == "@" else address)
            sender.sendall(state.encode())
        except OSError:
            return False
    return True


def ready(status: str = "") -> bool:
    """Report that the service is usable; with ``Type=notify`` units ordered after this one start now."""
    return notify(f"READY=1\nSTATUS={_one_line(status)}" if status else "READY=1")


def stopping(status: str = "") -> bool:
    """Report that an orderly stop has begun."""
    return notify(f"STOPPING=1\nSTATUS={_one_line(status)}" if status else "STOPPING=1")


def status(text: str) -> bool:
    """Set the line that ``systemctl status`` shows."""
    return notify(f"STATUS={_one_line(text)}")


def alive() -> bool:
    """Feed the watchdog; due at least every half of `watchdog_s`."""
    return notify("WATCHDOG=1")


def watchdog_s() -> float | None:
    """Return the seconds after which systemd restarts us when silent; None when it does not watch.

    Set by ``WatchdogSec=``, see sd_watchdog_enabled(3).
    """
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        timeout_us = int(os.environ.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    return timeout_us / 1e6 if timeout_us > 0 else None


def _one_line(text: str) -> str:
    # A newline would begin another assignment.
    return " ".join(text.split())
