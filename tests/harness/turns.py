"""Whose turn it is when several processes run tests: any number of them at once, or one that is alone."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """Two locks that the processes of one run share; a process that dies gives back what it held.

    Who holds the room together with others runs beside them; who has it to itself runs alone. The door is
    held while one waits for the room, so that whoever waits to be alone is not overtaken for ever.
    """

    def __init__(self, folder: Path) -> None:
        """``folder`` is the run's own, the same for all its processes."""
        # What a test starts does not inherit them; what it forks shares our locks and loses them with us.
        self._door = os.open(folder / "door", os.O_RDWR | os.O_CREAT, 0o600)
        self._room = os.open(folder / "room", os.O_RDWR | os.O_CREAT, 0o600)

    @contextmanager
    def turn(self, *, alone: bool) -> Iterator[None]:
        """Wait until one may run, for as long as those who are in the room take; yield; leave."""
        fcntl.flock(self._door, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._door)
        os.close(self._room)
