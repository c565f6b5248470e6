"""The history of a run: always in a local journal, and in MLflow when it answers.

`Tracker.log` appends a line to `journal.jsonl` and returns. A thread sends the journal's lines to MLflow and remembers
its progress, so that a slow, dead or restarted tracking server neither delays training nor leaves a gap. A resumed run
repeats steps that the journal already has; those are not written again. `python -m pipeline.tracking RUN` sends what is
left. With each checkpoint, training copies the journal to a remote run's URL. Only training writes that copy: an
evaluation elsewhere puts its line into a separate file next to it, and readers merge these files.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from pipeline.config import TrackingConfig, flatten, parse_flags
from pipeline.storage import StorageConfig, Store, first_line, mask

JOURNAL = "journal.jsonl"
EVALUATIONS = "evaluations/"  # folder next to the copy under a remote run's URL
BATCH = 200  # journal lines sent at once


def journal_dir(out: str) -> Path:
    """Return the local folder of a run's journal: a local run's own folder, else runs/NAME-HASH."""
    store = Store(out)
    return store.local or Path("runs") / f"{run_name(out)}-{hashlib.sha256(store.url.encode()).hexdigest()[:8]}"


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


def journal_of(out: str, storage: StorageConfig) -> list[dict[str, Any]]:
    """A run's history by its `--out`: the journal written on this machine, else the copy under the run's URL."""
    return read_journal(journal_dir(out)) or read_journal(Store(out, storage))


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
        (folder / Shipper.STATE).unlink(missing_ok=True)  # it counts bytes of the replaced journal
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


class Tracker:
    """Writes one run's journal and sends it to MLflow. Exists only on rank 0."""

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        *,
        uid: str | None,
        name: str,
        run_config: dict[str, Any],
        dataset: dict[str, str],
    ) -> None:
        """Continue the journal in `folder` if it belongs to the run `uid`, else start a new one.

        `dataset` has url, name and digest. Raises OSError if the folder is not writable.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / JOURNAL
        records = read_journal(folder)
        if records and records[0]["uid"] != uid:
            self.path.rename(folder / f"journal-{records[0]['uid']}.jsonl")
            (folder / Shipper.STATE).unlink(missing_ok=True)
            records = []
        self.uid = uid or uuid.uuid4().hex
        self.last = {kind: -1 for kind in ("metrics", "image", "epoch")}
        self._file = self.path.open("ab+")
        _cut_torn_line(self._file)
        if records:
            for record in records:
                if record["kind"] in self.last:
                    self.last[record["kind"]] = max(self.last[record["kind"]], record["step"])
        else:
            self._append(
                {"kind": "run", "uid": self.uid, "name": name, "experiment": config.experiment}
                | {"parent": config.parent, "config": run_config, "dataset": dataset}
            )
        self.shipper = None if config.uri == "none" else Shipper(folder, config)

    def tags(self, tags: dict[str, str]) -> None:
        """Record facts about this attempt that may differ between attempts, such as the world size."""
        self._append({"kind": "tags", "tags": tags})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append metrics, unless an earlier attempt has written this step's."""
        if step > self.last["metrics"]:
            self._append({"kind": "metrics", "step": step, "metrics": metrics})
            self.last["metrics"] = step

    def evaluation(self, step: int, metrics: dict[str, float], passports: dict[str, dict[str, Any]]) -> bytes:
        """Append a checkpoint's evaluation, unless the journal already has it; return its line."""
        record = {"kind": "evaluation", "step": step, "metrics": metrics, "passports": passports}
        there = (r for r in read_journal(self.folder) if record.items() <= r.items())
        return _line(known) if (known := next(there, None)) else self._append(record)

    def epoch(self, epoch: int, digest: int) -> None:
        """Record that an epoch is complete and had each sample once, with the digest that proves it."""
        if epoch > self.last["epoch"]:
            self._append({"kind": "epoch", "step": epoch, "digest": digest})
            self.last["epoch"] = epoch

    def image(self, step: int, key: str, png: bytes) -> Path:
        """Write an image to samples/ and record it."""
        path = self.folder / "samples" / f"{key}-{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png)
        if step > self.last["image"]:
            self._append({"kind": "image", "step": step, "key": key, "file": str(path.relative_to(self.folder))})
            self.last["image"] = step
        return path

    def close(self, status: str | None) -> None:
        """End this attempt (FINISHED, FAILED, KILLED; None: unchanged) and give the shipper limited time to finish."""
        if status:
            self._append({"kind": "status", "status": status})
        self._file.close()
        if self.shipper:
            self.shipper.close()

    def _append(self, record: dict[str, Any]) -> bytes:
        line = _line({"time": time.time(), **record})
        self._file.write(line)
        self._file.flush()
        return line


