"""Predict the duration of a training step on 8 to 1,024 GPUs, and test the same formulas on this machine with 1, 2 and
4 processes that train the digits: `python -m benchmarks.scaling`. docs/scaling.md derives the formulas.
"""

import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
import tyro

from benchmarks.ranks import Steps, on_ranks
from benchmarks.table import Row, here, in_turns, show
from iddpm.flops import count_parameters, train_flops
from jobs.study.plan import HARDWARE
from pipeline.config import TrainConfig
from pipeline.distributed.world import World
from pipeline.presets import DIGITS, study_width

RANKS = (1, 8, 16, 64, 256, 1024)
BUCKET = 25 * 2**20
"""Bytes of gradients per DistributedDataParallel bucket."""
CALLS = 4655
"""PyTorch operations in one step of the papers' network, its optimizer and moving average; see docs/scaling.md."""
SHARD_BYTES = 12800 + 3 * 512
"""Bytes of a raw 64x64 image: pixels and label in a tar."""


@dataclass(frozen=True)
class Machine:
    """A cluster as the model sees it, from an H100's data sheet and assumptions; in seconds and bytes per second."""

    peak: float = HARDWARE["h100"][0]["bf16"]
    """FLOP/s per GPU."""
    utilisation: float = 0.3
    """Fraction of the peak that a large local batch reaches."""
    launches: float = CALLS * 7e-6
    """Time per step, independent of the batch, in which Python and PyTorch launch all kernels."""
    per_node: int = 8
    """GPUs per node."""
    nvlink: float = 360e9
    """Bandwidth out of each GPU in a ring through the GPUs of a node."""
    network: float = 8 * 46e9
    """Bandwidth out of a node."""
    nccl_hop: float = 5e-6
    """Latency of a small message between GPUs."""
    tcp_hop: float = 10e-6
    """Latency of a small gloo message between processes on a node."""
    tcp_node_hop: float = 40e-6
    """Latency of a small gloo message between nodes."""
    loader: float = 1e5
    """Images per second that a process reads from its node's cache."""
    store: float = 500e6
    """Bandwidth from the object store to a node's cache."""
    snapshot: float = 0.13e-9
    """Time for which a checkpoint blocks training, per byte."""
    upload: float = 300e6
    """Bandwidth of a checkpoint to the object store."""


class Work(NamedTuple):
    """A run as the model sees it."""

    parameters: int
    flops: int
    """Training FLOPs per image."""
    batch: int
    log_every: float
    checkpoint_every: float


def work_of(config: TrainConfig) -> Work:
    size, flops = (count(config.model, config.out_channels) for count in (count_parameters, train_flops))
    return Work(size, flops, config.batch_size, config.log_every, config.checkpoint_every)


