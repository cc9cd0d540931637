"""``farshore hrl``: segments of a journal, looked at by hand. Reads files only, needs no tap or server."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from agent.journal.mark import BITMAP, CLEAN, JOURNAL_LOST, RESYNC_REQUIRED, load_mark
from agent.journal.verify import TYPE_NAMES, Verdict, verify_segment, verify_together
from farshore.errors import FarshoreError, IntegrityError, NotFound
from farshore.hrl.batch import Batch

_FILES = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_MARK_FLAGS = {
    RESYNC_REQUIRED: "resync-required",
    CLEAN: "clean",
    JOURNAL_LOST: "journal-lost",
    BITMAP: "bitmap",
}


@click.group("hrl")
def command() -> None:
    """Look into .hrl change logs."""


@command.command()
@_FILES
@_JSON
def verify(files: tuple[Path, ...], as_json: bool) -> int:
    """Check segments against their digests and the mark beside them.

    Ends with 0 when every record that was durable is here (a torn tail behind them is a power cut's, and no
    harm) and with 7 when one is not.
    """
    verdicts = [_verdict(path) for path in files]
    problems = [f"{verdict.path}: {verdict.problem}" for verdict in verdicts if verdict.problem]
    if not problems:
        problems = verify_together(verdicts)
    torn = sum(verdict.torn_tail_bytes for verdict in verdicts)
    if as_json:
        result = {
            "ok": not problems,
            "torn_tail_bytes": torn,
            "problems": problems,
            "files": [_facts(verdict) for verdict in verdicts],
        }
        print(json.dumps(result))
    else:
        for verdict in verdicts:
            print(f"{verdict.path}: {_line(verdict)}")
    if problems:
        click.echo(f"error: {'; '.join(problems)}", err=True)
        return IntegrityError.exit_code
    return 0


@command.command()
@_FILES
@click.option("--batches", is_flag=True, help="Also list every batch and its records.")
@_JSON
def inspect(files: tuple[Path, ...], batches: bool, as_json: bool) -> int:
    """Say what segments, or a journal's mark, hold."""
    results = [_inspect(path, batches) for path in files]
    if as_json:
        print(json.dumps({"files": results}))
        return 0
    for result in results:
        listed = result.pop("listed", [])
        for name, value in result.items():
            print(f"{name:20} {value}")
        for batch in listed:
            head = f"  LSN {batch['first_lsn']} at {batch['time']}"
            print(f"{head}, {batch['bytes']} bytes, flags {batch['flags']}")
            for row in batch["records"]:
                print(f"    {row['lsn']:>12} {row['type']:6} {row['offset']:>16} + {row['length']}")
        print()
    return 0


def _verdict(path: Path, on_batch: Callable[[Batch], None] = lambda batch: None) -> Verdict:
    if not path.exists():
        raise NotFound("no such file", where=str(path))
    return verify_segment(path, on_batch)


def _inspect(path: Path, batches: bool) -> dict[str, Any]:
    if path.name == "mark":
        return _mark_facts(path)
    listed: list[dict[str, Any]] = []
    if not batches:
        return _facts(_verdict(path))
    facts = _facts(_verdict(path, lambda batch: listed.append(_batch(batch))))
    return facts | {"listed": listed}


def _facts(verdict: Verdict) -> dict[str, Any]:
    header = verdict.header
    facts: dict[str, Any] = {
        "file": str(verdict.path),
        "begun": header is not None,
        "ok": verdict.problem is None,
        "problem": verdict.problem,
        "torn_tail_bytes": verdict.torn_tail_bytes,
    }
    if header is None:
        return facts
    there = header.incarnation
    return facts | {
        "number": header.number,
        "machine": header.machine.hex(),
        "volume": header.volume.hex(),
        "incarnation": there.id.hex(),
        "ordinal": there.ordinal,
        "previous": there.previous.hex() if any(there.previous) else None,
        "previous_last_lsn": there.previous_last_lsn,
        "first_lsn": header.first_lsn,
        "last_lsn": verdict.last_lsn,
        "durable_lsn": verdict.durable_lsn,
        "batches": verdict.batches,
        "records": verdict.records,
        "payload_bytes": verdict.payload_bytes,
        "log_bytes": verdict.end,
        "sealed": verdict.sealed,
        "clean": verdict.clean,
        "stopped": verdict.stopped or None,
        "created": _time(header.created_ns),
        "volume_bytes": header.volume_bytes,
        "sector_bytes": header.sector_bytes,
    }


def _mark_facts(path: Path) -> dict[str, Any]:
    try:
        mark = load_mark(path.parent)
    except FarshoreError as error:
        return {"file": str(path), "ok": False, "problem": str(error)}
    if mark is None:
        raise NotFound("no such file", where=str(path))
    return {
        "file": str(path),
        "ok": True,
        "incarnation": mark.incarnation.hex(),
        "durable_lsn": mark.durable_lsn,
        "stable_lsn": mark.stable_lsn,
        "flags": [name for bit, name in _MARK_FLAGS.items() if mark.flags & bit],
        "dirty_epoch": mark.dirty_epoch,
        "disk_bytes": mark.disk.size_bytes,
        "boot": mark.boot_id.hex(),
        "serial": mark.serial,
    }


def _batch(batch: Batch) -> dict[str, Any]:
    rows = zip(
        batch.records["type"].tolist(),
        batch.records["offset"].tolist(),
        batch.records["length"].tolist(),
        strict=True,
    )
    return {
        "first_lsn": batch.first_lsn,
        "time": _time(batch.time_ns),
        "flags": batch.flags,
        "bytes": len(batch.raw),
        "records": [
            {"lsn": batch.first_lsn + index, "type": TYPE_NAMES[kind], "offset": offset, "length": length}
            for index, (kind, offset, length) in enumerate(rows)
        ],
    }


def _time(nanoseconds: int) -> str:
    seconds = min(nanoseconds, 253402300799 * 10**9) / 1e9  # the last second that a datetime can say
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _line(verdict: Verdict) -> str:
    if verdict.problem:
        return verdict.problem
    if verdict.header is None:
        return "not begun"
    text = f"LSN {verdict.header.first_lsn} to {verdict.last_lsn} in {verdict.batches} batches"
    if verdict.torn_tail_bytes:
        return f"{text}, then a torn tail of {verdict.torn_tail_bytes} bytes that was never durable"
    return f"{text}, {'sealed' if verdict.sealed else 'open'}"
