"""Draw the papers' figures, each with its data as CSV: `python -m jobs.figures --hybrid RUN --linear RUN ...`.

Figures of the schedules need no run; the others are drawn if their runs are given. Figure numbers are IDDPM's, unless
noted. Image quality is measured with features trained on the data itself, so its values are not FIDs.
"""

import csv
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm.config import DiffusionConfig, Schedule
from iddpm.diffusion import Diffusion
from iddpm.noise import normal, stream_key, uniform
from iddpm.sampling import ddim, final, slerp
from iddpm.schedule import respace
from iddpm.timesteps import LossSecondMomentSampler, TimestepSampler, UniformSampler
from pipeline.cli import parse_flags
from pipeline.data.cache import Cache
from pipeline.data.shards import ShardIndex, load_index
from pipeline.data.stream import Reader
from pipeline.distributed.world import World, pick_device
from pipeline.drawing import Recipe, draw_batches
from pipeline.errors import InputError, UserError
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


class Bench:
    """What the figures share: the data, and methods to load and measure models."""

    def __init__(self, config: FiguresConfig) -> None:
        self.config = config
        self.world = World(device=pick_device("auto", 0))
        self.data = Store(config.data, config.storage)
        self.train, self.val = (load_index(self.data, split) for split in ("train", "val"))
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

    def nll(self, model: Trained, **plan: Any) -> Any:
        with closing(Reader(self.data, self.val)) as reader:
            options = NllPlan(self.config.images, **plan)
            return measure_nll([model], options, reader.read, self.val.num_samples, self.world)

    def quality(self, model: Trained, chain: Diffusion, recipe: Recipe) -> float:
        """Return the Fréchet distance between generated and training images."""
        if self._quality is None:
            features = trained_features(self.data, self.train, self.world)
            cache = Cache.of(model.config.data)
            self._quality = features, dataset_reference(self.data, self.train, features, self.world, cache)
        features, reference = self._quality
        drawn = draw_batches(model, recipe, 0, self.config.samples, device=self.world.device, chain=chain)
        moments = moments_of(drawn, features, self.world)
        return frechet_distance(moments.mean_covariance(), reference.moments)


# ------------------------------------------------------------------------------------------ schedules


def variances() -> tuple[Rows, Callable[[Any], None]]:
    """Figure 1: the posterior variance divided by beta, for several T."""
    rows = []
    for steps in (100, 1000, 4000):
        d = Diffusion(DiffusionConfig(timesteps=steps, schedule="linear"))
        for t in sorted({round(steps ** (i / 300)) for i in range(300)}):
            ratio = float(d.posterior_variance[t] / d.betas[t])
            rows.append({"T": steps, "t_over_T": t / steps, "ratio": ratio})

    def draw(axis: Any) -> None:
        _lines(axis, rows, "t_over_T", "ratio", "T", "T = ")
        axis.set(xlabel="t / T", ylabel=r"$\tilde\beta_t / \beta_t$", xlim=(0.001, 1), xscale="log")

    return rows, draw


def alphas() -> tuple[Rows, Callable[[Any], None]]:
    """Figure 5: the cumulative product of alpha for both schedules."""
    schedules: tuple[Schedule, ...] = ("linear", "cosine")
    rows = [
        {"schedule": schedule, "t_over_T": (t + 1) / 1000, "alpha_bar": float(value)}
        for schedule in schedules
        for t, value in enumerate(Diffusion(DiffusionConfig(timesteps=1000, schedule=schedule)).alphas_cumprod)
    ]

    def draw(axis: Any) -> None:
        _lines(axis, rows, "t_over_T", "alpha_bar", "schedule")
        axis.set(xlabel="t / T", ylabel=r"$\bar\alpha_t$")

    return rows, draw


