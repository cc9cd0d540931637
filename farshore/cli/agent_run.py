"""``farshore agent run``: the agent in the foreground, as a service manager starts it."""

from pathlib import Path

import click


@click.command("run", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, resolve_path=True))
def command(directory: Path) -> int:
    """Run the agent of DIR in the foreground.

    Prints one line {"event":"ready",…} when it is usable and ends orderly on SIGTERM. The tap is a process of
    its own that outlives a killed agent; where a systemd unit runs it, FARSHORE_TAP_UNIT=1 says so.
    """
    # Imported when used: --help and completion start without numpy and cryptography.
    from agent.main import main

    return main(directory)
