"""Draw the papers' figures, each with its data as CSV: `python -m jobs.figures --hybrid RUN --linear RUN ...`.

Figures of the schedules need no run; the others are drawn if their runs are given. Figure numbers are IDDPM's, unless
noted. Image quality is measured with features trained on the data itself, so its values are not FIDs.
"""

import csv
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from iddpm.config import DiffusionConfig, Schedule
from iddpm.diffusion import Diffusion
from iddpm.noise import normal, stream_key, uniform
from iddpm.sampling import ddim, final, slerp
from iddpm.schedule import respace
from iddpm.timesteps import LossSecondMomentSampler, TimestepSampler, UniformSampler
from pipeline.cli import errors_exit, parse_flags
from pipeline.data.cache import Cache
from pipeline.data.shards import ShardIndex, load_index
from pipeline.data.stream import Reader
from pipeline.distributed.world import World, pick_device
from pipeline.drawing import Recipe, draw_batches
from pipeline.errors import InputError
from pipeline.evaluation.features import Features, trained_features
from pipeline.evaluation.image_quality import Reference, dataset_reference, frechet_distance, moments_of
from pipeline.evaluation.measured import NORMAL_95
from pipeline.evaluation.nll import NllPlan, measure_nll
from pipeline.images import grid
from pipeline.model import Trained, autocast, from_uint8, load_trained, to_uint8
from pipeline.run.checkpoint import Checkpoints
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store

Rows = list[dict[str, Any]]
Axes = dict[str, Any]
"""Settings of matplotlib's axes."""
Drawing = tuple[Rows, Callable[[Any], None]]
"""A figure: its data, and a function that draws it into matplotlib's axes."""

RUNS = {
    "hybrid": "L_hybrid, cosine",
    "linear": "L_hybrid, linear",
    "simple": "L_simple, fixed variance",
    "vlb": "L_vlb",
    "vlb_is": "L_vlb, importance sampled",
}
"""What the figures call each run that can be given."""
FRECHET = "Fréchet distance, own features"


@dataclass(frozen=True)
class FiguresConfig:
    """Draw the papers' figures, from schedules and from runs, each with its data as CSV."""

    out: str = "figures"
    """Folder for the .png and .csv files."""
    data: str = "data/digits"
    """Folder or URL of the shards that the runs were trained on."""
    hybrid: str | None = None
    """Run of L_hybrid with the cosine schedule."""
    linear: str | None = None
    """Run of L_hybrid with the linear schedule."""
    simple: str | None = None
    """Run of L_simple with a fixed variance."""
    vlb: str | None = None
    """Run of L_vlb."""
    vlb_is: str | None = None
    """Run of L_vlb with importance sampling."""
    images: int = 64
    """Validation images for bits/dim."""
    samples: int = 512
    """Images to draw per measurement of quality."""
    gradients: int = 512
    """Training images from whose gradients to estimate the noise scale."""
    steps: tuple[int, ...] = (5, 10, 25, 50, 100)
    """Numbers of sampling steps K."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    def runs(self, *names: str) -> dict[str, str]:
        """Return those of these runs that are given, by what the figures call them."""
        return {RUNS[name]: getattr(self, name) for name in names if getattr(self, name)}


class Bench:
    """What the figures share: the data, and methods to load and measure models."""

    def __init__(self, config: FiguresConfig) -> None:
        self.config = config
        self.world = World(device=pick_device("auto", 0))
        self.data = Store(config.data, config.storage)
        self.train, self.val = (load_index(self.data, split) for split in ("train", "val"))
        self.step_axis: Axes = {"xscale": "log", "xticks": config.steps, "xticklabels": list(map(str, config.steps))}
        self._quality: tuple[Features, Reference] | None = None

    def load(self, run: str, step: int | None = None, ema_rate: float | None = None) -> Trained:
        trained = load_trained(Store(run, self.config.storage), self.world, ema_rate, step)
        if trained.config.model.num_classes is not None:
            raise InputError(f"{run}: got a class-conditional model; the figures need unconditional ones")
        return trained

    def read(self, index: ShardIndex, count: int | None = None) -> Tensor:
        """Read a split's first `count` images, or all, as [n, C, H, W] in [-1, 1]."""
        with closing(Reader(self.data, index)) as reader:
            images, _ = reader.read(np.arange(count or index.num_samples))
        return from_uint8(images.to(self.world.device))

    def steps(self, run: str) -> list[int]:
        """Return the steps of a run's checkpoints."""
        return Checkpoints(Store(run, self.config.storage)).steps()

    def nll(self, model: Trained, **plan: Any) -> Any:
        with closing(Reader(self.data, self.val)) as reader:
            return measure_nll([model], NllPlan(self.config.images, **plan), reader, self.world)

    def quality(self, model: Trained, chain: Diffusion, recipe: Recipe) -> float:
        """Return the Fréchet distance between generated and training images."""
        if self._quality is None:
            features = trained_features(self.data, self.train, self.world)
            cache = Cache.of(model.config.data)
            self._quality = features, dataset_reference(self.data, self.train, features, self.world, cache)
        features, reference = self._quality
        drawn = draw_batches(model, recipe, chain, 0, self.config.samples)
        moments = moments_of(drawn, features, self.world)
        return frechet_distance(moments.mean_covariance(), reference.moments)


