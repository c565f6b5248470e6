"""The history of a run: who writes it, and how it is read. `pipeline.run.mlflow` sends it to MLflow.

The live journal is on the machine that trains: in the run's folder or, for a remote run, in runs/NAME-HASH. A remote
run's URL has a copy as of the newest checkpoint, and beside it the evaluations that other machines have made.
"""

import errno
import hashlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.config import TrackingConfig
from pipeline.errors import missing_package
from pipeline.run.mlflow import Shipper, shipped
from pipeline.storage.errors import StorageError, advice
from pipeline.storage.store import Store

Record = dict[str, Any]


JOURNAL = "journal.jsonl"
EVALUATIONS = "evaluations/"  # folder next to the copy under a remote run's URL


class Journal:
    """Writes one run's journal and has it sent to MLflow. Exists only on rank 0."""

    def __init__(
        self, run: Store, tracking: TrackingConfig, *, uid: str | None, config: Record, dataset: dict[str, str]
    ) -> None:
        """Continue the run's journal, or start one; a journal of another run is kept under another name.

        The journal is the run's if it has its `uid` or, before the first checkpoint has recorded one, its `config`.
        `dataset` has url, name and digest. Raises OSError if the folder is not writable.
        """
        folder = journal_dir(run)
        folder.mkdir(parents=True, exist_ok=True)
        fetch_journal(run, folder)
        self.run, self.folder, self.path = run, folder, folder / JOURNAL

        # Whose journal is there?
        records = read_journal(folder)
        if records and records[0]["kind"] != "run":  # its first line is damaged: nothing says whose it is
            aside = folder / f"journal-damaged-{uuid.uuid4().hex[:8]}.jsonl"
            print(f"warning: {self.path} does not begin with its run; it is kept as {aside}", flush=True)
            self.path.rename(aside)
            shipped(self.path).unlink(missing_ok=True)
            records = []
        if records:
            head = records[0]
            if uid is None and head["config"] == config:
                uid = head["uid"]
            if uid != head["uid"]:
                self.path.rename(folder / f"journal-{head['uid']}.jsonl")
                shipped(self.path).unlink(missing_ok=True)
                records = []
        self.uid = uid or uuid.uuid4().hex

        # Append to it. `last` is the last step of each kind: a resumed run logs no step twice.
        self.last: dict[str, int] = {}
        for record in records:
            if "step" in record:
                self.last[record["kind"]] = max(record["step"], self.last.get(record["kind"], -1))
        self.died = statuses(records)[-1:] == [None]
        """Whether the attempt before this one died."""
        self._file = self.path.open("ab+")
        _cut_torn_line(self._file)
        if not records:
            name = tracking.name or run_name(run.url)
            head = {"uid": self.uid, "name": name, "experiment": tracking.experiment, "parent": tracking.parent}
            self._append("run", **head, config=config, dataset=dataset)
        uri = tracking.mlflow_uri
        if uri and not find_spec("mlflow"):
            print(f"warning: {missing_package('mlflow')}; the history is in {self.path}", flush=True)
            uri = None
        self.shipper = Shipper(self.path, uri, tracking.flush_s) if uri else None

    def owes(self, kind: str, step: int) -> bool:
        """Whether an attempt that died has left this record of a step to this attempt."""
        return self.died and self.last.get(kind, 0) < step

    def tags(self, tags: dict[str, str]) -> None:
        """Record facts about this attempt that may differ between attempts, such as the world size."""
        self._append("tags", tags=tags)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record a log line's metrics."""
        self._append_once("metrics", step, metrics=metrics)

    def epoch(self, epoch: int, digest: int) -> None:
        """Record that an epoch is complete and had each sample once, with the digest that proves it."""
        self._append_once("epoch", epoch, digest=digest)

    def image(self, step: int, key: str, png: bytes) -> None:
        """Write an image to the run's samples/ and record it."""
        name = f"samples/{key}-{step:07d}.png"
        Store(self.folder).write(name, png)
        if self.run.local is None:
            self.run.write(name, png)
        self._append_once("image", step, key=key, file=name)

    def evaluation(self, step: int, metrics: dict[str, float], passports: dict[str, Record]) -> bytes:
        """Record a checkpoint's evaluation, unless the journal already has it; return its line."""
        content = {"step": step, "metrics": metrics, "passports": passports}
        for record in read_journal(self.folder):
            if record["kind"] == "evaluation" and content.items() <= record.items():
                return _line(record)
        return self._append("evaluation", **content)

    def copy(self) -> None:
        """Copy it to a remote run's URL, for readers elsewhere and for the machine that resumes the run."""
        if self.run.local is None:
            self.run.write(JOURNAL, self.path.read_bytes())

    def close(self, status: str | None) -> None:
        """End this attempt (FINISHED, FAILED, KILLED; None: unchanged), and give MLflow limited time for the rest."""
        try:
            if status:
                self._append("status", status=status)
        finally:
            with suppress(OSError):  # what a full disk did not take
                self._file.close()
        if self.shipper:
            self.shipper.close()

    def _append_once(self, kind: str, step: int, **content: Any) -> None:
        """Append a record, unless an earlier attempt has written this step's."""
        if step > self.last.get(kind, -1):
            self._append(kind, step=step, **content)
            self.last[kind] = step

    def _append(self, kind: str, **content: Any) -> bytes:
        line = _line({"time": time.time(), "kind": kind, **content})
        try:
            if not self.path.exists():
                raise FileNotFoundError(errno.ENOENT, "deleted while the run was writing to it")
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            remedy = advice(error) or "run the same command again: it resumes from the newest checkpoint that is left"
            raise StorageError(f"cannot write {self.path}: {error}; {remedy}") from error
        return line


