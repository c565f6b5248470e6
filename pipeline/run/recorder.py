"""What rank 0 writes of a training run: its checkpoints and its history, opened and closed together."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from pipeline.config import TrainConfig, check_same_run, record
from pipeline.data.shards import ShardIndex
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.hardware import device_name
from pipeline.run.checkpoint import AVERAGES, Checkpoints, Parts, StaleAttempt
from pipeline.run.interrupted import INTERRUPTED_FILE, mark_interrupted
from pipeline.run.journal import Journal, read_journal, statuses
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
    checkpoint, parts = newest
    meta = checkpoint.meta
    if "optimizer" not in parts:
        raise InputError(
            f"--out {config.out} holds converted weights, which can only be sampled and evaluated; give another --out"
        )
    check_same_run(meta["config"], config)
    if meta["dataset_digest"] != index.digest:
        raise InputError(
            f"--data.url {config.data.url}: got digest {index.digest}, expected {meta['dataset_digest']},"
            f" the data that the run at {config.out} was trained on"
        )
    return meta | {"step": checkpoint.step}, parts


class Recorder:
    """Records nothing: what ranks other than 0 have, and the interface of rank 0's."""

    def check(self) -> None:
        """Raise the error of an earlier `save`, if any; cheap enough to call at every step."""

    def owes(self, kind: str, step: int) -> bool:  # noqa: ARG002
        """Whether an attempt that died has left this record of a step to this attempt."""
        return False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Add a log line's metrics to the history."""

    def epoch(self, epoch: int, digest: int) -> None:
        """Add to the history that an epoch is complete and had each sample once, with the digest that proves it."""

    def image(self, step: int, key: str, png: bytes) -> None:
        """Add a picture to the run's samples and history."""

    def evaluation(self, step: int, metrics: dict[str, float], passports: dict[str, dict[str, Any]]) -> object:
        """Add an evaluation to the history."""

    def save(self, step: int, parts: Parts, progress: dict[str, Any]) -> None:
        """Commit a checkpoint in the background; waits for the one before it."""

    def end(self, interrupted_at: int | None = None) -> None:
        """Complete and close what was written, at the horizon or, interrupted, at a step before it."""

    def fail(self, error: BaseException) -> None:
        """Close after an error, which is the one to report: others are suppressed."""


class RunRecorder(Journal, Recorder):
    """Rank 0's recorder: the journal, and the checkpoints beside it.

    It takes over the run, so that no earlier attempt can write to it. `meta` is the newest checkpoint's, as
    `load_newest` returns it. `end` or `fail` must close it.
    """

    def __init__(self, config: TrainConfig, run: Store, index: ShardIndex, meta: dict[str, Any], world: World) -> None:
        recorded = record(config)
        dataset = {"url": config.data.url, "name": index.source, "digest": index.digest}
        super().__init__(run, config.tracking, uid=meta.get("uid"), config=recorded, dataset=dataset)
        self.config = config
        self.writer = Checkpoints(run).claim({"launcher": world.launcher, "world_size": world.size})
        self.tags(
            {
                "attempt": str(self.writer.number),
                "launcher": world.launcher,
                "world_size": str(world.size),
                "device": device_name(world.device),
                "checkpoints": config.out,
            }
        )
        self.identity = {
            "config": recorded,
            "uid": self.uid,
            "dataset_digest": index.digest,
            "averages": AVERAGES,
            "world_size": world.size,
            "torch": torch.__version__,
        }

    def check(self) -> None:
        self.writer.check()

    def save(self, step: int, parts: Parts, progress: dict[str, Any]) -> None:
        meta = progress | self.identity | {"mlflow_run_id": self.shipper and self.shipper.run_id}
        keep_last, keep_every = self.config.keep_last, self.config.keep_every
        # The journal's copy comes first, so that it is never older than the checkpoint.
        self.writer.save(step, parts, meta, keep_last, keep_every, first=self.copy)

    def end(self, interrupted_at: int | None = None) -> None:
        self.writer.close()
        if interrupted_at is not None:
            mark_interrupted(self.run, interrupted_at)
        self.close("FINISHED" if interrupted_at is None else "KILLED")
        self.copy()

    def fail(self, error: BaseException) -> None:
        stale = isinstance(error, StaleAttempt)  # the run belongs to another attempt, which continues it
        with suppress(Exception):
            self.writer.close()  # the pending checkpoint is good
        with suppress(Exception):
            self.close(None if stale else "FAILED")
            if not (stale or isinstance(error, StorageError)):  # a failed store would only cost time
                self.copy()


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


def unfinished(run: Store) -> bool:
    """Whether the run's last attempt died or failed, perhaps between its last checkpoint and its end."""
    history = statuses(read_journal(run))
    return bool(history) and history[-1] != "FINISHED"
