"""Bits/dim of trained models over many images: sampled or exact, on any number of ranks, resumable.

Images, timesteps and noise depend only on the seed and the image. Results are therefore the same for any number of
ranks, and several models are compared on the same draws: the standard error of their difference is a paired one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm.bounds import Count, Limit, check_bounds
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
from pipeline.data.stream import permutation
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.evaluation.resumable import Block, Blocks
from pipeline.model import Trained, autocast, from_uint8
from pipeline.storage.store import Store

PILOT_IMAGES = 16


PATH_GRID = 256  # candidate timesteps of the best path; the number of step costs is its square


LEAST_IMAGES = 64  # before --target-se may stop: with fewer, the standard error is often underestimated


Read = Callable[[np.ndarray], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class NllPlan:
    """What to measure, apart from the models."""

    images: Count
    seed: int = 0
    exact: bool = False
    draws: Count = 16
    target_se: Limit | None = None
    chain: str | None = None
    """None: all T timesteps. "25": 25 of them, evenly spaced. "best25": the best 25."""
    images_per_call: Count = 16
    timesteps_per_call: Count = 32

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)
        count = (self.chain or "1").removeprefix("best")
        if not count.isdecimal() or int(count) < 1:
            raise InputError(f"--chain: got {self.chain!r}, expected a number of steps, such as 25 or best25")
        if self.best and not 2 <= int(count) <= PATH_GRID:
            raise InputError(f"--chain: got {self.chain!r}, expected best2 to best{PATH_GRID}")

    @property
    def best(self) -> bool:
        """Whether the chain consists of the best steps."""
        return bool(self.chain and self.chain.startswith("best"))

    def steps(self, timesteps: int) -> int:
        """Return the length of the chain for a model with T timesteps."""
        return int((self.chain or str(timesteps)).removeprefix("best"))

    def check(self, timesteps: int) -> None:
        """Raise InputError if a model with T timesteps has no such chain."""
        if self.steps(timesteps) > timesteps:
            raise InputError(f"--chain: got {self.chain}, expected at most the run's {timesteps} timesteps")

    @property
    def name(self) -> str:
        """Name of the metric; the bound of a shorter chain is another quantity."""
        if self.chain is None:
            return "nll"
        return f"nll_{self.chain}" if self.best else f"nll_strided{self.chain}"

    @property
    def estimator(self) -> str:
        return "exact" if self.exact or self.chain else f"sampled{self.draws}"

    def evaluations(self, timesteps: int) -> int:
        """Return the maximum number of network evaluations of one image for a model with T timesteps.

        --target-se may need fewer.
        """
        if not (self.exact or self.chain):
            return self.images * (self.draws + 1) + PILOT_IMAGES * len(pilot_timesteps(timesteps))
        return self.images * self.steps(timesteps) + (PATH_GRID * PILOT_IMAGES if self.best else 0)


@dataclass(frozen=True)
class Nll:
    """Bits/dim of the same N images under each of M models, and their parts."""

    total: Tensor
    """[M, N] float64: each image's bound."""
    prior: Tensor
    """[M]: mean of L_T."""
    decoder: Tensor
    """[M]: mean of L_0."""
    vb: Tensor | None
    """[M, T]: mean of each timestep's term, the first being the decoder's; None if they are sampled."""
    mse: Tensor | None
    """[M, T]: mean squared error of the predicted noise at each timestep; None if they are sampled."""
    timesteps: list[int]
    """Timesteps of the full chain that make up the measured chain."""
    evaluations: int
    """Network evaluations of one image, for each model."""

    def mean(self, model: int = 0) -> float:
        return self.total[model].mean().item()

    def standard_error(self, model: int = 0) -> float:
        """Return the standard error of the mean, over images and draws."""
        return _standard_error(self.total[model])

    @property
    def difference(self) -> tuple[float, float]:
        """The first model's mean minus the second's, and its paired standard error."""
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
    """Measure the bound on a random selection of the images 0 .. num_samples-1, which `read` loads.

    The result is the same on every rank. The order is random and depends on the seed, so stopping early at a standard
    error favours no images. Partial results go to `store` under a name derived from `identity` (of
    models and data) and the plan; the same call resumes from them.
    """
    diffusions = {m.config.diffusion for m in models}
    if len({d.timesteps for d in diffusions}) > 1:
        raise InputError("--against: the models differ in --diffusion.timesteps, so they share no timesteps to pair")
    n, size = min(plan.images, num_samples), plan.images_per_call
    ids = permutation(num_samples, "evaluation", plan.seed)[:n]
    blocks = Blocks(world, store, "nll", (identity, plan.__dict__, num_samples))
    blocks.extend(1, lambda _: _prepare(models, plan, read, ids, world.device))  # on rank 0
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
    """Whether the standard error of the mean, or of each difference from the first model, has reached the target."""
    if target_se is None or not blocks:
        return False
    total = _totals(blocks)
    wanted = total if len(total) == 1 else total[:1] - total[1:]
    return total.shape[1] >= LEAST_IMAGES and all(_standard_error(row) <= target_se for row in wanted)


class _Measure:
    """Measures one block of images under each model: their totals [M, n], and the sums over images of all parts."""

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
    """Return the model's input images, its labels, and a function noise(indices or None for all, t)."""
    x = from_uint8(images.to(device), model.dtype)
    y = labels.to(device) if model.config.model.num_classes is not None else None
    index = index.to(device)

    def noise(i: Tensor | None, t: Tensor | int) -> Tensor:
        number = (index if i is None else index[i]) * diffusion.num_timesteps + t
        return normal(stream_key(seed, stream), number, x.shape[1:]).to(x.dtype)

    return x, y, noise


def _prepare(models: Sequence[Trained], plan: NllPlan, read: Read, ids: np.ndarray, device: torch.device) -> Block:
    """Fix the chain, and the distribution of sampled timesteps, before the measurement.

    Both come from a few of the images with separate noise; the estimate is unbiased for any distribution.
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
