"""Write a run's journal."""

import time
import uuid
from pathlib import Path
from typing import Any

from pipeline.config import TrackingConfig
from pipeline.run.journal import JOURNAL, SHIPPED, _cut_torn_line, _line, read_journal
from pipeline.run.mlflow import Shipper


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
            (folder / SHIPPED).unlink(missing_ok=True)
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
        uri = config.mlflow_uri
        self.shipper = Shipper(folder, uri, config.flush_s) if uri else None

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