def noised(bench: Bench) -> tuple[Rows, Callable[[Any], None]]:
    """Figure 3: an image turning into noise, with the linear schedule (above) and the cosine one."""
    steps, columns = 1000, 9
    x = bench.read(bench.val, 1).cpu()
    eps = normal(stream_key(0, "figure"), torch.zeros(1, dtype=torch.int64), x.shape[1:])
    rows, images = [], []
    schedules: tuple[Schedule, ...] = ("linear", "cosine")
    for schedule in schedules:
        d = Diffusion(DiffusionConfig(timesteps=steps, schedule=schedule))
        for i in range(columns):
            t = round(i * (steps - 1) / (columns - 1))
            images.append(d.q_sample(x, torch.tensor([t]), eps)[0])
            rows.append({"schedule": schedule, "t": t, "alpha_bar": float(d.alphas_cumprod[t])})
    return rows, lambda axis: _tiles(axis, torch.stack(images), columns)


# ---------------------------------------------------------------------------------------------- runs


def terms(bench: Bench, runs: dict[str, str]) -> tuple[Rows, Callable[[Any], None]]:
    """Figure 2: each timestep's term of the bound."""
    rows = []
    for name, run in runs.items():
        nll = bench.nll(bench.load(run), exact=True, timesteps_per_call=64)
        rows += [{"run": name, "t": t + 1, "bits": float(v)} for t, v in enumerate(nll.vb[0])]

    def draw(axis: Any) -> None:
        _lines(axis, rows, "t", "bits", "run")
        axis.set(xlabel="t", ylabel="$L_{t-1}$, bits/dim", xscale="log", yscale="log")

    return rows, draw


def curves(bench: Bench, runs: dict[str, str]) -> tuple[Rows, Callable[[Any], None]]:
    """Figure 6: estimated bits/dim of the moving average over training steps, with 95 % intervals."""
    rows = []
    for name, run in runs.items():
        for step in steps_of(bench, run):
            nll = bench.nll(bench.load(run, step))
            rows.append({"run": name, "step": step, "bits_per_dim": nll.mean(), "se": nll.standard_error()})

    def draw(axis: Any) -> None:
        _lines(axis, rows, "step", "bits_per_dim", "run", error="se")
        axis.set(xlabel="training steps", ylabel="bits/dim")

    return rows, draw


