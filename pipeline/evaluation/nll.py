"""Bits/dim of trained models over many images: sampled or exact, on any number of ranks, resumable.

Images, timesteps and noise depend only on the seed and the image. Results are therefore the same for any number of
ranks, and several models are compared on the same draws: the standard error of their difference is a paired one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from iddpm import likelihood
from iddpm.bounds import Count, Limit, check_bounds
from iddpm.diffusion import Diffusion
from iddpm.noise import normal, stream_key, uniform
from iddpm.schedule import respace
from pipeline.data.order import permutation
from pipeline.data.stream import Reader
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.evaluation.resumable import Block, Blocks
from pipeline.model import Trained, autocast, from_uint8
from pipeline.storage.store import Store

T = TypeVar("T")


Noise = Callable[[Tensor | slice, Tensor | int], Tensor]


PILOT_IMAGES = 16


PATH_GRID = 256  # candidate timesteps of the best path; the number of step costs is its square


LEAST_IMAGES = 64  # before --target-se may stop: with fewer, the standard error is often underestimated


@dataclass(frozen=True)
class NllPlan:
    """How to measure bits/dim, apart from the models and the seed."""

    images: Count = 1024
    """nll: maximum number of images, chosen at random from the split."""
    split: str = "val"
    """nll: split to evaluate on."""
    exact: bool = False
    """nll: compute all T terms of the bound, with T network evaluations per image, instead of sampling them."""
    draws: Count = 16
    """nll: timesteps to draw per image."""
    target_se: Limit | None = None
    """nll: stop once the standard error (with --against, of the difference) is this small, in bits/dim."""
    chain: str | None = None
    """nll: bound of a chain of this many evenly spaced steps, e.g. 25, or of the best steps, by dynamic programming,
    e.g. best25. These are other quantities, named nll_strided25 and nll_best25."""
    images_per_call: Count = 16
    """nll: images per forward pass, each at draws + 1 timesteps, or with --exact at `timesteps_per_call`."""
    timesteps_per_call: Count = 32
    """nll: timesteps of each image per forward pass with --exact."""

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

    @property
    def all_terms(self) -> bool:
        """Whether all terms of the chain are computed, instead of sampled ones."""
        return self.exact or self.chain is not None

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
        return "exact" if self.all_terms else f"sampled{self.draws}"

    def evaluations(self, timesteps: int) -> int:
        """Return the maximum number of network evaluations of one image for a model with T timesteps.

        --target-se may need fewer.
        """
        if not self.all_terms:
            return self.images * (self.draws + 1) + PILOT_IMAGES * len(likelihood.pilot_timesteps(timesteps))
        pilot = PATH_GRID * PILOT_IMAGES if self.best else 0
        return self.images * self.steps(timesteps) + pilot


@dataclass(frozen=True)
class Nll:
    """Bits/dim of the same N images under each of M models, and their parts."""

    total: Tensor
    """[M, N] float64: each image's bound."""
    prior: Tensor
    """[M]: mean of L_T."""
    decoder: Tensor
    """[M]: mean of L_0."""
    vb: Tensor
    """[M, T]: mean of each timestep's term, the first being the decoder's; [M, 0] if they are sampled."""
    mse: Tensor
    """[M, T]: mean squared error of the predicted noise at each timestep; [M, 0] if they are sampled."""
    timesteps: list[int]
    """Timesteps of the full chain that make up the measured chain."""
    evaluations: int
    """Network evaluations of one image, for each model."""

    def mean(self, model: int = 0) -> float:
        return self.total[model].mean().item()

    def standard_error(self, model: int = 0) -> float | None:
        """Return the standard error of the mean, over images and draws; None for a single image."""
        return _standard_error(self.total[model])

    @property
    def difference(self) -> tuple[float, float | None]:
        """The first model's mean minus the second's, and its paired standard error."""
        paired = self.total[0] - self.total[1]
        return paired.mean().item(), _standard_error(paired)

    def summary(self) -> str:
        """Return the total of each model, and its parts, as lines of text."""
        images, steps = self.total.shape[1], len(self.timesteps)
        terms = self.vb.shape[1]  # 0 if they are sampled
        edges = sorted({1, *(round(terms * quarter / 4) for quarter in (1, 2, 3, 4))}) if terms else []
        lines = []
        for i in range(len(self.total)):
            error = self.standard_error(i)
            spread = "" if error is None else f" +- {error:.4f} (standard error over {images} images)"
            lines += [
                f"bits/dim  {self.mean(i):.4f}{spread}",
                f"  prior       L_T    {self.prior[i]:.6f}",
                f"  decoder     L_0    {self.decoder[i]:.4f}",
            ]
            for lo, hi in pairwise(edges):
                label = f"t = {self.timesteps[lo]}..{self.timesteps[hi - 1]}"
                vb, mse = self.vb[i, lo:hi].sum(), self.mse[i, lo:hi].mean()
                lines.append(f"  {label:18s} {vb:.4f}   (noise mse {mse:.4f})")
        saved = "" if terms else f", {images * steps / self.evaluations:.0f} times fewer than all"
        return "\n".join([*lines, f"  {self.evaluations:,} network evaluations{saved}"])


