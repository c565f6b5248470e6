"""The run under Ray: this process starts the workers, where the other launchers have started us.

Ray Train holds the worker group together and restarts it; the checkpoints are the run's own, so a restarted
group resumes as every other start does.
"""

import functools
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint import StaleAttempt
from pipeline.config import TrainConfig
from pipeline.loop import train
from pipeline.world import RankFailure, World, pick_device, together


def run_under_ray(config: TrainConfig) -> int:
    """Train on the cluster this process is a driver of, or on a new one of this machine alone; the exit status.

    One worker per GPU of the cluster, or per CPU where it has no GPU, unless `--workers` says how many.
    """
    config = replace(config, out=_absolute(config.out), data=replace(config.data, url=_absolute(config.data.url)))
    if "/working_dir_files/" in config.out:
        print(f"warning: --out {config.out} is in Ray's copy of the working directory; give a URL or an absolute path")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else Ray shows every line twice
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init()
    cluster = ray.cluster_resources()
    gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 0))
    use_gpu = config.launch.device == "cuda" or (config.launch.device == "auto" and gpus > 0)
    kind, count = ("GPUs", gpus) if use_gpu else ("CPUs", cpus)
    workers = config.launch.workers or count
    print(f"Ray: {workers} workers on a cluster with {gpus} GPUs and {cpus} CPUs", flush=True)
    if not workers or workers > count:
        print(f"warning: that is for {workers} {kind}; Ray waits until the cluster has so many", flush=True)

    with tempfile.TemporaryDirectory(prefix="iddpm-ray-") as scratch:
        trainer = TorchTrainer(
            functools.partial(_work, config, str(Path.cwd())),  # type: ignore[arg-type]
            scaling_config=ScalingConfig(num_workers=max(workers, 1), use_gpu=use_gpu),
            # Ray wants a folder for checkpoints of its own, and gets none.
            run_config=RunConfig(
                storage_path=scratch, failure_config=FailureConfig(max_failures=config.launch.retries)
            ),
            torch_config=TorchConfig(
                backend="nccl" if use_gpu else "gloo", timeout_s=int(config.launch.timeout_s) + 60 * use_gpu
            ),
        )
        try:
            outcome = trainer.fit().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            print(f"error: after {config.launch.retries} retries: {error}", file=sys.stderr)
            return 1
    if outcome != "finished":
        print(f"error: {outcome}", file=sys.stderr)
        return 1
    return 0


def _work(config: TrainConfig, folder: str) -> str:
    """On each worker, in a thread of its own: "finished", or why trying again cannot help."""
    import ray.train
    import ray.train.torch

    if Path(folder).is_dir():
        os.chdir(folder)
    context = ray.train.get_context()
    world = World(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_rank(),
        context.get_local_world_size(),
        "ray",
        pick_device("cpu", 0) if config.launch.device == "cpu" else ray.train.torch.get_device(),
        config.launch.timeout_s,
    )
    try:
        with together(world):
            return train(config, world, report=_report)
    except (ValueError, StaleAttempt) as error:
        return str(error)
    except RankFailure as failure:
        if failure.confessed:  # that rank itself tells Ray whether to try again
            return str(failure)
        raise


def _report(step: int, values: dict[str, Any]) -> None:
    import ray.train

    ray.train.report({"step": step, **values})


def _absolute(url: str) -> str:
    """A local path as seen from any folder; a URL as it is."""
    return url if "://" in url else str(Path(url).absolute())
