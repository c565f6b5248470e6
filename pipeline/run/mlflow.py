"""Send a run's journal to MLflow.

The journal is the history; MLflow has a copy, which is complete whatever happens to its server or to this process:
the file `shipped` says how much of the journal has arrived, and lines sent twice change nothing.
"""

import fcntl
import json
import math
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config import flatten
from pipeline.masking import first_line, mask

BATCH = 200  # journal lines sent at once


BUGS = (TypeError, LookupError, AttributeError, AssertionError, NameError)
"""What no server causes: it is shown with its traceback."""


def shipped(journal: Path) -> Path:
    """Return the file next to a journal that records how much of it MLflow has."""
    return journal.with_suffix(".shipped")


class Shipper:
    """Sends a journal to MLflow from a background thread."""

    def __init__(self, journal: Path, uri: str, flush_s: float) -> None:
        self.journal = journal
        self.uri = uri
        self.flush_s = flush_s
        self.run_id: str | None = None
        self.problem: str | None = None
        self._client: Any = None
        self._sent_elsewhere: dict[int, int] = {}
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
                f" it is in {self.journal}; send it with `python -m pipeline.tracking {self.journal.parent}`.",
                flush=True,
            )

    def _work(self) -> None:
        pause = 1.0
        while not self._given_up:
            closing = self._closing.is_set()  # before sending: nothing is written after `close`
            try:
                sent = self._send_next()
                self.problem, pause = None, 1.0
                if sent:
                    continue
                if closing:
                    self._done.set()
                    return
            except Exception as error:  # a failing tracking server must not stop the run
                self._fail(error)
                pause = min(2 * pause, 30.0)
            if closing:
                time.sleep(1.0)  # `close` bounds how often this repeats
            else:
                self._closing.wait(pause)

    def _fail(self, error: Exception) -> None:
        if self.problem is None:
            print(
                f"warning: MLflow at {mask(self.uri)} does not answer ({first_line(error)}); training"
                f" continues, its history is in {self.journal} and is sent when MLflow is back.",
                flush=True,
            )
            if isinstance(error, BUGS):
                traceback.print_exception(error)
        self.problem = first_line(error)
        self._client = None  # the server may come back with another database

    def _send_next(self) -> bool:
        """Send the next lines; return whether there were any."""
        # How much has arrived, in which run?
        state_path = shipped(self.journal)
        try:
            state = json.loads(state_path.read_text())
        except (FileNotFoundError, ValueError):  # sending again changes nothing
            state = {}

        with self.journal.open("rb") as file:
            head = json.loads(file.readline())
            if self._client is None:
                client, self.run_id = open_run(
                    self.uri, head["experiment"], head["uid"], head["name"], head.get("parent")
                )
                if state.get("run_id") != self.run_id:
                    # Send everything except steps that another machine has sent, with other timestamps.
                    history = client.get_metric_history(self.run_id, "compute/train_flops")
                    self._sent_elsewhere = {point.step: point.timestamp for point in history}
                self._client = client
            offset = state["offset"] if state.get("run_id") == self.run_id else 0
            file.seek(offset)
            lines: list[bytes] = []
            while len(lines) < BATCH and (line := file.readline()).endswith(b"\n"):
                lines.append(line)
        if not lines:
            return False

        assert self.run_id
        records = _intact(lines)
        _send(self._client, self.run_id, self.journal.parent, records, self._sent_elsewhere)
        temporary = state_path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"run_id": self.run_id, "offset": offset + sum(map(len, lines))}))
        temporary.replace(state_path)
        return True


