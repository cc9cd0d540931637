"""``farshore status``: how far behind every machine is, worst first, and what to do about it."""

import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import click

from farshore.cli.clientopts import client_option, open_client
from farshore.units import format_duration, format_size

WATCH_S: Final = 2.0
_RANK: Final = {"critical": 0, "warning": 1, "ok": 2}
_COLOURS: Final = {"critical": "red", "warning": "yellow", "ok": "green"}


@click.command("status", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--watch", is_flag=True, help="Show it again every 2 s, until interrupted.")
@client_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch one line each time.")
def command(watch: bool, client_file: Path | None, as_json: bool) -> None:
    """Show every machine: health, how old its newest recoverable state is, and its volumes."""
    client = open_client(client_file)
    while True:
        found = client.get("status")
        if watch and not as_json and sys.stdout.isatty():
            click.clear()
        print(json.dumps(found) if as_json else render(found), flush=True)
        if not watch:
            return
        time.sleep(WATCH_S)


def render(status: dict[str, Any]) -> str:
    """Return the status for people: the machine in most trouble first."""
    machines = sorted(status["machines"], key=lambda entry: (_RANK.get(entry["health"], 0), entry["name"]))
    if not machines:
        return "no machines yet; make a token: farshore token create --machine NAME"
    lines = []
    for machine in machines:
        health = str(machine["health"])
        shown = (
            click.style(health.upper(), fg=_COLOURS.get(health)) if sys.stdout.isatty() else health.upper()
        )
        rpo_s = machine["rpo_seconds"]
        rpo = "unknown" if rpo_s is None else format_duration(float(rpo_s))
        lines.append(f"{shown} {machine['name']}  {machine['state']}  newest recoverable state: {rpo}")
        lines += [f"  {reason}" for reason in machine["reasons"]]
        if health != "ok" and (advice := next_command(machine)):
            lines.append(f"  next: {advice}")
        for volume in machine["volumes"]:
            lines.append("  " + _volume(volume))
    return "\n".join(lines)


def next_command(machine: dict[str, Any]) -> str:
    """Return what to type about a machine that is not well; empty when waiting is all there is to do."""
    states = {str(volume["state"]) for volume in machine["volumes"]}
    name = str(machine["name"])
    if str(machine["state"]) == "disconnected" or not machine["volumes"]:
        return f"on {name}: systemctl status farshore-agent (or farshore agent run DIR)"
    if "failed" in states:
        return f"on {name}: journalctl -u farshore-tap -u farshore-agent -n 50"
    if "paused" in states:
        return f"on {name}: farshore volume resume NAME --agent DIR"
    if "resync-required" in states:
        return f"on {name}: farshore volume resync NAME --agent DIR"
    return ""


def _volume(volume: dict[str, Any]) -> str:
    def known(value: object) -> str:
        return "?" if value is None else str(value)

    backlog = volume["backlog_bytes"]
    return (
        f"{volume['name']}  {format_size(int(volume['size_bytes']))}  {known(volume['state'])}"
        f"  {known(volume['capture_mode'])}  LSN captured {known(volume['captured_lsn'])}"
        f", received {known(volume['received_lsn'])}, vaulted {known(volume['vaulted_lsn'])}"
        f"  backlog {'?' if backlog is None else format_size(int(backlog))}"
    )
