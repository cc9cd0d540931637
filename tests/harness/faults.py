"""Faults that tests inject, by their numbers in the fault matrix, and how they are counted."""

from typing import Final

FAULTS: Final = {
    "F1": "kill -9 at a named place or at any moment",
    "F2": "kill -9 at a system call",
    "F3": "kill -9 while recovering",
    "F4": "power cut",
    "F7": "file cut short",
    "F8": "bit flipped",
    "F10": "no room",
    "F11": "I/O error",
    "F13": "device or journal that hangs",
    "F15": "link that swallows everything",
    "F16": "connection cut at a byte",
    "F17": "frame repeated, moved, lost or changed",
    "F18": "store that does not answer, or says that it is busy",
    "F19": "answer lost after the store did what was asked",
    "F20": "answer cut short",
    "F22": "credentials refused while they are in use",
    "F27": "vault object deleted, corrupted or exchanged",
    "F35": "slow or hostile peer",
    "F38": "disk written behind our back",
}
"""The classes of faults that tests count."""


class Injected:
    """Counts the faults of one test, when they have happened and not when they are planned."""

    def __init__(self, counts: dict[str, int]) -> None:
        self._counts = counts

    def __call__(self, fault: str, count: int = 1) -> None:
        assert fault in self._counts, f"the test is not marked with {fault}"
        self._counts[fault] += count
