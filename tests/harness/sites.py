"""A gateway and an enrolled machine on this host, for tests that start and kill their parts themselves."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farshore.site import Site

MACHINE = "db1"


@contextmanager
def enrolled_site(directory: Path, ingest: str = "") -> Iterator[Site]:
    """Yield a site whose server runs and whose agent does not yet; nothing of it is left afterwards.

    Args:
        ingest: Lines of TOML for the server's ``[ingest]``.
    """
    site = Site(directory)
    try:
        site.init()
        if ingest:
            settings = site.server_dir / "server.toml"
            settings.write_text(f"{settings.read_text().replace('[ingest]', '')}\n[ingest]\n{ingest}")
        site.start_server()
        site.enrol(MACHINE)
        config = site.agent_dir(MACHINE) / "agent.toml"
        lines = [line for line in config.read_text().splitlines() if not line.startswith("metrics_port")]
        config.write_text("\n".join([*lines, "metrics_port = 0", ""]))
        yield site
    finally:
        site.close()
        pid = site.tap_pid(MACHINE)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
