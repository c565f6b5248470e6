"""Draw the papers' figures, each with its data as CSV: `python -m jobs.figures --hybrid RUN --linear RUN ...`.

Those of the schedules need no run; of the others, those are drawn whose runs are given. Numbers are those of IDDPM's
figures. Image quality is measured over features trained on the data itself, so its values are no FIDs.
"""

import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm.config import DiffusionConfig, Schedule
from iddpm.diffusion import Diffusion
from iddpm.likelihood import pilot_distribution, pilot_sizes
from iddpm.noise import normal, stream_key, uniform
from iddpm.sampling import ddim, final, slerp
from iddpm.schedule import respace
from pipeline.checkpoint import Checkpoints
from pipeline.config import parse_flags
from pipeline.data import Cache, Reader, load_index
from pipeline.metrics import Features, Reference, dataset_reference, frechet_distance, moments_of, trained_features
from pipeline.nll import NllPlan, measure_nll
from pipeline.sample import Recipe, Trained, load_trained, to_uint8
from pipeline.storage import StorageConfig, Store
from pipeline.world import World, pick_device

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class FiguresConfig:
    """Draw the papers' figures from tables and from runs, each with its data as CSV."""

    out: str = "figures"
    """Folder for the .png and .csv files."""
    data: str = "data/digits"
    """Shards that the runs were trained on."""
    hybrid: str | None = None
    """Run of L_hybrid on the cosine schedule."""
    linear: str | None = None
    """Run of L_hybrid on the linear schedule."""
    simple: str | None = None
    """Run of L_simple with a fixed variance."""
    vlb: str | None = None
    """Run of L_vlb."""
    vlb_is: str | None = None
    """Run of L_vlb with importance sampling."""
    images: int = 64
    """Validation images for bits/dim."""
    samples: int = 512
    """Images drawn for each point of quality."""
    steps: tuple[int, ...] = (5, 10, 25, 50, 100)
    """Numbers of sampling steps K."""
    storage: StorageConfig = field(default_factory=StorageConfig)


class Bench:
    """What the figures of runs share: the data, the networks, and ways to measure."""

    def __init__(self, config: FiguresConfig) -> None:
        self.config = config
        self.world = World(device=pick_device("auto", 0))
        self.data = Store(config.data, config.storage)
        self.val = load_index(self.data, "val")
        self._quality: tuple[Features, Reference] | None = None

    def load(self, run: str, step: int | None = None) -> Trained:
        trained = load_trained(run, self.config.storage, self.world.device, step=step)
        if trained.config.model.num_classes is not None:
            raise ValueError(f"{run}: is class-conditional; the figures are of unconditional models")
        return trained

    def read(self, count: int) -> Tensor:
        """Validation images in [-1, 1], [n, C, H, W]."""
        with closing(Reader(self.data, self.val)) as reader:
            return reader.read(np.arange(count))[0].to(self.world.device).float() / 127.5 - 1

    def nll(self, model: Trained, **plan: Any) -> Any:
        with closing(Reader(self.data, self.val)) as reader:
            options = NllPlan(self.config.images, **plan)
            return measure_nll([model], options, reader.read, self.val.num_samples, self.world)

    def quality(self, model: Trained, chain: Diffusion, recipe: Recipe) -> float:
        """The Fréchet distance of drawn images to the training images."""
        if self._quality is None:
            train = load_index(self.data, "train")
            features = trained_features(self.data, train, self.world)
            cache = Cache(model.config.data.cache_dir, 10**10)
            self._quality = features, dataset_reference(self.data, train, features, self.world, cache)
        features, reference = self._quality

        def drawn() -> Iterator[Tensor]:
            for start in range(0, self.config.samples, 64):
                index = torch.arange(start, min(start + 64, self.config.samples), device=self.world.device)
                yield to_uint8(final(recipe.run(model.model, chain, index, model.shape, model.dtype, None)))

        moments = moments_of(drawn(), features, self.world)
        return frechet_distance(moments.mean_covariance(), reference.moments)


# ------------------------------------------------------------------------------------------ schedules


