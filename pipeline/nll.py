"""Bits/dim of trained models over many images: sampled or exact, on any number of ranks, resumable.

Images, timesteps and noise depend on the seed and the image alone. So every world measures the same numbers, and
several models are measured on the same ones: the standard error of their difference is that of paired samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm.config import DiffusionConfig
from iddpm.diffusion import Diffusion
from iddpm.likelihood import (
    best_path,
    exact_bpd,
    jump_costs,
    pilot_distribution,
    pilot_sizes,
    pilot_timesteps,
    sampled_bpd,
)
from iddpm.noise import normal, stream_key, uniform
from iddpm.schedule import respace
from pipeline.blocks import Block, Blocks
from pipeline.data import permutation
from pipeline.sample import Trained, autocast
from pipeline.storage import Store
from pipeline.world import World

PILOT_IMAGES = 16
PATH_GRID = 256  # timesteps that the best path chooses from: the number of its steps' costs is the square
LEAST_IMAGES = 64  # before --target-se may stop: a standard error from fewer is too often too small

Read = Callable[[np.ndarray], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class NllPlan:
    """What is measured, but for the models."""

    images: int
    seed: int = 0
    exact: bool = False
    draws: int = 16
    target_se: float | None = None
    chain: str | None = None
    """None: all T timesteps. "25": 25 of them, evenly spaced. "best25": the best 25."""
    images_per_call: int = 16
    timesteps_per_call: int = 32

    def __post_init__(self) -> None:
        count = (self.chain or "1").removeprefix("best")
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"--chain: got {self.chain!r}, expected a number of steps, as in 25, or best25")
        if self.best and not 2 <= int(count) <= PATH_GRID:
            raise ValueError(f"--chain: got {self.chain!r}, expected best2 to best{PATH_GRID}")
        if self.target_se is not None and not self.target_se > 0:
            raise ValueError(f"--target-se: got {self.target_se}, expected bits/dim above 0")
        if self.draws < 1:
            raise ValueError(f"--draws: got {self.draws}, expected 1 or more")

    @property
    def best(self) -> bool:
        """Whether the chain is of the best steps."""
        return bool(self.chain and self.chain.startswith("best"))

    def steps(self, timesteps: int) -> int:
        """Of the chain, for a model of T timesteps."""
        return int((self.chain or str(timesteps)).removeprefix("best"))

    def check(self, timesteps: int) -> None:
        """ValueError where a model of T timesteps has no such chain."""
        if self.steps(timesteps) > timesteps:
            raise ValueError(f"--chain: got {self.chain}, but the run has {timesteps} timesteps")

    @property
    def name(self) -> str:
        """Of the metric: the bound of a shorter chain is another quantity."""
        if self.chain is None:
            return "nll"
        return f"nll_{self.chain}" if self.best else f"nll_strided{self.chain}"

    @property
    def estimator(self) -> str:
        return "exact" if self.exact or self.chain else f"sampled{self.draws}"

    def evaluations(self, timesteps: int) -> int:
        """Of the network, on one image, for a model of T timesteps: at most, since --target-se may stop before."""
        if not (self.exact or self.chain):
            return self.images * (self.draws + 1) + PILOT_IMAGES * len(pilot_timesteps(timesteps))
        return self.images * self.steps(timesteps) + (PATH_GRID * PILOT_IMAGES if self.best else 0)


@dataclass(frozen=True)
class Nll:
    """Bits/dim of the same N images by each of M models, and what they are made of."""

    total: Tensor
    """[M, N] float64: the bound of each image."""
    prior: Tensor
    """[M]: the mean of L_T."""
    decoder: Tensor
    """[M]: the mean of L_0."""
    vb: Tensor | None
    """[M, T]: the mean of each timestep's term, the first being the decoder's; None where they are sampled."""
    mse: Tensor | None
    """[M, T]: the mean squared error of the noise predicted at each timestep."""
    timesteps: list[int]
    """Of the full chain, that the bound is a chain of."""
    evaluations: int
    """Of the network, on one image, for each model."""

    def mean(self, model: int = 0) -> float:
        return self.total[model].mean().item()

    def standard_error(self, model: int = 0) -> float:
        """Of the mean, over images and draws."""
        return _standard_error(self.total[model])

    @property
    def difference(self) -> tuple[float, float]:
        """The first model's mean minus the second's, and its standard error, of paired images."""
        paired = self.total[0] - self.total[1]
        return paired.mean().item(), _standard_error(paired)


def _standard_error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def measure_nll(
    models: Sequence[Trained],
    plan: NllPlan,
    read: Read,
    num_samples: int,
    world: World,
    *,
    store: Store | None = None,
    identity: object = None,
    progress: bool = False,
) -> Nll:
    """The bound, on every rank alike, of a random choice of the images 0 .. num_samples-1, which `read` gives.

    The order is random and depends on the seed, so that stopping early at a standard error is fair. Partial results
    go to `store` under a name made from `identity` (of models and data) and the plan; the same call goes on there.
    """
    diffusions = {m.config.diffusion for m in models}
    if len({d.timesteps for d in diffusions}) > 1:
        raise ValueError("--against: the models differ in --diffusion.timesteps, so they share no timesteps to pair")
    n, size = min(plan.images, num_samples), plan.images_per_call
    ids = permutation(num_samples, "evaluation", plan.seed)[:n]
    blocks = Blocks(world, store, "nll", (identity, plan.__dict__, num_samples))
    blocks.extend(1, lambda _: _prepare(models, plan, read, ids, world.device))  # by rank 0
    frozen: Block = world.broadcast_object(blocks.found[0] if world.rank == 0 else None)
    measure = _Measure(models, plan, read, frozen, world.device)
    blocks.extend(
        1 + math.ceil(n / size),
        lambda i: measure(ids[(i - 1) * size : i * size]),
        lambda found: _precise(found[1:], plan.target_se),
        plan.name if progress else None,
    )
    total, sums = world.broadcast_object(
        (_totals(blocks.found[1:]), sum(block["sums"] for block in blocks.found[1:])) if world.rank == 0 else None
    )
    count, terms = total.shape[1], measure.terms
    parts = (sums / count).view(len(models), -1)
    return Nll(
        total,
        parts[:, 0],
        parts[:, 1],
        parts[:, 2 : 2 + terms] if terms else None,
        parts[:, 2 + terms :] if terms else None,
        measure.timesteps,
        count * (terms or plan.draws + 1) + int(frozen["evaluations"]),
    )


def _totals(blocks: list[Block]) -> Tensor:
    """[M, N]"""
    return torch.cat([block["total"] for block in blocks], dim=1)


def _precise(blocks: list[Block], target_se: float | None) -> bool:
    """Whether the standard error of each model's mean, and of a difference, is what was wanted."""
    if target_se is None or not blocks:
        return False
    total = _totals(blocks)
    wanted = total if len(total) == 1 else total[:1] - total[1:]
    return total.shape[1] >= LEAST_IMAGES and all(_standard_error(row) <= target_se for row in wanted)


