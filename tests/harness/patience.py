"""Volumes whose journal may take its time, so that only a fault which a test injects is one.

By default two seconds in which the machine's disk does not answer are enough for a tap to leave its journal.
That is right for a workload, and wrong for a test of something else where others keep that disk busy.
"""

from pathlib import Path
from typing import Any, Final

import msgspec

from agent import volumes
from farshore.site import Site, wait_for

JOURNAL_STALL_MAX_S: Final = 60.0
PROTECTED_S: Final = 120.0


def protect_and_start(
    site: Site, machine: str, volume: str, disk: Path, *options: str, **settings: Any
) -> dict[str, Any]:
    """Protect a disk through the tap, start the machine's agent, and wait until it is protected.

    Args:
        options: Of ``volume protect``.
        settings: Of ``volume.toml``; they are read when the agent starts, so that comes last.

    Returns:
        The volume's entry of ``volume list``.
    """
    folder = site.agent_dir(machine)
    site.cli(
        *("volume", "protect", volume, "--agent", folder, "--disk", disk, "--capture", "tap-nbd"), *options
    )
    settings.setdefault("journal_stall_max_s", JOURNAL_STALL_MAX_S)
    volumes.save_volume(folder, msgspec.structs.replace(volumes.load_volume(folder, volume), **settings))
    site.start_agent(machine)
    wait_for(lambda: site.volume(machine, volume)["state"] == "protected", PROTECTED_S, "its first copy")
    return site.volume(machine, volume)