def step(work: Work, m: Machine, n: int) -> dict[str, float]:
    """Return the seconds that each part adds to a step on n GPUs; overlapped parts add nothing."""
    share = -(-work.batch // n)
    nodes = -(-n // m.per_node)
    link = m.nvlink if nodes == 1 else min(m.nvlink, m.network)

    def all_reduce(size: float) -> float:
        latency = 2 * math.log2(n) * m.nccl_hop
        return 2 * (n - 1) / n * size / link + math.ceil(size / BUCKET) * latency if n > 1 else 0.0

    parts = {"arithmetic": share * work.flops / (m.peak * m.utilisation), "launches": m.launches}
    backward = 2 / 3 * sum(parts.values())
    gradients = 4 * work.parameters
    last = min(gradients, BUCKET)  # ready when the backward pass ends
    parts["gradients"] = max(0.0, all_reduce(gradients - last) - backward) + all_reduce(last)
    losses = 4 * work.batch / link + (n - 1) * m.nccl_hop
    parts["losses"] = max(0.0, losses - backward)
    # Two passes around gloo's ring, reduce and broadcast: for the stop flag at each step, and once per log line.
    flag = 2 * ((n - nodes) * m.tcp_hop + (nodes - 1) * m.tcp_node_hop)
    parts["control"] = max(0.0, flag - sum(parts.values())) + flag / work.log_every
    parts["loader"] = max(0.0, share / m.loader - sum(parts.values()))
    parts["checkpoints"] = 16 * work.parameters * m.snapshot / work.checkpoint_every
    return parts


# ----------------------------------------------------------------------------------------- prediction


def paper(m: Machine) -> str:
    """Return Markdown tables of steps (milliseconds, fraction of arithmetic, largest part) and of traffic."""
    lines = [
        f"| C | batch | {' | '.join(map(str, RANKS))} | first epoch |",
        f"|---|---|{'---|' * (len(RANKS) + 1)}",
    ]
    traffic = [
        "| C | parameters | FLOPs per image | gradients | reduced on 8 | on 1024 | checkpoint | stall | upload |",
        f"|{'---|' * 9}",
    ]
    for channels in (64, 96, 128, 192):
        for batch in (128, 2048):
            work = work_of(replace(study_width(channels), batch_size=batch))
            cells = [_cell(step(work, m, n)) if n <= batch else "-" for n in RANKS]
            least = f"{1e3 * batch * SHARD_BYTES / m.store:.0f}"
            lines.append(f"| {' | '.join([str(channels), str(batch), *cells, least])} |")
        one, many = (2 * (n - 1) / n * 4 * work.parameters / link for n, link in ((8, m.nvlink), (1024, m.network)))
        size = 16 * work.parameters
        traffic.append(
            f"| {channels} | {work.parameters / 1e6:.0f}M | {work.flops / 1e9:.0f}G | {4e-6 * work.parameters:.0f} MB"
            f" | {1e3 * one:.1f} ms | {1e3 * many:.1f} ms"
            f" | {size / 1e9:.2f} GB | {m.snapshot * size:.2f} s | {size / m.upload:.0f} s |"
        )
    return "\n".join([*lines, "", *traffic])


def _cell(parts: dict[str, float]) -> str:
    total = sum(parts.values())
    return f"{1e3 * total:.0f}, {parts['arithmetic'] / total:.0%}, {max(parts, key=lambda name: parts[name])}"


# ---------------------------------------------------------------------------------------- measurement


def measure(world: World, config: TrainConfig, small: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of the model's constants and of a step of all processes, measured alternately."""
    ways: dict[str, Callable[[], object]] = {}
    for batch in (small, config.batch_size):
        alone = Steps(replace(config, batch_size=batch), World()) if world.rank == 0 else None

        def one(alone: Steps | None = alone) -> None:
            if alone:
                alone.step()
            world.broadcast_object(None)  # the others wait

        ways[f"{batch} alone"] = one
    together = Steps(config, world)
    floats = torch.zeros(sum(p.numel() for p in together.state.params.values()))

    def whole() -> None:
        world.stop_agreed()
        together.step()

    ways |= {"all-reduce": lambda: world.sum_(floats), "flag": world.stop_agreed, "step": whole}
    return {name: statistics.median(seconds) for name, seconds in in_turns(ways, rounds).items()}


def rows(rounds: int = 40) -> list[Row]:
    config = replace(DIGITS, timestep_sampler="loss-second-moment")  # uses all of a step's collectives
    work = work_of(config)._replace(log_every=math.inf, checkpoint_every=math.inf)
    found, small = [], config.batch_size // 4
    for n in (1, 2, 4):
        seconds = on_ranks(n, measure, config, small, rounds)
        image = (seconds[f"{config.batch_size} alone"] - seconds[f"{small} alone"]) / (config.batch_size - small)
        crowd = max(1.0, n / (os.cpu_count() or 1))  # processes per core
        machine = Machine(
            peak=work.flops / (image * crowd),
            utilisation=1.0,
            launches=(seconds[f"{small} alone"] - small * image) * crowd,
            per_node=n,
            nvlink=2 * (n - 1) / n * 4 * work.parameters / seconds["all-reduce"] if n > 1 else math.inf,
            nccl_hop=0.0,
            tcp_hop=seconds["flag"] / (2 * max(1, n - 1)),
        )
        parts = step(work, machine, n)
        predicted, measured = sum(parts.values()), seconds["step"]
        against = f"predicted {1e3 * predicted:.1f} ms, gradients {1e3 * parts['gradients']:.1f}"
        ratio = max(measured / predicted, predicted / measured)
        what = f"step of {n} process{'es' if n > 1 else ''}, against prediction"
        found.append(Row(what, f"{1e3 * measured:.1f} ms", against, ratio, 1.25, True))
    return found


def main(
    machine: Machine = Machine(),
    rounds: Annotated[int, tyro.conf.arg(help="Measured steps of each kind; 0: only predict.")] = 40,
) -> None:
    print(paper(machine))
    if rounds:
        print(f"\n{here()}\n\n{show(rows(rounds))}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