class _Measure:
    """Measures one block of images by each model: their totals [M, n], and the sums over them of all parts."""

    def __init__(
        self, models: Sequence[Trained], plan: NllPlan, read: Read, frozen: Block, device: torch.device
    ) -> None:
        self.models, self.plan, self.read, self.device = models, plan, read, device
        self.timesteps: list[int] = frozen["timesteps"].tolist()
        keep = self.timesteps if plan.chain else None
        self.diffusions = [Diffusion(m.config.diffusion, keep, device) for m in models]
        self.exact = plan.exact or plan.chain is not None or len(self.timesteps) < 2
        self.terms = len(self.timesteps) if self.exact else 0
        self.probabilities = frozen["probabilities"]

    def __call__(self, ids: np.ndarray) -> Block:
        images, labels = self.read(ids)
        index = torch.from_numpy(ids)
        found = []
        for model, diffusion in zip(self.models, self.diffusions, strict=True):
            x, y, noise = _inputs(model, diffusion, images, labels, index, self.plan.seed, "nll", self.device)
            with autocast(self.device, model.config.precision):
                if self.exact:
                    every, per_call = partial(noise, None), self.plan.timesteps_per_call
                    bpd = exact_bpd(diffusion, model.model, x, every, y, timesteps_per_call=per_call)
                    columns = [bpd.prior[:, None], bpd.vb[:, :1], bpd.vb, bpd.mse]
                    total = bpd.total.double()
                else:
                    u = uniform(stream_key(self.plan.seed, "nll", "u"), index)
                    sampled = sampled_bpd(diffusion, model.model, x, noise, u, self.probabilities, self.plan.draws, y)
                    columns = [sampled.prior[:, None], sampled.decoder[:, None]]
                    total = sampled.total
            found.append((total.cpu(), torch.cat(columns, dim=1).double().sum(0).cpu()))
        return {"total": torch.stack([total for total, _ in found]), "sums": torch.cat([parts for _, parts in found])}