# ------------------------------------------------------------------------------------------ schedules


def variances() -> Drawing:
    """Figure 1: the posterior variance divided by beta, for several T."""
    rows = []
    for steps in (100, 1000, 4000):
        d = Diffusion(DiffusionConfig(timesteps=steps, schedule="linear"))
        for t in sorted({round(steps ** (i / 300)) for i in range(300)}):
            ratio = float(d.posterior_variance[t] / d.betas[t])
            rows.append({"T": steps, "t_over_T": t / steps, "ratio": ratio})
    axes = {"xlabel": "t / T", "ylabel": r"$\tilde\beta_t / \beta_t$", "xlim": (0.001, 1), "xscale": "log"}
    return rows, lambda axis: _lines(axis, rows, "t_over_T", "ratio", "T = {T}", axes)


def alphas() -> Drawing:
    """Figure 5: the cumulative product of alpha for both schedules."""
    rows = []
    for schedule in get_args(Schedule):
        d = Diffusion(DiffusionConfig(timesteps=1000, schedule=schedule))
        for t, value in enumerate(d.alphas_cumprod.tolist()):
            rows.append({"schedule": schedule, "t_over_T": (t + 1) / 1000, "alpha_bar": value})
    axes = {"xlabel": "t / T", "ylabel": r"$\bar\alpha_t$"}
    return rows, lambda axis: _lines(axis, rows, "t_over_T", "alpha_bar", "{schedule}", axes)


def noised(bench: Bench) -> Drawing:
    """Figure 3: an image turning into noise, with the linear schedule (above) and the cosine one."""
    steps, columns = 1000, 9
    x = bench.read(bench.val, 1).cpu()
    eps = normal(stream_key(0, "figure"), torch.zeros(1, dtype=torch.int64), x.shape[1:])
    rows, images = [], []
    for schedule in get_args(Schedule):
        d = Diffusion(DiffusionConfig(timesteps=steps, schedule=schedule))
        for i in range(columns):
            t = round(i * (steps - 1) / (columns - 1))
            images.append(d.q_sample(x, torch.tensor([t]), eps)[0])
            rows.append({"schedule": schedule, "t": t, "alpha_bar": float(d.alphas_cumprod[t])})
    return rows, lambda axis: _tiles(axis, torch.stack(images), columns)


# ---------------------------------------------------------------------------------------------- runs


def terms(bench: Bench, runs: dict[str, str]) -> Drawing:
    """Figure 2: each timestep's term of the bound."""
    rows = []
    for name, run in runs.items():
        nll = bench.nll(bench.load(run), exact=True, timesteps_per_call=64)
        rows += [{"run": name, "t": t, "bits": bits} for t, bits in enumerate(nll.vb[0].tolist(), start=1)]
    axes = {"xlabel": "t", "ylabel": "$L_{t-1}$, bits/dim", "xscale": "log", "yscale": "log"}
    return rows, lambda axis: _lines(axis, rows, "t", "bits", "{run}", axes)


def curves(bench: Bench, runs: dict[str, str]) -> Drawing:
    """Figure 6: estimated bits/dim of the moving average over training steps, with 95 % intervals."""
    rows = []
    for name, run in runs.items():
        for step in bench.steps(run):
            nll = bench.nll(bench.load(run, step))
            rows.append({"run": name, "step": step, "bits_per_dim": nll.mean(), "se": nll.standard_error()})
    axes = {"xlabel": "training steps", "ylabel": "bits/dim"}
    return rows, lambda axis: _lines(axis, rows, "step", "bits_per_dim", "{run}", axes, "se")


