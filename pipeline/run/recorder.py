"""What rank 0 writes of a training run: its checkpoints and its history, opened and closed together."""

import json
from contextlib import suppress
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


def load_newest(config: TrainConfig, index: ShardIndex) -> tuple[dict[str, Any], Parts]:
    """Load the run's newest checkpoint: its metadata, with its `step`, and its parts; both empty if there is none.

    Raises InputError if this configuration or dataset would not continue the run.
    """
    run = Store(config.out, config.storage)
    run.check(write=True, once=True)
    run.delete(INTERRUPTED_FILE)  # left by an earlier attempt
    found = Checkpoints(run).newest()
    if found and "optimizer" not in found[0].parts:
        raise InputError(
            f"--out {config.out} holds converted weights, which can only be sampled and evaluated; give another --out"
        )
    if not found:
        return {}, {}
    newest, parts = found
    check_same_run(newest.meta["config"], config)
    if newest.meta["dataset_digest"] != index.digest:
        raise InputError(
            f"--data.url {config.data.url}: got digest {index.digest}, expected {newest.meta['dataset_digest']},"
            f" the data that the run at {config.out} was trained on"
        )
    return newest.meta | {"step": newest.step}, parts


class Recorder:
    """Takes over the run, so that no earlier attempt can write to it; `end` or `fail` must close it.

    `meta` is the newest checkpoint's, as `load_newest` returns it.
    """

    def __init__(self, config: TrainConfig, index: ShardIndex, meta: dict[str, Any], world: World) -> None:
        self.config, self.run = config, Store(config.out, config.storage)
        self.tracker = _open_tracker(config, self.run, index, meta)
        self.writer = Checkpoints(self.run).claim({"launcher": world.launcher, "world_size": world.size})
        self.tracker.tags(
            {
                "attempt": str(self.writer.number),
                "launcher": world.launcher,
                "world_size": str(world.size),
                "device": device_name(world.device),
                "checkpoints": config.out,
            }
        )

    def save(self, step: int, parts: Parts, meta: dict[str, Any]) -> None:
        """Commit a checkpoint in the background. The journal's copy goes first, so that it is never older."""
        shipper = self.tracker.shipper
        own = {"config": record(self.config), "uid": self.tracker.uid, "mlflow_run_id": shipper and shipper.run_id}
        kept = self.config.keep_last, self.config.keep_every
        self.writer.save(step, parts, meta | own, *kept, lambda: _copy_journal(self.tracker, self.run))

    def image(self, step: int, key: str, png: bytes) -> None:
        """Add a picture to the run's samples and history."""
        path = self.tracker.image(step, key, png)
        if self.run.local is None:
            self.run.write(f"samples/{path.name}", png)

    def end(self, interrupted_at: int | None = None) -> None:
        """Complete and close what was written, at the horizon or, interrupted, at a step before it."""
        self.writer.close()
        if interrupted_at is not None:
            mark = {"step": interrupted_at, "attempt": slurm_attempt()}
            self.run.write(INTERRUPTED_FILE, json.dumps(mark).encode())
        self.tracker.close("FINISHED" if interrupted_at is None else "KILLED")
        _copy_journal(self.tracker, self.run)

    def fail(self, error: BaseException) -> None:
        """Close after an error, which is the one to report: others are suppressed."""
        with suppress(Exception):
            self.writer.close()  # the pending checkpoint is good
        with suppress(Exception):
            stale = isinstance(error, StaleAttempt)  # the run belongs to another attempt, which continues it
            self.tracker.close(None if stale else "FAILED")
            if not (stale or isinstance(error, StorageError)):  # a failed store would only cost time
                _copy_journal(self.tracker, self.run)


def settle(config: TrainConfig, index: ShardIndex, meta: dict[str, Any]) -> None:
    """Mark a run FINISHED whose last attempt died between its last checkpoint and its end."""
    run = Store(config.out, config.storage)
    told = statuses(read_journal(run.local or run))
    if told and told[-1] != "FINISHED":
        tracker = _open_tracker(config, run, index, meta)
        tracker.close("FINISHED")
        _copy_journal(tracker, run)


def _open_tracker(config: TrainConfig, run: Store, index: ShardIndex, meta: dict[str, Any]) -> Tracker:
    folder = journal_dir(config.out)
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
