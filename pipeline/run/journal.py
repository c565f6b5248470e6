"""The history of a run: a local journal, and its copy under a remote run's URL."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.storage.store import Store

JOURNAL = "journal.jsonl"


SHIPPED = "journal.shipped"  # next to the live journal: how much of it MLflow has
EVALUATIONS = "evaluations/"  # folder next to the copy under a remote run's URL


def journal_dir(run: Store) -> Path:
    """Return the local folder of a run's journal: a local run's own folder, else runs/NAME-HASH."""
    return run.local or Path("runs") / f"{run_name(run.url)}-{hashlib.sha256(run.url.encode()).hexdigest()[:8]}"


def run_name(out: str) -> str:
    """Return a run's default name: the last part of its folder or URL."""
    return out.rstrip("/").rsplit("/", 1)[-1]


def read_journal(run: Path | Store) -> list[dict[str, Any]]:
    """Read the journal's records from its folder or a remote run's URL; empty if there is no journal.

    Ignores a last line that a crash has truncated.
    """
    try:
        if isinstance(run, Path):
            return _parse((run / JOURNAL).read_bytes())
        journal = run.read(JOURNAL)
    except FileNotFoundError:
        return []
    return _parse(journal) + _parse(_evaluations(run, journal))


def journal_of(run: Store) -> list[dict[str, Any]]:
    """A run's history: the journal written on this machine, else the copy under the run's URL."""
    return read_journal(journal_dir(run)) or read_journal(run)


def statuses(records: Sequence[dict[str, Any]]) -> list[str | None]:
    """Return the statuses in a journal's records of training. The last one is None if the run is training or died,
    else its final status.
    """
    return [r.get("status") for r in records if r["kind"] in ("status", "metrics", "tags")]


def fetch_journal(run: Store, folder: Path) -> None:
    """Fetch from a remote run's URL what the local journal lacks, if another machine resumed or evaluated the run."""
    if run.local is not None:
        return
    try:
        copy = run.read(JOURNAL)
    except FileNotFoundError:
        return
    path = folder / JOURNAL
    here = path.read_bytes() if path.exists() else b""
    if not here.startswith(copy) and _last_step(copy) >= _last_step(here):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SHIPPED).unlink(missing_ok=True)  # it counts bytes of the replaced journal
        path.write_bytes(copy)
        here = copy
    with path.open("ab+") as file:
        _cut_torn_line(file)
        file.write(_evaluations(run, here))


def put_evaluation(run: Store, line: bytes) -> None:
    """Write an evaluation's line to a file next to the journal's copy, which training alone may overwrite."""
    record = json.loads(line)
    del record["time"]  # the same numbers measured again are the same evaluation
    digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]
    run.create(f"{EVALUATIONS}{record['step']:08d}-{digest}.jsonl", line)


def _evaluations(run: Store, journal: bytes) -> bytes:
    """Return the lines next to the journal's copy, written by other machines, that the journal lacks."""
    return b"".join(line for name in run.list(EVALUATIONS) if (line := run.read(name)) not in journal)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _parse(journal: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.split(b"\n")[:-1] if line]


def _last_step(journal: bytes) -> int:
    return max((record["step"] for record in _parse(journal) if record["kind"] == "metrics"), default=-1)


def find_uid(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the uid of the journal's run, if it has this configuration."""
    records = read_journal(folder)
    return records[0]["uid"] if records and records[0]["config"] == config else None


def _cut_torn_line(file: Any) -> None:
    """Remove a line that a crash truncated at the end; never one that another process is adding."""
    file.seek(0)
    content = file.read()
    if (whole := content.rfind(b"\n") + 1) < len(content):
        file.truncate(whole)
    file.seek(0, os.SEEK_END)