def _standard_error(values: Tensor) -> float | None:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def measure_nll(
    models: Sequence[Trained], plan: NllPlan, reader: Reader, world: World, seed: int = 0, store: Store | None = None
) -> Nll:
    """Measure the bound on a random selection of the reader's images.

    The result is the same on every rank. The order is random and depends on the seed, so stopping early at a standard
    error favours no images. With a `store`, progress is shown, and partial results are saved there under a name derived
    from models, data, plan and seed; the same call resumes from them.
    """
    if len({m.config.diffusion.timesteps for m in models}) > 1:
        raise InputError("--against: the models differ in --diffusion.timesteps, so they share no timesteps to pair")
    index, size = reader.index, plan.images_per_call
    ids = permutation(index.num_samples, "evaluation", seed)[: plan.images]

    # What the blocks depend on; the split is known by the digest.
    settings = {**vars(plan), "seed": seed}
    del settings["split"]
    identity = [index.digest, [m.identity for m in models]]
    blocks = Blocks(world, store, "nll", (identity, settings, index.num_samples))

    # Block 0, by rank 0 for all ranks, fixes the chain and the distribution of sampled timesteps.
    blocks.extend(1, lambda _: _pilot(models, plan, _Images(reader, ids[:PILOT_IMAGES], seed, "pilot", world.device)))
    pilot: Block = world.broadcast_object(blocks.computed[0] if world.rank == 0 else None)

    # The others hold the bounds of a few images each, until there are enough.
    measurement = _Measurement(models, plan, pilot, world.device)

    def measure(number: int) -> Block:
        start = (number - 1) * size
        return measurement.block(_Images(reader, ids[start : start + size], seed, "nll", world.device))

    def enough(computed: list[Block]) -> bool:
        return _precise(computed[1:], plan.target_se)

    blocks.extend(1 + math.ceil(len(ids) / size), measure, enough, plan.name)

    # Rank 0, which has all blocks, combines them.
    def combine() -> Nll:
        total = _totals(blocks.computed[1:])
        count, terms = total.shape[1], measurement.terms
        sums = sum((block["sums"] for block in blocks.computed[1:]), torch.tensor(0.0))
        parts = (sums / count).view(len(models), -1)
        prior, decoder, vb, mse = parts.split([1, 1, terms, terms], dim=1)
        evaluations = count * (terms or plan.draws + 1) + int(pilot["evaluations"])
        return Nll(total, prior[:, 0], decoder[:, 0], vb, mse, measurement.timesteps, evaluations)

    return world.on_rank0(combine)


def _totals(blocks: list[Block]) -> Tensor:
    """[M, N]"""
    return torch.cat([block["total"] for block in blocks], dim=1)


def _precise(blocks: list[Block], target_se: float | None) -> bool:
    """Whether the standard error of the mean, or of each difference from the first model, has reached the target."""
    if target_se is None or not blocks:
        return False
    total = _totals(blocks)
    rows = total if len(total) == 1 else total[:1] - total[1:]
    if total.shape[1] < LEAST_IMAGES:
        return False
    return all((error := _standard_error(row)) is not None and error <= target_se for row in rows)