def gradient_noise(bench: Bench, runs: dict[str, str]) -> Drawing:
    """Figure 7: the gradient noise scale of each run's own objective, on its own weights, as it trains.

    This is tr(covariance) / |gradient|^2 (McCandlish et al. 2018), in images: the batch size whose gradient has as much
    noise as signal. It is estimated from gradients of single training images. For L_vlb, both ways to sample timesteps
    are shown, however the run was trained: on the same weights, they differ only in noise.
    """
    rows: Rows = []
    x, groups = bench.read(bench.train), 32
    for name, run in runs.items():
        for step in bench.steps(run):
            model = bench.load(run, step, ema_rate=0)  # not an average: its gradient is not used in training
            config = model.config.diffusion
            process = Diffusion(config, device=bench.world.device)
            vlb = config.loss in ("kl", "rescaled_kl")
            sampler = _importance_sampler(model, process, x) if vlb else UniformSampler(config.timesteps)
            size = max(1, bench.config.gradients // groups)
            estimates = [_gradients(model, process, sampler, x, group, size) for group in range(groups)]
            sums, squares, uniform_squares = map(torch.stack, zip(*estimates, strict=True))
            products = sums @ sums.T
            kinds = {"L_vlb, importance sampled": squares, "L_vlb": uniform_squares} if vlb else {name: squares}
            for objective, power in kinds.items():
                value, se = _noise_scale(products, power)
                rows.append({"objective": objective, "weights": name, "step": step, "noise_scale": value, "se": se})

    # A run's own objective first, then those of other runs on its weights.
    lines = []
    for row in sorted(rows, key=lambda row: row["objective"] != row["weights"]):
        other = "" if row["objective"] == row["weights"] else f"; weights: {row['weights']}"
        if row["noise_scale"] > 0:
            lines.append(row | {"line": row["objective"] + other})
    axes = {"xlabel": "training steps", "ylabel": "gradient noise scale, images", "yscale": "log"}
    return rows, lambda axis: _lines(axis, lines, "step", "noise_scale", "{line}", axes, "se", below=True)


def _gradients(
    model: Trained, process: Diffusion, sampler: TimestepSampler, x: Tensor, group: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a group's mean gradient, its mean |gradient|^2, and what the latter would be with uniform timesteps.

    Gradients are of single images, each weighted for the probability of its timestep.
    """
    network: Any = model.model
    index = torch.arange(group * size, (group + 1) * size, device=x.device)
    images, eps = _draw("gradient", index, x)
    t, weights = sampler.sample(uniform(stream_key(0, "t"), index))
    gradients = []
    for one in torch.arange(size, device=x.device).split(1):
        with autocast(x.device, model.config.precision):
            loss = process.training_losses(network, images[one], t[one], eps[one]).loss.sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]))
    each = torch.stack(gradients).double()
    squares, weights = each.square().sum(1), weights.double()
    return weights @ each / size, (weights.square() * squares).mean(), (weights * squares).mean()


def _noise_scale(products: Tensor, power: Tensor) -> tuple[float, float]:
    """Estimate the scale, and its standard error by the jackknife.

    `products` [n, n] are the inner products of the mean gradients of n groups; `power` [n] is each group's mean
    |gradient|^2.
    """
    n = len(power)

    def scale(keep: Tensor) -> float:
        of, m = products[keep][:, keep], len(keep)
        signal = (of.sum() - of.trace()) / (m * (m - 1))  # of different groups: free of the bias of squared noise
        return float(power[keep].mean() / signal - 1)

    every = torch.arange(n)
    without = torch.tensor([scale(every[every != i]) for i in range(n)])
    return scale(every), math.sqrt((n - 1) * without.var(correction=0))


def _importance_sampler(model: Trained, process: Diffusion, x: Tensor) -> LossSecondMomentSampler:
    """Build the sampler as in training, with a full history of losses for each timestep."""
    steps = process.num_timesteps
    sampler = LossSecondMomentSampler(steps, device=x.device)
    t = torch.arange(steps, device=x.device)
    for i in range(sampler.history.shape[1]):
        images, eps = _draw("history", t + i * steps, x)
        with torch.no_grad(), autocast(x.device, model.config.precision):
            parts = zip(*(tensor.split(250) for tensor in (images, t, eps)), strict=True)
            sampler.update(t, torch.cat([process.training_losses(model.model, *part).loss for part in parts]))
    return sampler


def _draw(stream: str, index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Choose images of `x`, and noise for them, by index."""
    chosen = (uniform(stream_key(0, stream, "image"), index) * len(x)).long()
    return x[chosen], normal(stream_key(0, stream, "eps"), index, x.shape[1:])


def quality_over_steps(bench: Bench, run: str) -> Drawing:
    """Figure 8: quality over the number of sampling steps, for IDDPM's sampler and DDIM."""
    model = bench.load(run)
    rows: Rows = []
    for steps in bench.config.steps:
        for recipe in (Recipe("ancestral", steps, 0.0, 0), Recipe("ddim", steps, 0.0, 0)):
            value = bench.quality(model, recipe.chain(model.config.diffusion, bench.world.device), recipe)
            rows.append({"sampler": recipe.sampler, "steps": steps, "distance": value, "n": bench.config.samples})
    axes = {"xlabel": "sampling steps K", "ylabel": FRECHET, "yscale": "log"}
    return rows, lambda axis: _lines(axis, rows, "steps", "distance", "{sampler}", axes | bench.step_axis)


def nll_over_steps(bench: Bench, runs: dict[str, str]) -> Drawing:
    """The bound of chains of K steps, evenly spaced and best: learned versus fixed variance."""
    rows: Rows = []
    for name, run in runs.items():
        model = bench.load(run)
        for steps, kind in product(bench.config.steps, ("", "best")):
            nll = bench.nll(model, chain=f"{kind}{steps}")
            label = f"{name}, {kind or 'strided'}"
            rows.append({"chain": label, "steps": steps, "bits_per_dim": nll.mean(), "se": nll.standard_error()})
    axes = {"xlabel": "steps K of the chain", "ylabel": "its bound, bits/dim"}
    return rows, lambda axis: _lines(axis, rows, "steps", "bits_per_dim", "{chain}", axes | bench.step_axis, "se")


def skipped_prefix(bench: Bench, runs: dict[str, str], steps: int = 50) -> Drawing:
    """Figure 4: quality if the first part of the reverse process is skipped and the rest starts from noise."""
    rows: Rows = []
    recipe = Recipe("ancestral", steps, 0.0, 0)
    for name, run in runs.items():
        model = bench.load(run)
        config = model.config.diffusion
        keep = respace(config.timesteps, str(min(steps, config.timesteps)))
        for skipped in (0.0, 0.1, 0.2, 0.3, 0.4):
            chain = Diffusion(config, keep[: round(len(keep) * (1 - skipped))], bench.world.device)
            rows.append({"run": name, "skipped": skipped, "distance": bench.quality(model, chain, recipe)})
    axes = {"xlabel": "part of the reverse process skipped", "ylabel": FRECHET, "yscale": "log"}
    return rows, lambda axis: _lines(axis, rows, "skipped", "distance", "{run}", axes)


def consistency(bench: Bench, run: str, count: int = 8) -> Drawing:
    """DDIM's figure 5: from one x_T (per column), chains of more and more steps (rows) draw the same image."""
    model, device = bench.load(run), bench.world.device
    index = torch.arange(count, device=device)
    images = []
    for steps in bench.config.steps:
        recipe = Recipe("ddim", steps, 0.0, 0)
        chain = recipe.chain(model.config.diffusion, device)
        with autocast(device, model.config.precision):
            images.append(final(recipe.run(model, chain, index)).cpu().clamp(-1, 1))
    gaps = [_mse(x, images[-1]) for x in images]
    rows = [{"steps": steps, "mse_to_longest": gap} for steps, gap in zip(bench.config.steps, gaps, strict=True)]
    return rows, lambda axis: _tiles(axis, torch.cat(images), count)


def interpolation(bench: Bench, run: str, lines: int = 4, columns: int = 11) -> Drawing:
    """DDIM's figure 6: interpolation between two images by slerp of x_T."""
    model, device = bench.load(run), bench.world.device
    chain = Recipe("ddim", max(bench.config.steps), 0.0, 0).chain(model.config.diffusion, device)
    index = torch.arange(lines, device=device)
    first, last = (normal(stream_key(0, "end", end), index, model.shape) for end in (0, 1))
    weights = [i / (columns - 1) for i in range(columns)]
    with autocast(device, model.config.precision):
        images = [final(ddim(model.model, chain, slerp(first, last, w).to(model.dtype))).cpu() for w in weights]
    gaps = [_mse(a, b) for a, b in pairwise(images)]
    rows = [{"weight": weight, "mse_to_next": gap} for weight, gap in zip(weights, [*gaps, 0.0], strict=True)]
    return rows, lambda axis: _tiles(axis, torch.stack(images, dim=1).flatten(0, 1), columns)


def _mse(a: Tensor, b: Tensor) -> float:
    """Return the mean squared difference of images in [-1, 1], as of pixels in [0, 1]."""
    return float((a - b).square().mean() / 4)


# -------------------------------------------------------------------------------------------- drawing


def _lines(
    axis: Any, rows: Rows, x: str, y: str, label: str, axes: Axes, error: str | None = None, below: bool = False
) -> None:
    """Draw column `y` over column `x`, a line for each value of the template `label`.

    `error` is the column of standard errors; `below` puts the legend below the picture.
    """
    from matplotlib.ticker import LogFormatter

    lines: dict[str, Rows] = {}
    for row in rows:
        lines.setdefault(label.format(**row), []).append(row)
    for name, line in lines.items():
        xs, ys = ([row[column] for row in line] for column in (x, y))
        marker = "o" if len(line) < 30 else ""
        (drawn,) = axis.plot(xs, ys, label=name, linewidth=1.3, marker=marker, markersize=3)
        if error:
            factors = [math.exp(NORMAL_95 * row[error] / row[y]) for row in line]  # stays positive
            low, high = ([v * f**sign for v, f in zip(ys, factors, strict=True)] for sign in (-1, 1))
            axis.fill_between(xs, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
    axis.grid(alpha=0.3, which="both")
    axis.set(**axes)
    if "xticks" in axes:
        axis.xaxis.minorticks_off()
    if y == "distance":  # over about a decade: its labels are 3, not 3 x 10^0
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    if below:
        axis.figure.legend(loc="outside lower center", fontsize=8)
    else:
        axis.legend(fontsize=8)


def _tiles(axis: Any, images: Tensor, columns: int) -> None:
    """Show images [N, C, H, W] in [-1, 1] as a grid."""
    axis.imshow(grid(to_uint8(images).numpy(), columns))
    axis.axis("off")


def save(folder: Path, name: str, title: str, rows: Rows, draw: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    draw(axis)
    axis.set_title(title, fontsize=10)
    figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    print(f"{folder / name}.png and .csv", flush=True)


def figures(config: FiguresConfig) -> Iterator[tuple[str, str, Drawing]]:
    """Yield the name, title and drawing of each figure that the given runs allow."""
    bench = Bench(config)
    yield "variances", "Posterior variance over beta, linear schedule", variances()
    yield "alphas", "Remaining signal", alphas()
    yield "noised", "Linear (above) and cosine", noised(bench)
    if runs := config.runs(*RUNS):
        yield "curves", "Learning curves", curves(bench, runs)
        shown = config.runs("hybrid", "linear", "simple") or runs
        yield "nll-over-steps", "Bound of shorter chains", nll_over_steps(bench, shown)
        shown = config.runs("hybrid", "linear") or runs
        yield "terms", "Terms of the bound", terms(bench, shown)
    if shown := config.runs("hybrid", "vlb", "vlb_is"):
        yield "gradient-noise", "Gradient noise", gradient_noise(bench, shown)
    if config.hybrid:
        yield "ddim-consistency", "DDIM: more steps in each row", consistency(bench, config.hybrid)
        yield "ddim-interpolation", "DDIM: between two images", interpolation(bench, config.hybrid)
        yield "quality-over-steps", "Quality over sampling steps", quality_over_steps(bench, config.hybrid)
    if shown := config.runs("hybrid", "linear"):
        yield "skipped-prefix", "A prefix of the reverse process skipped", skipped_prefix(bench, shown)


def main(config: FiguresConfig) -> None:
    for name, title, (rows, draw) in figures(config):
        save(Path(config.out), name, title, rows, draw)


def run(argv: Sequence[str]) -> None:
    config = parse_flags(FiguresConfig, argv, FiguresConfig.__doc__ or "")
    with errors_exit():
        main(config)


if __name__ == "__main__":
    run(sys.argv[1:])
