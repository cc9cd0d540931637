"""A process that writes stamped blocks through a volume's tap while a test breaks things around it."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from farshore.site import wait_for
from farshore.stamps import Workload
from farshore.workload import Ledger

END_S = 120.0


@contextlib.contextmanager
def writing(uri: str, workload: Workload, ledger: Path, *, rate: int) -> Iterator[Ledger]:
    """Write ``rate`` blocks a second to ``uri``; at the end each was answered.

    Yields:
        The ledger, once the first write was answered.
    """
    written = Ledger(ledger, workload)
    words = [sys.executable, "-m", "farshore.workload", uri, "--ledger", ledger, "--rate", rate]
    words += ["--seed", workload.seed, "--first-block", workload.first_block]
    words += ["--block-count", workload.block_count]
    writer = subprocess.Popen([*map(str, words)], stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: written.state().acked > 0, END_S, "the first write to be answered")
        yield written
        writer.terminate()
        assert writer.wait(timeout=END_S) == 0, "the writer ended badly"
    finally:
        writer.kill()
        writer.wait()
        written.close()
