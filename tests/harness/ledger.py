"""The ledger of a workload in another process."""

from pathlib import Path

from farshore.workload import Ledger, LedgerState


def state_of(path: Path) -> LedgerState:
    """What the writer knows by now."""
    ledger = Ledger(path)
    state = ledger.state()
    ledger.close()
    return state


def made(path: Path) -> bool:
    """The writer has made its ledger: it exists before it has its size and its first line."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return file.read(1) not in (b"", b"\0")


def begun(path: Path) -> bool:
    """Writes were answered and flushed."""
    return made(path) and state_of(path).flushed > 0