class Shipper:
    """Sends a journal to MLflow from a background thread."""

    STATE = "journal.shipped"

    def __init__(self, folder: Path, config: TrackingConfig) -> None:
        self.folder = folder
        self.flush_s = config.flush_s
        self.uri = tracking_uri(config)
        self.run_id: str | None = None
        self.problem: str | None = None
        self._client: Any = None
        self._there: dict[int, int] = {}
        self._closing = threading.Event()
        self._done = threading.Event()
        self._given_up = False
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether the whole journal had arrived after `close`."""
        return self._done.is_set()

    def close(self) -> None:
        """Wait up to flush_s seconds for the rest of the journal to arrive."""
        self._closing.set()
        if not self._done.wait(self.flush_s):
            self._given_up = True
            reason = f": {self.problem}" if self.problem else ""
            print(
                f"warning: MLflow at {mask(self.uri)} has not received the whole history{reason}. Nothing is lost:"
                f" it is in {self.folder / JOURNAL}; send it with `python -m pipeline.tracking {self.folder}`.",
                flush=True,
            )

    def _work(self) -> None:
        pause = 1.0
        while not self._given_up:
            closing = self._closing.is_set()
            try:
                caught_up = self._ship()
                self.problem, pause = None, 1.0
                if caught_up and closing:
                    self._done.set()
                    return
                if not caught_up:
                    continue
            except Exception as error:  # a failing tracking server must not stop the run
                if self.problem is None:
                    print(
                        f"warning: MLflow at {mask(self.uri)} does not answer ({first_line(error)}); training"
                        f" continues, its history is in {self.folder / JOURNAL} and is sent when MLflow is back.",
                        flush=True,
                    )
                self.problem = first_line(error)
                self._client = None  # the server may come back with another database
                pause = min(2 * pause, 30.0)
            if closing:
                time.sleep(1.0)  # `close` bounds how often this repeats
            else:
                self._closing.wait(pause)

    def _ship(self) -> bool:
        """Send the next lines; return whether none were left."""
        state_path = self.folder / self.STATE
        try:
            state = json.loads(state_path.read_text())
        except (FileNotFoundError, ValueError):  # sending again changes nothing
            state = {}
        with (self.folder / JOURNAL).open("rb") as file:
            head = json.loads(file.readline())
            if self._client is None:
                client = connect(self.uri)
                self.run_id = _run_of(client, head)
                if state.get("run_id") != self.run_id:
                    # Send everything except steps that another machine has sent, with other timestamps.
                    history = client.get_metric_history(self.run_id, "compute/train_flops")
                    self._there = {point.step: point.timestamp for point in history}
                self._client = client
            offset = state["offset"] if state.get("run_id") == self.run_id else 0
            file.seek(offset)
            lines: list[bytes] = []
            while len(lines) < BATCH and (line := file.readline()).endswith(b"\n"):
                lines.append(line)
        if not lines:
            return True
        assert self.run_id
        _send(self._client, self.run_id, self.folder, [json.loads(line) for line in lines], self._there)
        temporary = state_path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"run_id": self.run_id, "offset": offset + sum(map(len, lines))}))
        temporary.replace(state_path)
        return False


def tracking_uri(config: TrackingConfig) -> str:
    """Return MLflow's URI: configured, from the environment, or the default."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def connect(uri: str) -> Any:
    """Return an MlflowClient with short time-outs."""
    # With MLflow's defaults (minutes), the last, bounded flush would never succeed.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    return MlflowClient(uri)


def find_or_create_run(client: Any, experiment: str, uid: str, name: str, tags: dict[str, str]) -> str:
    """Return the id of the MLflow run with this uid, created if necessary."""
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(experiment)
    if known is None:
        try:
            experiment_id = client.create_experiment(experiment)
        except MlflowException:  # another run of the study was faster
            experiment_id = client.get_experiment_by_name(experiment).experiment_id
    else:
        experiment_id = known.experiment_id
    found = client.search_runs([experiment_id], f"tags.`iddpm.uid` = '{uid}'", max_results=1)
    if found:
        return found[0].info.run_id
    run = client.create_run(experiment_id, tags={"iddpm.uid": uid, **tags}, run_name=name)
    return run.info.run_id