class _Images:
    """Some images, and their noise: a function of the seed, the stream, the image's id and the timestep."""

    def __init__(self, reader: Reader, ids: np.ndarray, seed: int, stream: str, device: torch.device) -> None:
        images, labels = reader.read(ids)
        self.images, self.labels = images.to(device), labels.to(device)
        self.ids = torch.from_numpy(ids)  # on the CPU
        self.seed, self.stream, self.device = seed, stream, device

    @contextmanager
    def inputs(self, model: Trained, diffusion: Diffusion) -> Iterator[tuple[Tensor, Tensor | None, Noise]]:
        """Yield the model's input images, its labels, and the function noise(indices, t), under its autocast."""
        x = from_uint8(self.images, model.dtype)
        y = self.labels if model.config.model.num_classes is not None else None
        key, ids = stream_key(self.seed, self.stream), self.ids.to(self.device)

        def noise(i: Tensor | slice, t: Tensor | int) -> Tensor:
            return normal(key, ids[i] * diffusion.num_timesteps + t, x.shape[1:]).to(x.dtype)

        with autocast(self.device, model.config.precision):
            yield x, y, noise

    def apply(self, function: Callable[..., T], model: Trained, diffusion: Diffusion, **options: int) -> T:
        """Call a function of `iddpm.likelihood` that needs the noise of all images at a timestep."""
        with self.inputs(model, diffusion) as (x, y, noise):
            return function(diffusion, model.model, x, partial(noise, slice(None)), y, **options)


class _Measurement:
    """Measures blocks of images under each model."""

    def __init__(self, models: Sequence[Trained], plan: NllPlan, pilot: Block, device: torch.device) -> None:
        self.plan = plan
        self.timesteps: list[int] = pilot["timesteps"].tolist()
        self.probabilities = pilot["probabilities"]
        keep = self.timesteps if plan.chain else None
        self.models = [(model, Diffusion(model.config.diffusion, keep, device)) for model in models]
        self.terms = len(self.timesteps) if plan.all_terms or len(self.timesteps) < 2 else 0
        """How many are computed of each image; 0: they are sampled."""

    def block(self, images: _Images) -> Block:
        """Return the images' totals [M, n], and the sums over images of each model's prior, decoder, vb and mse."""
        totals, sums = [], []
        for model, diffusion in self.models:
            total, *parts = self._bounds(images, model, diffusion)
            totals.append(total.double().cpu())
            sums.append(torch.cat(parts, dim=1).double().sum(0).cpu())
        return {"total": torch.stack(totals), "sums": torch.cat(sums)}

    def _bounds(self, images: _Images, model: Trained, diffusion: Diffusion) -> list[Tensor]:
        """Return the images' totals [n] and their parts, each [n, terms]."""
        plan = self.plan
        # All terms, each once.
        if self.terms:
            bpd = images.apply(likelihood.exact_bpd, model, diffusion, timesteps_per_call=plan.timesteps_per_call)
            return [bpd.total, bpd.prior[:, None], bpd.vb[:, :1], bpd.vb, bpd.mse]

        # The decoder's term, and others drawn by the pilot's probabilities.
        u = uniform(stream_key(images.seed, images.stream, "u"), images.ids)
        with images.inputs(model, diffusion) as (x, y, noise):
            sampled = likelihood.sampled_bpd(diffusion, model.model, x, noise, u, self.probabilities, plan.draws, y)
        return [sampled.total, sampled.prior[:, None], sampled.decoder[:, None]]


def _pilot(models: Sequence[Trained], plan: NllPlan, images: _Images) -> Block:
    """Fix the chain, and the distribution of sampled timesteps, before the measurement.

    Both come from a few of the images with separate noise; the estimate is unbiased for any distribution.
    """
    config = models[0].config.diffusion
    count = config.timesteps
    plan.check(count)
    # All terms of the full chain need no pilot.
    timesteps, evaluations = list(range(count)), 0
    probabilities = torch.zeros(0, dtype=torch.float64)
    if plan.best:
        # The cheapest path through a grid of candidates.
        grid = respace(count, str(min(PATH_GRID, count)))
        costs = images.apply(likelihood.jump_costs, models[0], Diffusion(config, grid, images.device))
        timesteps = [grid[i] for i in likelihood.best_path(costs, plan.steps(count))]
        evaluations = len(grid) * len(images.ids)
    elif plan.chain:
        timesteps = respace(count, plan.chain)
    elif not plan.exact and count > 1:
        # Where the models' terms are large, timesteps are drawn more often.
        squares = []
        for model in models:
            diffusion = Diffusion(model.config.diffusion, device=images.device)
            squares.append(images.apply(likelihood.pilot_sizes, model, diffusion).square())
        probabilities = likelihood.pilot_distribution(torch.stack(squares).mean(0).sqrt())
        evaluations = len(likelihood.pilot_timesteps(count)) * len(images.ids)
    numbers = {"timesteps": torch.tensor(timesteps), "evaluations": torch.tensor(evaluations)}
    return {**numbers, "probabilities": probabilities}