def gradient_noise(bench: Bench, runs: dict[str, str]) -> tuple[Rows, Callable[[Any], None]]:
    """Figure 7: the gradient noise scale of each run's own objective, on its own weights, as it trains.

    This is tr(covariance) / |gradient|^2 (McCandlish et al. 2018), in images: the batch size whose gradient has as much
    noise as signal. It is estimated from gradients of single training images. For L_vlb, both ways to sample timesteps
    are shown, however the run was trained: on the same weights, they differ only in noise.
    """
    rows: Rows = []
    x, groups = bench.read(bench.train), 32
    for name, run in runs.items():
        for step in steps_of(bench, run):
            model = bench.load(run, step, ema_rate=0)  # not an average: its gradient is not used in training
            config = model.config.diffusion
            process = Diffusion(config, device=bench.world.device)
            vlb = config.loss in ("kl", "rescaled_kl")
            sampler = _importance_sampler(model, process, x) if vlb else UniformSampler(config.timesteps)
            size = max(1, bench.config.gradients // groups)
            found = [_gradients(model, process, sampler, x, group, size) for group in range(groups)]
            sums, squares, uniform_squares = (torch.stack(column) for column in zip(*found, strict=True))
            products = sums @ sums.T
            kinds = {"L_vlb, importance sampled": squares, "L_vlb": uniform_squares} if vlb else {name: squares}
            for objective, power in kinds.items():
                value, se = _noise_scale(products, power)
                rows.append({"objective": objective, "weights": name, "step": step, "noise_scale": value, "se": se})

    def draw(axis: Any) -> None:
        known = [row for row in rows if row["noise_scale"] > 0]
        own = [row | {"line": row["objective"]} for row in known if row["objective"] == row["weights"]]
        other = [
            row | {"line": f"{row['objective']}; weights: {row['weights']}"}
            for row in known
            if row["objective"] != row["weights"]
        ]
        _lines(axis, own + other, "step", "noise_scale", "line", error="se")
        axis.set(xlabel="training steps", ylabel="gradient noise scale, images", yscale="log")
        axis.legend_.remove()
        axis.figure.legend(loc="outside lower center", fontsize=8)

    return rows, draw


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


def quality_over_steps(bench: Bench, run: str) -> tuple[Rows, Callable[[Any], None]]:
    """Figure 8: quality over the number of sampling steps, for IDDPM's sampler and DDIM."""
    model = bench.load(run)
    rows: Rows = []
    for steps in bench.config.steps:
        for recipe in (Recipe("ancestral", steps, 0.0, 0), Recipe("ddim", steps, 0.0, 0)):
            value = bench.quality(model, recipe.chain(model.config.diffusion, bench.world.device), recipe)
            rows.append({"sampler": recipe.sampler, "steps": steps, "distance": value, "n": bench.config.samples})

    def draw(axis: Any) -> None:
        _lines(axis, rows, "steps", "distance", "sampler")
        axis.set(xlabel="sampling steps K", ylabel="Fréchet distance, own features", xscale="log", yscale="log")
        _ticks(axis, bench.config.steps)
        _plain(axis)

    return rows, draw


def nll_over_steps(bench: Bench, runs: dict[str, str]) -> tuple[Rows, Callable[[Any], None]]:
    """The bound of chains of K steps, evenly spaced and best: learned versus fixed variance."""
    rows: Rows = []
    for name, run in runs.items():
        model = bench.load(run)
        for steps in bench.config.steps:
            for kind in ("", "best"):
                nll = bench.nll(model, chain=f"{kind}{steps}")
                label = f"{name}, {kind or 'strided'}"
                rows.append({"chain": label, "steps": steps, "bits_per_dim": nll.mean(), "se": nll.standard_error()})

    def draw(axis: Any) -> None:
        _lines(axis, rows, "steps", "bits_per_dim", "chain", error="se")
        axis.set(xlabel="steps K of the chain", ylabel="its bound, bits/dim", xscale="log")
        _ticks(axis, bench.config.steps)

    return rows, draw


def skipped_prefix(bench: Bench, runs: dict[str, str], steps: int = 50) -> tuple[Rows, Callable[[Any], None]]:
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

    def draw(axis: Any) -> None:
        _lines(axis, rows, "skipped", "distance", "run")
        axis.set(xlabel="part of the reverse process skipped", ylabel="Fréchet distance, own features", yscale="log")
        _plain(axis)

    return rows, draw


def consistency(bench: Bench, run: str, count: int = 8) -> tuple[Rows, Callable[[Any], None]]:
    """DDIM's figure 5: from one x_T (per column), chains of more and more steps (rows) draw the same image."""
    model = bench.load(run)
    images = []
    for steps in bench.config.steps:
        recipe = Recipe("ddim", steps, 0.0, 0)
        chain = recipe.chain(model.config.diffusion, bench.world.device)
        index = torch.arange(count, device=bench.world.device)
        with autocast(bench.world.device, model.config.precision):
            images.append(final(recipe.run(model, chain, index)).cpu().clamp(-1, 1))
    gaps = [float(x.sub(images[-1]).square().mean() / 4) for x in images]  # of pixels in [0, 1]
    rows = [{"steps": s, "mse_to_longest": gap} for s, gap in zip(bench.config.steps, gaps, strict=True)]
    return rows, lambda axis: _tiles(axis, torch.cat(images), count)


def interpolation(bench: Bench, run: str, lines: int = 4, columns: int = 11) -> tuple[Rows, Callable[[Any], None]]:
    """DDIM's figure 6: interpolation between two images by slerp of x_T."""
    model = bench.load(run)
    chain = Recipe("ddim", max(bench.config.steps), 0.0, 0).chain(model.config.diffusion, bench.world.device)
    first, last = (
        normal(stream_key(0, "end", end), torch.arange(lines, device=bench.world.device), model.shape) for end in (0, 1)
    )
    weights = [i / (columns - 1) for i in range(columns)]
    with autocast(bench.world.device, model.config.precision):
        images = [final(ddim(model.model, chain, slerp(first, last, w).to(model.dtype))).cpu() for w in weights]
    steps = [float((b - a).square().mean() / 4) for a, b in pairwise(images)]
    rows = [{"weight": w, "mse_to_next": gap} for w, gap in zip(weights, [*steps, 0.0], strict=True)]
    return rows, lambda axis: _tiles(axis, torch.stack(images, dim=1).flatten(0, 1), columns)


def steps_of(bench: Bench, run: str) -> list[int]:
    """Return the steps of a run's checkpoints."""
    records = Checkpoints(Store(run, bench.config.storage)).records()
    return sorted({record.step for record in records if record.kind == "checkpoint"})


# -------------------------------------------------------------------------------------------- drawing


def _lines(axis: Any, rows: Rows, x: str, y: str, by: str, prefix: str = "", error: str | None = None) -> None:
    for value in dict.fromkeys(row[by] for row in rows):
        mine = [row for row in rows if row[by] == value]
        xs, ys = [row[x] for row in mine], [row[y] for row in mine]
        marker = "o" if len(mine) < 30 else ""
        (line,) = axis.plot(xs, ys, label=f"{prefix}{value}", linewidth=1.3, marker=marker, markersize=3)
        if error:
            factors = [math.exp(NORMAL_95 * row[error] / row[y]) for row in mine]  # stays positive
            low, high = ([v * f**sign for v, f in zip(ys, factors, strict=True)] for sign in (-1, 1))
            axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def _ticks(axis: Any, values: Sequence[int]) -> None:
    """Show only these ticks on a logarithmic x axis."""
    axis.set_xticks(values, list(map(str, values)))
    axis.xaxis.minorticks_off()


def _plain(axis: Any) -> None:
    """Label a logarithmic y axis of about a decade with 3, not 3 x 10^0."""
    from matplotlib.ticker import LogFormatter

    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))


