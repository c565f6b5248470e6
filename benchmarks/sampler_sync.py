"""Measure the cost of synchronising the importance sampler across ranks: `python -m benchmarks.sampler_sync`.

Two workers on this machine run the same training steps with three timestep samplers: uniform, which synchronises
nothing; this project's, with one collective of losses that overlaps the backward pass; and the original algorithm, with
three all_gathers, a host read of every element and a history updated one element at a time.
"""

import statistics
import time
from collections import Counter
from dataclasses import replace
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ranks import Steps, on_ranks
from benchmarks.table import Row, in_turns, show
from pipeline.config import TrainConfig
from pipeline.distributed.world import World
from pipeline.presets import DIGITS

TIMESTEPS = 20
"""Few, so that the history fills within some steps and the sampler is measured after its warm-up."""
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_single", "broadcast")
HOST_READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)


class Original:
    """The original sampler: every rank draws its own timesteps, then all exchange timesteps and losses."""

    needs_losses = True

    def __init__(self, num_timesteps: int, history: int = 10, uniform_prob: float = 0.001) -> None:
        self.num_timesteps, self.slots, self.uniform_prob = num_timesteps, history, uniform_prob
        self.history = torch.zeros(num_timesteps, history, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        if (self.counts == self.slots).all():
            p = self.history.square().mean(1).sqrt()
            p = p / p.sum() * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps
        t = torch.searchsorted(p.cumsum(0), u).clamp(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update_with_local_losses(self, t: Tensor, losses: Tensor) -> None:
        """Do three all_gathers, batch sizes first, then one host read per size, timestep and loss."""
        size = dist.get_world_size()
        batch_sizes = [torch.tensor([0], dtype=torch.int32) for _ in range(size)]
        dist.all_gather(batch_sizes, torch.tensor([len(t)], dtype=torch.int32))
        sizes = [int(x.item()) for x in batch_sizes]
        longest = max(sizes)
        all_t = [torch.zeros(longest, dtype=t.dtype) for _ in sizes]
        all_losses = [torch.zeros(longest, dtype=losses.dtype) for _ in sizes]
        dist.all_gather(all_t, torch.nn.functional.pad(t, (0, longest - len(t))))
        dist.all_gather(all_losses, torch.nn.functional.pad(losses, (0, longest - len(losses))))
        timesteps = [x.item() for row, n in zip(all_t, sizes, strict=True) for x in row[:n]]
        values = [x.item() for row, n in zip(all_losses, sizes, strict=True) for x in row[:n]]
        for timestep, loss in zip(timesteps, values, strict=True):
            if self.counts[timestep] == self.slots:  # shift out the oldest
                self.history[timestep, :-1] = self.history[timestep, 1:].clone()
                self.history[timestep, -1] = loss
            else:
                self.history[timestep, self.counts[timestep]] = loss
                self.counts[timestep] += 1


class Count(TorchDispatchMode):
    """Counts host reads, which wait for the device, and collectives between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in HOST_READS:
            self.seen["host reads"] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> "Count":
        self.originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in self.originals.items():
            setattr(dist, name, self._counted(function))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for name, function in self.originals.items():
            setattr(dist, name, function)
        super().__exit__(*error)

    def _counted(self, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.seen["collectives"] += 1
            return function(*args, **kwargs)

        return counted


class Adapter:
    """The original sampler in this project's step: losses are exchanged after the step, not during it."""

    needs_losses = True

    def __init__(self, original: Original, world: World, batch_size: int) -> None:
        self.original, self.share = original, slice(*world.share(batch_size))

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        self.t, self.weights = self.original.sample(u)
        return self.t, self.weights

    def update(self, t: Tensor, losses: Tensor) -> None:
        self.original.update_with_local_losses(t[self.share], losses[self.share])

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class LocalGather:
    """Replaces the project's gather when measuring the original: sends nothing."""

    def __init__(self, share: Tensor, lo: int, n: int) -> None:
        self.whole = share.new_zeros(n)
        self.whole[lo : lo + len(share)] = share

    def wait(self) -> Tensor:
        return self.whole


class NoGather:
    """A world whose `start_gather` sends nothing, because the original has its own collectives."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(self.world, name)

    def start_gather(self, share: Tensor, n: int) -> LocalGather:
        return LocalGather(share, self.world.share(n)[0], n)


def original(config: TrainConfig, world: World) -> Steps:
    """Return this project's step with the original sampler."""
    steps = Steps(config, NoGather(world))  # type: ignore[arg-type]
    steps.state.sampler = Adapter(Original(TIMESTEPS), world, config.batch_size)  # type: ignore[assignment]
    return steps


def work(world: World, steps: int, batch_size: int) -> dict[str, Any]:
    """Return, per sampler, the seconds of each step, the seconds of an update, and the counts of a step."""
    config = replace(
        DIGITS, batch_size=batch_size, diffusion=replace(DIGITS.diffusion, timesteps=TIMESTEPS), sample_steps=5
    )
    importance = replace(config, timestep_sampler="loss-second-moment")
    runs = {
        "uniform": Steps(config, world),
        "this project": Steps(importance, world),
        "the original": original(importance, world),
    }
    for run in runs.values():
        for _ in range(-(-12 * TIMESTEPS * 4 // batch_size)):  # until the histories are full
            run.step()
    seconds = in_turns({name: run.step for name, run in runs.items()}, steps)
    update = {}
    for name in ("this project", "the original"):
        sampler = runs[name].state.sampler
        t = torch.randint(0, TIMESTEPS, (batch_size,))
        losses = torch.rand(batch_size)
        start = time.perf_counter()
        for _ in range(steps):
            if name == "this project":
                lo, hi = world.share(batch_size)
                losses = world.start_gather(losses[lo:hi], batch_size).wait()
            sampler.update(t, losses)  # type: ignore[union-attr]
        update[name] = (time.perf_counter() - start) / steps
    counts = {}
    for name, run in runs.items():
        with Count() as count:
            run.step()
        counts[name] = count.seen
    return {"seconds": seconds, "update": update, "counts": counts}


def rows(
    steps: Annotated[int, tyro.conf.arg(help="Measured steps per sampler.")] = 60,
    batch_size: Annotated[int, tyro.conf.arg(help="Images per step over both workers.")] = 128,
) -> list[Row]:
    result = on_ranks(2, work, steps, batch_size)
    step = statistics.median(result["seconds"]["uniform"])
    ours, theirs = result["update"]["this project"], result["update"]["the original"]

    def per_step(name: str) -> str:
        counts = result["counts"][name]
        return f"{counts.get('collectives', 0)} collectives, {counts.get('host reads', 0)} host reads"

    return [
        Row("sampler sync per step", f"{ours * 1e3:.2f} ms", f"step {step * 1e3:.0f} ms", ours / step, 0.01, True),
        Row("sampler sync", f"{ours * 1e3:.2f} ms", f"the original's {theirs * 1e3:.2f} ms", theirs / ours, 1.0),
        Row(
            "host reads per step",
            per_step("this project"),
            per_step("the original"),
            result["counts"]["this project"].get("host reads", 0),
            0.0,
            True,
        ),
    ]


if __name__ == "__main__":
    print(show(tyro.cli(rows, description=__doc__)))