def _run_of(client: Any, head: dict[str, Any]) -> str:
    """Return the id of the MLflow run of the journal with this first record, below its parent if it has one."""
    tags = {}
    if head.get("parent"):
        parent = find_or_create_run(client, head["experiment"], head["parent"], head["experiment"], {})
        tags["mlflow.parentRunId"] = parent
    return find_or_create_run(client, head["experiment"], head["uid"], head["name"], tags)


def _send(client: Any, run_id: str, folder: Path, records: Sequence[dict[str, Any]], there: dict[int, int]) -> None:
    """Send journal records. Sending them again changes nothing: MLflow stores equal metrics as one point.

    `there` maps steps that MLflow already has to their timestamps; records of them with other timestamps are not sent.
    """
    from mlflow.entities import Metric, Param, RunTag

    metrics = []
    for record in records:
        millis = int(record["time"] * 1000)
        match record["kind"]:
            case "metrics" if there.get(record["step"], millis) == millis:
                metrics += [Metric(key, value, millis, record["step"]) for key, value in record["metrics"].items()]
            case "evaluation":
                for key, value in record["metrics"].items():
                    metrics.append(Metric(key, value, millis, record["step"]))
                    if value > 0 and not key.endswith("_se"):  # some of MLflow's charts have no logarithmic axis
                        name = key.replace("/", "/log10_")
                        metrics.append(Metric(name, math.log10(value), millis, record["step"]))
                tags = [RunTag(f"{key}.passport", json.dumps(p)) for key, p in record["passports"].items()]
                client.log_batch(run_id, tags=tags)
            case "run":
                params = [Param(key, str(value)[:500]) for key, value in flatten(record["config"]).items()]
                client.log_batch(run_id, params=params, tags=[RunTag("iddpm.folder", str(folder.resolve()))])
                _log_dataset(client, run_id, record["dataset"])
            case "tags":  # an attempt begins
                client.update_run(run_id, status="RUNNING")
                client.log_batch(run_id, tags=[RunTag(key, value) for key, value in record["tags"].items()])
            case "image":
                _log_image(client, run_id, folder / record["file"], record["key"], record["step"])
            case "status":
                client.set_terminated(run_id, record["status"], millis)
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def _log_dataset(client: Any, run_id: str, dataset: dict[str, str]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"url": mask(dataset["url"])})
    entity = Dataset(dataset["name"], dataset["digest"][:36], "webdataset", source)  # MLflow allows 36 characters
    client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])


def _log_image(client: Any, run_id: str, path: Path, key: str, step: int) -> None:
    from PIL import Image

    there = client.list_artifacts(run_id, "images")
    if path.exists() and not any(f"{key}+step+{step}+" in artifact.path for artifact in there):
        with Image.open(path) as picture:
            client.log_image(run_id, picture.convert("RGB"), key=key, step=step, synchronous=True)


def _cut_torn_line(file: Any) -> None:
    """Remove a line that a crash truncated at the end; never one that another process is adding."""
    file.seek(0)
    content = file.read()
    if (whole := content.rfind(b"\n") + 1) < len(content):
        file.truncate(whole)
    file.seek(0, os.SEEK_END)


@dataclasses.dataclass(frozen=True)
class ShipConfig:
    """Send what MLflow is missing of a run's journal."""

    run: tyro.conf.Positional[str]
    """The run: its --out, a folder or URL; or the folder named in a warning."""
    uri: str | None = None
    """MLflow tracking URI; default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    wait_s: float = 300.0
    """Longest time to keep trying, in seconds."""
    storage: StorageConfig = dataclasses.field(default_factory=StorageConfig)


def main() -> None:
    config = parse_flags(ShipConfig, sys.argv[1:], ShipConfig.__doc__ or "")
    try:
        run, folder = Store(config.run, config.storage), journal_dir(config.run)
        if run.local is None:
            fetch_journal(run, folder)
            for record in read_journal(folder):
                if record["kind"] == "image" and not (picture := folder / record["file"]).exists():
                    picture.parent.mkdir(exist_ok=True)
                    with contextlib.suppress(FileNotFoundError):
                        picture.write_bytes(run.read(record["file"]))
        if not (folder / JOURNAL).exists():
            raise ValueError(f"{run}: got no {JOURNAL}, expected the --out of a run")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    shipper = Shipper(folder, TrackingConfig(uri=config.uri, flush_s=config.wait_s))
    shipper.close()
    raise SystemExit(0 if shipper.done else 1)


if __name__ == "__main__":
    main()
