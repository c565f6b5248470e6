"""Run any program under Ray: this process starts the workers, whereas other launchers start this process.

Ray Train manages the worker group and restarts it, with fewer workers if a node is lost. The run writes its own
checkpoints, so a restarted group resumes like any other start.
"""

import asyncio
import functools
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.config import LaunchConfig
from pipeline.distributed.world import RankFailure, World, fail_together, pick_device
from pipeline.errors import InputError, PermanentError


def run_under_ray(body: Callable[[World], int | None], config: LaunchConfig) -> int:
    """Run a program's body on workers of this process's Ray cluster, or of a new local one; return the exit status.

    Starts `--workers` workers; default: one per GPU of the cluster, or per CPU if it has no GPU. The body's result must
    not depend on their number: Ray may restart it with fewer.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # otherwise Ray shows every line twice
    # After losing a node, Ray may wait for it once more before it asks which are left.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # The cluster, and how many workers it gets.
    ray.init()
    cluster = ray.cluster_resources()
    gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 0))
    use_gpu = config.device == "cuda" or (config.device == "auto" and gpus > 0)
    places = gpus if use_gpu else cpus
    workers = config.workers or places
    if workers < config.min_workers:
        raise InputError(f"--workers: got {workers}, expected --min-workers {config.min_workers} or more")
    print(f"Ray: {workers} workers on a cluster with {gpus} GPUs and {cpus} CPUs", flush=True)
    if workers > places:
        least = f"{config.min_workers} {'GPUs' if use_gpu else 'CPUs'}"
        print(f"warning: the cluster has fewer; Ray starts once {least} are available", flush=True)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "RAY_JOB_STOP_WAIT_TIME_S" not in os.environ:
        print("warning: `ray job stop` will leave 3 seconds for a checkpoint; see docs/ray.md", flush=True)

    # Signals reach this process; the flag passes them on to the workers.
    flag = _stop_flag()

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second signal ends this process
        if not ray.get(flag.set.remote()):  # nothing is training yet, or the program has nothing to checkpoint
            os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)

    # Ray starts the workers, and starts them again after a failure, until one of them says why that cannot help.
    with tempfile.TemporaryDirectory(prefix="iddpm-ray-") as scratch, ThreadPoolExecutor(1) as thread:
        trainer = TorchTrainer(
            functools.partial(_work, body, config, str(Path.cwd()), flag),  # type: ignore[arg-type]
            scaling_config=ScalingConfig(
                num_workers=(config.min_workers, workers),  # type: ignore[arg-type]  # typed as Ray Train V1's
                use_gpu=use_gpu,
            ),
            # Ray requires a folder for checkpoints; none are reported to it.
            run_config=RunConfig(storage_path=scratch, failure_config=FailureConfig(max_failures=config.retries)),
            torch_config=TorchConfig(
                backend="nccl" if use_gpu else "gloo", timeout_s=int(config.timeout_s) + 60 * use_gpu
            ),
        )
        try:
            # In the main thread, fit() would replace the handler of SIGINT.
            outcome = thread.submit(trainer.fit).result().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            outcome = ray.get(flag.why.remote()) or f"after {config.retries} retries: {error}"
    if isinstance(outcome, str):
        print(f"error: {outcome}", file=sys.stderr)
        return 1
    return outcome or 0


def _stop_flag() -> Any:
    """Start an actor through which this process passes on signals to the workers, and through which a worker that
    fails permanently informs those that Ray starts next.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Flag:  # defined here, so that its process need not import this module's dependencies
        def __init__(self) -> None:
            self.event, self.waiting, self.verdict = asyncio.Event(), 0, ""

        async def set(self) -> int:
            self.event.set()
            return self.waiting

        async def wait(self) -> None:
            self.waiting += 1
            await self.event.wait()

        async def give_up(self, why: str) -> None:
            self.verdict = why

        async def why(self) -> str:
            return self.verdict

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Flag).options(num_cpus=0, scheduling_strategy=here).remote()


def _work(body: Callable[[World], int | None], config: LaunchConfig, folder: str, flag: Any) -> int | str | None:
    """Run the body on a worker, in its own thread; return its status, or why a retry cannot help."""
    import ray.train
    import ray.train.torch

    def on_signal(call: Callable[[], None]) -> None:
        signalled = flag.wait.remote().future()
        signalled.add_done_callback(lambda future: None if future.exception() else call())

    why = ray.get(flag.why.remote())
    if why:
        return why
    if Path(folder).is_dir():
        os.chdir(folder)
    context = ray.train.get_context()
    world = World(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_rank(),
        context.get_local_world_size(),
        "ray",
        pick_device("cpu", 0) if config.device == "cpu" else ray.train.torch.get_device(),
        config.timeout_s,
        on_signal,
    )
    try:
        with fail_together(world):
            return body(world)
    except PermanentError as error:
        ray.get(flag.give_up.remote(str(error)))  # Ray would retry if others were killed before they know
        return str(error)
    except RankFailure as failure:
        if failure.self_reported:  # that rank itself tells Ray whether to try again
            return str(failure)
        raise


def report(step: int, values: dict[str, Any]) -> None:
    """Report a log line to Ray Train; every worker must call this."""
    import ray.train

    ray.train.report({"step": step, **values})