def _intact(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """Parse journal lines, without the damaged ones: whoever reads the journal warns of them."""
    records = []
    for line in lines:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def update_parent(uri: str | None, experiment: str, uid: str, update: Callable[[Any, str], Any]) -> str | None:
    """Call `update` with an MlflowClient and the id of the parent of an experiment's runs, unless there is no `uri`.

    Returns why that failed, if it did: a failing tracking server must not stop its caller.
    """
    if uri is None:
        return None
    try:
        update(*open_run(uri, experiment, uid, experiment))
    except Exception as error:
        return mask(str(error))
    return None


def open_run(uri: str, experiment: str, uid: str, name: str, parent: str | None = None) -> tuple[Any, str]:
    """Return an MlflowClient with short time-outs, and the id of the run with this uid, created if necessary.

    A new run is below the run with the uid `parent`, if given.
    """
    # With MLflow's defaults (minutes), the last, bounded flush would never succeed.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///") and not re.search(r"[?]|:memory:", uri):
        _create_database(Path(uri.removeprefix("sqlite:///")))
    client = MlflowClient(uri)
    tags = {}
    if parent:
        tags["mlflow.parentRunId"] = find_or_create_run(client, experiment, parent, experiment, {})
    return client, find_or_create_run(client, experiment, uid, name, tags)


def _create_database(path: Path) -> None:
    """Create an SQLite database, unless there is one, so that no other process ever sees half of its tables.

    MLflow itself creates them in the file, where a kill, or a second process, leaves a database that never opens again.
    """
    from mlflow import MlflowClient

    if path.exists():
        return
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():  # another process was faster
            return
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.unlink(missing_ok=True)  # of a process that was killed
        MlflowClient(f"sqlite:///{temporary}").search_experiments()
        temporary.rename(path)


def find_or_create_run(client: Any, experiment: str, uid: str, name: str, tags: dict[str, str]) -> str:
    """Return the id of the MLflow run with this uid, created if necessary."""
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(experiment)
    if known is None:
        with suppress(MlflowException):  # another run of the study was faster
            client.create_experiment(experiment)
        known = client.get_experiment_by_name(experiment)
    runs = client.search_runs([known.experiment_id], f"tags.`iddpm.uid` = '{uid}'", max_results=1)
    run = runs[0] if runs else client.create_run(known.experiment_id, tags={"iddpm.uid": uid, **tags}, run_name=name)
    return run.info.run_id


def _send(
    client: Any, run_id: str, folder: Path, records: Sequence[dict[str, Any]], sent_elsewhere: dict[int, int]
) -> None:
    """Send journal records. Sending them again changes nothing: MLflow stores equal metrics as one point.

    `sent_elsewhere` maps steps that MLflow has to their timestamps; records of them with others are not sent.
    """
    from mlflow.entities import Metric, Param, RunTag

    metrics = []
    for record in records:
        millis = int(record["time"] * 1000)
        match record["kind"]:
            case "metrics" if sent_elsewhere.get(record["step"], millis) == millis:
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
            case "status":
                client.set_terminated(run_id, record["status"], millis)
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])

    # Pictures come last: one that cannot be stored costs nothing but itself.
    for record in records:
        if record["kind"] == "image":
            try:
                _log_image(client, run_id, folder, record["file"], record["key"], record["step"])
            except Exception as error:
                client.get_run(run_id)  # raises if the server itself is away: the picture is sent when it is back
                reason = first_line(error)
                print(f"warning: MLflow did not take {folder / record['file']}: {reason}; it stays there", flush=True)


def _log_dataset(client: Any, run_id: str, dataset: dict[str, str]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"url": mask(dataset["url"])})
    entity = Dataset(dataset["name"], dataset["digest"][:36], "webdataset", source)  # MLflow allows 36 characters
    client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])


def _log_image(client: Any, run_id: str, folder: Path, file: str, key: str, step: int) -> None:
    """Log a picture for the charts, which show the steps of a key, and as a file to look at and to download."""
    from PIL import Image

    if not re.fullmatch(r"samples/[\w.-]+\.png", file):  # a journal from a store may name any file of this machine
        raise ValueError(f"got the name {file!r}, expected samples/NAME.png")
    path = folder / file
    sent = client.list_artifacts(run_id, "images")
    if path.exists() and not any(f"{key}+step+{step}+" in artifact.path for artifact in sent):
        client.log_artifact(run_id, str(path), "samples")
        with Image.open(path) as picture:
            client.log_image(run_id, picture.convert("RGB"), key=key, step=step, synchronous=True)
