"""What rank 0 writes of a training run: its checkpoints and its history, opened and closed together."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.config import TrainConfig, check_same_run, record
from pipeline.data.shards import ShardIndex
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.hardware import device_name
from pipeline.run.checkpoint import Checkpoints, Parts, StaleAttempt
from pipeline.run.interrupted import INTERRUPTED_FILE, slurm_attempt
from pipeline.run.journal import JOURNAL, fetch_journal, find_uid, journal_dir, read_journal, run_name, statuses
from pipeline.run.tracker import Tracker
from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store


def load_newest(config: TrainConfig, run: Store, index: ShardIndex) -> tuple[dict[str, Any], Parts]:
    """Load the run's newest checkpoint: its metadata, with its `step`, and its parts; both empty if there is none.

    Raises InputError if this configuration or dataset would not continue the run.
    """
    run.check(write=True, once=True)
    run.delete(INTERRUPTED_FILE)  # left by an earlier attempt
    newest = Checkpoints(run).load()
    if newest is None:
        return {}, {}
    record, parts = newest
    if "optimizer" not in parts:
        raise InputError(
            f"--out {config.out} holds converted weights, which can only be sampled and evaluated; give another --out"
        )
    check_same_run(record.meta["config"], config)
    if record.meta["dataset_digest"] != index.digest:
        raise InputError(
            f"--data.url {config.data.url}: got digest {index.digest}, expected {record.meta['dataset_digest']},"
            f" the data that the run at {config.out} was trained on"
        )
    return record.meta | {"step": record.step}, parts


class Recorder:
    """Records nothing: what ranks other than 0 have, and the interface of rank 0's."""

    def check(self) -> None:
        """Raise the error of an earlier `save`, if any; cheap enough to call at every step."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add a log line's metrics to the history."""

    def epoch(self, epoch: int, digest: int) -> None:
        """Add to the history that an epoch is complete and had each sample once, with the digest that proves it."""

    def image(self, step: int, key: str, png: bytes) -> None:
        """Add a picture to the run's samples and history."""

    def evaluation(self, step: int, values: dict[str, float], passports: dict[str, dict[str, Any]]) -> None:
        """Add an evaluation to the history."""

    def save(self, step: int, parts: Parts, meta: dict[str, Any]) -> None:
        """Commit a checkpoint in the background; waits for the one before it."""

    def end(self, interrupted_at: int | None = None) -> None:
        """Complete and close what was written, at the horizon or, interrupted, at a step before it."""

    def fail(self, error: BaseException) -> None:
        """Close after an error, which is the one to report: others are suppressed."""


class RunRecorder(Recorder):
    """Rank 0's recorder. It takes over the run, so that no earlier attempt can write to it.

    `meta` is the newest checkpoint's, as `load_newest` returns it. `end` or `fail` must close it.
    """

    def __init__(self, config: TrainConfig, run: Store, index: ShardIndex, meta: dict[str, Any], world: World) -> None:
        self.config, self.run = config, run
        self.tracker = _open_tracker(config, run, index, meta)
        self.writer = Checkpoints(run).claim({"launcher": world.launcher, "world_size": world.size})
        self.tracker.tags(
            {
                "attempt": str(self.writer.number),
                "launcher": world.launcher,
                "world_size": str(world.size),
                "device": device_name(world.device),
                "checkpoints": config.out,
            }
        )

    def check(self) -> None:
        self.writer.check()

    def log(self, step: int, values: dict[str, float]) -> None:
        self.tracker.log(step, values)

    def epoch(self, epoch: int, digest: int) -> None:
        self.tracker.epoch(epoch, digest)

    def image(self, step: int, key: str, png: bytes) -> None:
        path = self.tracker.image(step, key, png)
        if self.run.local is None:
            self.run.write(f"samples/{path.name}", png)

    def evaluation(self, step: int, values: dict[str, float], passports: dict[str, dict[str, Any]]) -> None:
        self.tracker.evaluation(step, values, passports)

    def save(self, step: int, parts: Parts, meta: dict[str, Any]) -> None:
        shipper = self.tracker.shipper
        identity = {
            "config": record(self.config),
            "uid": self.tracker.uid,
            "mlflow_run_id": shipper and shipper.run_id,
        }

        def copy_journal() -> None:  # first, so that the copy is never older than the checkpoint
            _copy_journal(self.tracker, self.run)

        self.writer.save(
            step, parts, meta | identity, self.config.keep_last, self.config.keep_every, first=copy_journal
        )

    def end(self, interrupted_at: int | None = None) -> None:
        self.writer.close()
        if interrupted_at is not None:
            mark = {"step": interrupted_at, "attempt": slurm_attempt()}
            self.run.write(INTERRUPTED_FILE, json.dumps(mark).encode())
        self.tracker.close("FINISHED" if interrupted_at is None else "KILLED")
        _copy_journal(self.tracker, self.run)

    def fail(self, error: BaseException) -> None:
        stale = isinstance(error, StaleAttempt)  # the run belongs to another attempt, which continues it
        with suppress(Exception):
            self.writer.close()  # the pending checkpoint is good
        with suppress(Exception):
            self.tracker.close(None if stale else "FAILED")
            if not (stale or isinstance(error, StorageError)):  # a failed store would only cost time
                _copy_journal(self.tracker, self.run)


@contextmanager
def recording(
    config: TrainConfig, run: Store, index: ShardIndex, meta: dict[str, Any], world: World
) -> Iterator[Recorder]:
    """Open the rank's recorder, and close it after an error; `end` closes it otherwise."""
    recorder = world.only_on_rank0(lambda: RunRecorder(config, run, index, meta, world)) or Recorder()
    try:
        yield recorder
    except BaseException as error:
        world.leaving()
        recorder.fail(error)
        raise


def settle(config: TrainConfig, run: Store, index: ShardIndex, meta: dict[str, Any]) -> None:
    """Mark a run FINISHED whose last attempt died between its last checkpoint and its end."""
    history = statuses(read_journal(run.local or run))
    if history and history[-1] != "FINISHED":
        tracker = _open_tracker(config, run, index, meta)
        tracker.close("FINISHED")
        _copy_journal(tracker, run)


def _open_tracker(config: TrainConfig, run: Store, index: ShardIndex, meta: dict[str, Any]) -> Tracker:
    folder = journal_dir(run)
    fetch_journal(run, folder)
    return Tracker(
        folder,
        config.tracking,
        uid=meta.get("uid") or find_uid(folder, record(config)),
        name=config.tracking.name or run_name(config.out),
        run_config=record(config),
        dataset={"url": config.data.url, "name": index.source, "digest": index.digest},
    )


def _copy_journal(tracker: Tracker, run: Store) -> None:
    """Copy the journal to a remote run's URL, for readers elsewhere and for the machine that resumes the run."""
    if run.local is None:
        run.write(JOURNAL, tracker.path.read_bytes())