def _tiles(axis: Any, images: Tensor, columns: int) -> None:
    """Show images [N, C, H, W] in [-1, 1] as a grid."""
    axis.imshow(grid(to_uint8(images).numpy(), columns))
    axis.axis("off")


def save(folder: Path, name: str, title: str, rows: Rows, draw: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    figure, axis = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    draw(axis)
    axis.set_title(title, fontsize=10)
    figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    print(f"{folder / name}.png and .csv", flush=True)


def figures(config: FiguresConfig) -> Iterator[tuple[str, str, tuple[Rows, Callable[[Any], None]]]]:
    """Yield the name, title, data and drawing function of each figure that can be drawn."""
    bench = Bench(config)
    given = {
        "L_hybrid, cosine": config.hybrid,
        "L_hybrid, linear": config.linear,
        "L_simple, fixed variance": config.simple,
        "L_vlb": config.vlb,
        "L_vlb, importance sampled": config.vlb_is,
    }
    runs = {name: run for name, run in given.items() if run}

    def some(*names: str) -> dict[str, str]:
        return {name: run for name, run in runs.items() if name in names}

    yield "variances", "Posterior variance over beta, linear schedule", variances()
    yield "alphas", "Remaining signal", alphas()
    yield "noised", "Linear (above) and cosine", noised(bench)
    if runs:
        yield "curves", "Learning curves", curves(bench, runs)
        yield "nll-over-steps", "Bound of shorter chains", nll_over_steps(bench, some(*list(given)[:3]) or runs)
        yield "terms", "Terms of the bound", terms(bench, some(*list(given)[:2]) or runs)
    if own := some("L_hybrid, cosine", "L_vlb", "L_vlb, importance sampled"):
        yield "gradient-noise", "Gradient noise", gradient_noise(bench, own)
    if config.hybrid:
        yield "ddim-consistency", "DDIM: more steps in each row", consistency(bench, config.hybrid)
        yield "ddim-interpolation", "DDIM: between two images", interpolation(bench, config.hybrid)
        yield "quality-over-steps", "Quality over sampling steps", quality_over_steps(bench, config.hybrid)
    if both := some(*list(given)[:2]):
        yield "skipped-prefix", "A prefix of the reverse process skipped", skipped_prefix(bench, both)


def main(config: FiguresConfig) -> None:
    drawn: Iterable[Any] = figures(config)
    for name, title, (rows, draw) in drawn:
        save(Path(config.out), name, title, rows, draw)


def run(argv: Sequence[str]) -> None:
    config = parse_flags(FiguresConfig, argv, FiguresConfig.__doc__ or "")
    try:
        main(config)
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    run(sys.argv[1:])