def _inputs(
    model: Trained,
    diffusion: Diffusion,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    seed: int,
    stream: str,
    device: torch.device,
) -> tuple[Tensor, Tensor | None, Callable[[Tensor | None, Tensor | int], Tensor]]:
    """Images as the model takes them, its labels, and noise(which of them or None for all, t)."""
    x = images.to(device).to(model.dtype) / 127.5 - 1
    y = labels.to(device) if model.config.model.num_classes is not None else None
    index = index.to(device)

    def noise(i: Tensor | None, t: Tensor | int) -> Tensor:
        number = (index if i is None else index[i]) * diffusion.num_timesteps + t
        return normal(stream_key(seed, stream), number, x.shape[1:]).to(x.dtype)

    return x, y, noise


def _prepare(models: Sequence[Trained], plan: NllPlan, read: Read, ids: np.ndarray, device: torch.device) -> Block:
    """What is fixed before the measurement: the chain, and the distribution of sampled timesteps.

    From a few of the images with noise of their own: whatever the distribution, the estimate is unbiased.
    """
    config = models[0].config.diffusion
    ids = ids[:PILOT_IMAGES]
    images, labels = read(ids)

    def inputs(model: Trained, diffusion: Diffusion) -> Any:
        return _inputs(model, diffusion, images, labels, torch.from_numpy(ids), plan.seed, "pilot", device)

    timesteps, evaluations = list(range(config.timesteps)), 0
    probabilities = torch.zeros(0, dtype=torch.float64)
    if plan.chain:
        plan.check(config.timesteps)
        if plan.best:
            timesteps = _best_timesteps(models[0], config, plan.steps(config.timesteps), inputs, device)
            evaluations = min(PATH_GRID, config.timesteps) * len(ids)
        else:
            timesteps = respace(config.timesteps, plan.chain)
    elif not plan.exact and config.timesteps > 1:
        squares = []
        for model in models:
            diffusion = Diffusion(model.config.diffusion, device=device)
            x, y, noise = inputs(model, diffusion)
            with autocast(device, model.config.precision):
                squares.append(pilot_sizes(diffusion, model.model, x, partial(noise, None), y).square())
        probabilities = pilot_distribution(torch.stack(squares).mean(0).sqrt())
        evaluations = len(pilot_timesteps(config.timesteps)) * len(ids)
    numbers = {"timesteps": torch.tensor(timesteps), "evaluations": torch.tensor(evaluations)}
    return {**numbers, "probabilities": probabilities}


def _best_timesteps(
    model: Trained, config: DiffusionConfig, count: int, inputs: Callable[..., Any], device: torch.device
) -> list[int]:
    grid = respace(config.timesteps, str(min(PATH_GRID, config.timesteps)))
    diffusion = Diffusion(config, grid, device)
    x, y, noise = inputs(model, diffusion)
    with autocast(device, model.config.precision):
        costs = jump_costs(diffusion, model.model, x, partial(noise, None), y)
    return [grid[i] for i in best_path(costs, count)]