def journal_dir(run: Store) -> Path:
    """Return the local folder of a run's journal: a local run's own folder, else runs/NAME-HASH."""
    return run.local or Path("runs") / f"{run_name(run.url)}-{hashlib.sha256(run.url.encode()).hexdigest()[:8]}"


def run_name(out: str) -> str:
    """Return a run's default name: the last part of its folder or URL."""
    return out.rstrip("/").rsplit("/", 1)[-1]


# ---------------------------------------------------------------------------------------- reading


def read_journal(run: Path | Store) -> list[Record]:
    """Read the journal's records from its folder or a remote run's URL; empty if there is no journal.

    Ignores a last line that a crash has truncated.
    """
    store = run if isinstance(run, Store) else Store(run)
    try:
        journal = store.read(JOURNAL)
    except FileNotFoundError:
        return []
    return _parse(journal, f"{store}/{JOURNAL}") + _parse(_evaluations(store, journal), f"{store}/{EVALUATIONS}")


def journal_of(run: Store) -> list[Record]:
    """Return a run's history: the journal written on this machine, else the copy under the run's URL."""
    return read_journal(journal_dir(run)) or read_journal(run)


def statuses(records: Sequence[Record]) -> list[str | None]:
    """Return the statuses in a journal's records of training. The last one is None if the run is training or died,
    else its final status.
    """
    return [r.get("status") for r in records if r["kind"] in ("status", "metrics", "tags")]


# ------------------------------------------------------------------- a remote run's copy of it


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
        shipped(path).unlink(missing_ok=True)  # it counts bytes of the replaced journal
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
    lines = [run.read(name) for name in run.list(EVALUATIONS)]
    return b"".join(line for line in lines if line not in journal)


# ------------------------------------------------------------------------------- its lines


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _parse(journal: bytes, where: str = "") -> list[Record]:
    """Parse a journal's lines; skips a damaged one with a warning that names it, if it is told `where` they are."""
    records = []
    for number, line in enumerate(journal.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line) if line else None
        except ValueError:
            record = None
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
        elif line and where:
            print(f"warning: {where}, line {number} is damaged; skipping it", flush=True)
    return records


def _last_step(journal: bytes) -> int:
    return max((record["step"] for record in _parse(journal) if record["kind"] == "metrics"), default=-1)


def _cut_torn_line(file: BinaryIO) -> None:
    """Remove a line that a crash truncated at the end; never one that another process is adding."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    file.seek(0, os.SEEK_END)