def variances() -> tuple[Rows, Callable[[Any], None]]:
    """Figure 1: the posterior's variance over beta, for several T."""
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
    """Figure 3: an image on its way to noise, by the linear schedule (above) and the cosine one."""
    steps, columns = 1000, 9
    x = bench.read(1).cpu()
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
    """Figure 6: bits/dim of the moving average over training steps, sampled, with 95 % intervals."""
    rows = []
    for name, run in runs.items():
        for step in steps_of(bench, run):
            nll = bench.nll(bench.load(run, step))
            rows.append({"run": name, "step": step, "bits_per_dim": nll.mean(), "se": nll.standard_error()})

    def draw(axis: Any) -> None:
        _lines(axis, rows, "step", "bits_per_dim", "run", error="se")
        axis.set(xlabel="training steps", ylabel="bits/dim")

    return rows, draw


def gradient_noise(bench: Bench, run: str, batch: int = 32, count: int = 32) -> tuple[Rows, Callable[[Any], None]]:
    """Figure 7: tr(covariance) / |gradient|^2 of each objective, on the checkpoints of one run.

    The gradient noise scale of McCandlish et al. 2018, in examples, from `count` gradients of `batch` images each.
    """
    rows: Rows = []
    x = bench.read(bench.val.num_samples)
    for step in steps_of(bench, run):
        model = bench.load(run, step)
        network: Any = model.model
        vlb = Diffusion(_with_loss(model.config.diffusion, "rescaled_kl"), device=bench.world.device)
        hybrid = Diffusion(_with_loss(model.config.diffusion, "rescaled_mse"), device=bench.world.device)

        def pilot_noise(t: Tensor) -> Tensor:
            return normal(stream_key(1, "pilot"), t * len(t) + torch.arange(len(t), device=t.device), x.shape[1:])

        sizes = pilot_sizes(vlb, network, x[:16], pilot_noise)
        important = torch.cat([sizes[:1], sizes])  # L_0 like L_1
        even = torch.full_like(important, 1 / len(important))
        for name, process, p in (
            ("L_vlb, importance sampled", vlb, pilot_distribution(important)),
            ("L_vlb", vlb, even),
            ("L_hybrid", hybrid, even),
        ):
            gradients = [_gradient(network, process, x, p, i, batch) for i in range(count)]
            mean = torch.stack(gradients).mean(0)
            covariance = torch.stack([(g - mean).square().sum() for g in gradients]).sum() / (count - 1)
            if process is hybrid or p is not even:  # L_vlb's own gradient is the same one, lost in its noise
                signal = mean.square().sum() - covariance / count  # without what chance adds to it
            rows.append({"objective": name, "step": step, "noise_scale": float(batch * covariance / signal),
                         "covariance": float(covariance), "signal": float(signal)})  # fmt: skip

    def draw(axis: Any) -> None:
        _lines(axis, [row for row in rows if row["signal"] > 0], "step", "noise_scale", "objective")
        axis.set(xlabel="training steps", ylabel="gradient noise scale, images", yscale="log")

    return rows, draw


def _with_loss(config: DiffusionConfig, loss: Any) -> DiffusionConfig:
    return replace(config, loss=loss)


def _gradient(network: Any, process: Diffusion, x: Tensor, p: Tensor, number: int, batch: int) -> Tensor:
    """Of the mean loss of some images, at timesteps drawn by p (float64 [T]) and weighted for it."""
    index = torch.arange(number * batch, (number + 1) * batch)
    chosen = (uniform(stream_key(0, "image"), index) * len(x)).long().to(x.device)
    t = torch.searchsorted(p.cumsum(0) / p.sum(), uniform(stream_key(0, "t"), index), right=True).clamp(max=len(p) - 1)
    weights = (1 / (len(p) * p[t])).float().to(x.device)
    eps = normal(stream_key(0, "eps"), index.to(x.device), x.shape[1:])
    losses = process.training_losses(network, x[chosen], t.to(x.device), eps).loss
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((losses * weights).mean(), parameters)
    return torch.cat([g.flatten() for g in found]).double()


def quality_over_steps(bench: Bench, run: str) -> tuple[Rows, Callable[[Any], None]]:
    """Figure 8: quality over the number of sampling steps, by IDDPM's sampler and DDIM's."""
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

    return rows, draw


