"""``farshore demo``: see it lose everything and come back, in about a minute."""

import json
import time
from pathlib import Path

import click

from farshore.demo import Outcome, run_demo


@click.command("demo")
@click.option(
    "--disk", type=click.Path(path_type=Path), help="Raw image to use; it is copied, never written."
)
@click.option("--keep", is_flag=True, help="Leave the directory with vault, key and logs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(disk: Path | None, keep: bool, as_json: bool) -> int:
    """Protect a disk under load, kill agent and server, recover from the bare vault, compare every byte."""
    started = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - started:6.1f} s] {text}", err=True)

    outcome = run_demo(disk, keep, say)
    click.echo(json.dumps(outcome.as_json()) if as_json else _summary(outcome))
    return 0 if outcome.ok else 1


def _summary(outcome: Outcome) -> str:
    rpo = outcome.rpo_p99()
    lines = [
        "",
        *(f"killed under load   {kill['role']} at {kill['under_load_writes_per_s']:.0f} writes/s"
          for kill in outcome.kills),
        f"RPO, p99            {'unknown' if rpo is None else f'{rpo:.2f} s'}",
        f"RTO                 {outcome.rto_seconds:.2f} s to the first readable block",
        f"compared            {outcome.bytes_compared} bytes, {outcome.mismatches} differ",
        "result              " + ("every byte is there" if outcome.ok else "FAILED"),
    ]  # fmt: skip
    return "\n".join(lines)
