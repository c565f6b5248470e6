"""Ranks without a launcher: forked from a process that has loaded torch, with torchrun's variables set."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from ports import free_port

from pipeline.config import LaunchConfig, TrainConfig
from pipeline.distributed.launch import run_main
from pipeline.run.checkpoint import Checkpoints
from pipeline.storage.store import Store
from pipeline.train import run

# Every context of this kind has the one server, so this list is for all tests. Optimizers import torch._dynamo.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pipeline.loop", "pipeline.train", "pipeline.presets", "torch._dynamo", "s3fs", "pytest"])

# With the importance sampler, whose state depends on the losses of all ranks, and so few timesteps that it is
# warm after about ten steps; 10 images are not divisible by 4.
STRICT = [
    *("--precision", "fp64", "--batch-size", "10", "--horizon", "30steps", "--checkpoint-every", "10"),
    *("--sample-every", "0", "--log-every", "10", "--timestep-sampler", "loss-second-moment"),
    *("--diffusion.timesteps", "8"),
]


class Ranks:
    """Start `size` processes that run `function(*arguments)`; their output goes to files in `folder`."""

    def __init__(self, size: int, folder: Path, function: Callable[..., Any], *arguments: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        port = free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # type: ignore[dict-item]
            log = str(folder / f"rank-{rank}.log")
            process = FORKS.Process(target=_start, args=(place, log, function, arguments), daemon=True)
            process.start()
            self.processes.append(process)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()

    def signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid
        os.kill(pid, number)

    def join(self, timeout: float = 120) -> list[int | None]:
        """Return the exit statuses (negative: a signal's number); None for a process that is still running."""
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        return (self.folder / f"rank-{rank}.log").read_text()


def _start(place: dict[str, Any], log: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with open(log, "w") as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    for name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_", "PMI", "RAY_JOB"))]:
        del os.environ[name]
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    function(*arguments)


def train_on(size: int, folder: Path, config: TrainConfig) -> None:
    """Train the run to its end on this many ranks."""
    with Ranks(size, folder, train_here, config) as ranks:
        assert ranks.join() == [0] * size, "\n".join(ranks.said(rank) for rank in range(size))


def train_here(config: TrainConfig) -> None:
    """Do what `python -m pipeline.train` does on one rank."""
    run_main(lambda world: run(config, world), config.launch)


def in_world(function: Callable[..., Any], *arguments: object) -> None:
    """Call `function(world, *arguments)` in the joined world."""
    run_main(lambda world: function(world, *arguments), LaunchConfig(timeout_s=60))


def descendants(pid: int) -> list[int]:
    """Return the process ids of all descendants of a process."""
    children = [int(child) for child in read(f"/proc/{pid}/task/{pid}/children").split()]
    return children + [pid for child in children for pid in descendants(child)]


def read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # it has ended
        return ""


def newest(out: object) -> dict[str, torch.Tensor]:
    """Return every tensor of a run's newest checkpoint."""
    found = Checkpoints(Store(str(out))).load()
    assert found
    return {f"{part}/{name}": t for part, tensors in found[1].items() for name, t in tensors.items()}


def newest_step(out: object) -> int:
    steps = [r.step for r in Checkpoints(Store(str(out))).records() if r.kind == "checkpoint"]
    return max(steps, default=0)


def assert_same_run(out: object, reference: object, tolerance: float = 1e-9) -> None:
    """Assert that two runs' newest checkpoints agree, tensor by tensor and as a whole.

    Some biases precede a GroupNorm that cancels them: their gradients, and thus the biases (about 1e-12), are pure
    rounding errors, which never agree relatively. Hence the floor of a tenth, the size of typical weights.
    """
    assert newest_step(out) == newest_step(reference)
    a, b = newest(out), newest(reference)
    assert a.keys() == b.keys()
    for part in ("model", "ema", "progress"):
        names = [name for name in b if name.startswith(part)]
        wrong = sum((a[n].double() - b[n].double()).square().sum() for n in names) ** 0.5
        assert wrong <= tolerance * sum(b[n].double().square().sum() for n in names) ** 0.5, part
        for name in names:
            wrong = (a[name].double() - b[name].double()).abs().max()
            assert wrong <= tolerance * max(b[name].double().abs().max().item(), 0.1), (name, wrong)