def nll_over_steps(bench: Bench, runs: dict[str, str]) -> tuple[Rows, Callable[[Any], None]]:
    """The bound of chains of K steps, evenly spaced, and of the best path: learned variance against fixed."""
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
    """Figure 4: quality when the first part of the reverse process is left out and the rest starts from noise."""
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

    return rows, draw


def consistency(bench: Bench, run: str, count: int = 8) -> tuple[Rows, Callable[[Any], None]]:
    """DDIM's figure 5: from one x_T (a column), by chains of ever more steps (rows), the same image."""
    model = bench.load(run)
    images = []
    for steps in bench.config.steps:
        recipe = Recipe("ddim", steps, 0.0, 0)
        chain = recipe.chain(model.config.diffusion, bench.world.device)
        index = torch.arange(count, device=bench.world.device)
        images.append(final(recipe.run(model.model, chain, index, model.shape, model.dtype, None)).cpu().clamp(-1, 1))
    gaps = [float(x.sub(images[-1]).square().mean() / 4) for x in images]  # of pixels in [0, 1]
    rows = [{"steps": s, "mse_to_longest": gap} for s, gap in zip(bench.config.steps, gaps, strict=True)]
    return rows, lambda axis: _tiles(axis, torch.cat(images), count)


def interpolation(bench: Bench, run: str, lines: int = 4, columns: int = 11) -> tuple[Rows, Callable[[Any], None]]:
    """DDIM's figure 6: images between two, by slerp of x_T."""
    model = bench.load(run)
    chain = Recipe("ddim", max(bench.config.steps), 0.0, 0).chain(model.config.diffusion, bench.world.device)
    first, last = (
        normal(stream_key(0, "end", end), torch.arange(lines, device=bench.world.device), model.shape) for end in (0, 1)
    )
    weights = [i / (columns - 1) for i in range(columns)]
    images = [final(ddim(model.model, chain, slerp(first, last, w).to(model.dtype))).cpu() for w in weights]
    steps = [float((b - a).square().mean() / 4) for a, b in pairwise(images)]
    rows = [{"weight": w, "mse_to_next": gap} for w, gap in zip(weights, [*steps, 0.0], strict=True)]
    return rows, lambda axis: _tiles(axis, torch.stack(images, dim=1).flatten(0, 1), columns)


def steps_of(bench: Bench, run: str) -> list[int]:
    """Of the checkpoints that are kept."""
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
            half = [1.96 * row[error] for row in mine]
            low, high = ([v + sign * h for v, h in zip(ys, half, strict=True)] for sign in (-1, 1))
            axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def _ticks(axis: Any, values: Sequence[int]) -> None:
    """Just these on a logarithmic x axis."""
    axis.set_xticks(values, list(map(str, values)))
    axis.xaxis.minorticks_off()


def _tiles(axis: Any, images: Tensor, columns: int) -> None:
    """[N, C, H, W] in [-1, 1] as a grid."""
    n, channels, height, width = images.shape
    padded = torch.nn.functional.pad(to_uint8(images).float(), (0, 1, 0, 1), value=255)
    rows = -(-n // columns)
    grid = padded.view(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    picture = grid.reshape(rows * (height + 1), columns * (width + 1), channels).byte().numpy()
    axis.imshow(picture if channels == 3 else picture[..., 0], cmap=None if channels == 3 else "gray", vmin=0, vmax=255)
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
    """Name, title, data and drawing of each figure that can be drawn."""
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
    yield "alphas", "What is left of the signal", alphas()
    yield "noised", "Linear (above) and cosine", noised(bench)
    if runs:
        yield "curves", "Learning curves", curves(bench, runs)
        yield "nll-over-steps", "Bound of shorter chains", nll_over_steps(bench, some(*list(given)[:3]) or runs)
        yield "terms", "Terms of the bound", terms(bench, some(*list(given)[:2]) or runs)
    if config.hybrid:
        yield "gradient-noise", "Gradient noise", gradient_noise(bench, config.hybrid)
        yield "ddim-consistency", "DDIM: more steps downwards", consistency(bench, config.hybrid)
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
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    run(sys.argv[1:])
