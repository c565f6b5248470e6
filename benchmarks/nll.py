"""Check the sampled bits/dim against the exact value: `python -m benchmarks.nll RUN [--images 64] [--seeds 200]`.

Takes some validation images as the entire population and computes their exact bits/dim. For each seed, it then draws
half as many of them with replacement, as an evaluation draws images from a distribution, and estimates the value.
Prints whether the mean over all seeds agrees with the exact value, how often the 95 % interval covers it, and how many
network evaluations each method needs for a standard error of 0.01 bits/dim.
"""

import math
from typing import Annotated

import torch
import tyro
from torch import Tensor

from benchmarks.table import Row, show
from iddpm.diffusion import Diffusion
from iddpm.likelihood import exact_bpd, pilot_distribution, pilot_sizes, sampled_bpd
from iddpm.noise import normal, stream_key, uniform
from pipeline.data.shards import load_index
from pipeline.data.stream import samples
from pipeline.distributed.world import World
from pipeline.evaluation.measured import NORMAL_95
from pipeline.model import from_uint8, load_trained
from pipeline.storage.store import Store

SE = 0.01  # bits/dim


def rows(
    run: Annotated[str, tyro.conf.arg(help="Folder or URL of a trained run.")],
    images: Annotated[int, tyro.conf.arg(help="Images in the population.")] = 64,
    seeds: Annotated[int, tyro.conf.arg(help="Number of estimates.")] = 200,
    draws: Annotated[int, tyro.conf.arg(help="Timesteps drawn per image.")] = 16,
) -> list[Row]:
    trained = load_trained(Store(run), World())
    diffusion, model, steps = Diffusion(trained.config.diffusion), trained.model, trained.config.diffusion.timesteps
    store = Store(trained.config.data.url)
    population = images
    pixels, _ = samples(store, load_index(store, "val"), range(population))
    x = from_uint8(pixels)
    everyone = torch.arange(population)

    def noise(seed: int, index: Tensor, t: Tensor | int) -> Tensor:
        return normal(stream_key(seed, "benchmark"), index * steps + t, trained.shape)

    # Twice with different noise: the bound is an expectation over noise, so a single evaluation has an error too.
    twice = [exact_bpd(diffusion, model, x, lambda t, i=i: noise(i, everyone, t)).total.double() for i in (-1, -3)]
    exact = (twice[0] + twice[1]) / 2
    exact_error = (twice[0] - twice[1]).std() / 2 / math.sqrt(population)

    few = everyone[:16]
    p = pilot_distribution(pilot_sizes(diffusion, model, x[few], lambda t: noise(-2, few, t)))
    pilot = 16 * 80
    means, errors, gaps, n = [], [], [], population // 2
    for seed in range(seeds):
        order = torch.arange(n)
        chosen = (uniform(stream_key(seed, "choice"), order) * population).long()
        u = uniform(stream_key(seed, "u"), order)

        def eps(i: Tensor, t: Tensor, seed: int = seed) -> Tensor:
            return noise(seed, i, t)  # by position in the sample: an image drawn twice gets new noise

        total = sampled_bpd(diffusion, model, x[chosen], eps, u, p, draws).total
        means.append(total.mean())
        gaps.append((total - exact[chosen]).mean())
        errors.append(total.std() / math.sqrt(n))
    mean, error = torch.stack(means), torch.stack(errors)
    gap = torch.stack(gaps)
    gap_error = math.hypot(gap.std() / math.sqrt(seeds), exact_error)
    covered = ((mean - exact.mean()).abs() <= NORMAL_95 * error).double().mean()
    needed = {"exact": (exact.std() / SE) ** 2, "sampled": (error.mean() * math.sqrt(n) / SE) ** 2}
    cost = {"exact": needed["exact"] * steps, "sampled": needed["sampled"] * (draws + 1) + pilot}
    return [
        Row(
            f"bits/dim, evaluations for a standard error of {SE}",
            f"{cost['sampled']:,.0f}",
            f"exact loop {cost['exact']:,.0f}",
            float(cost["exact"] / cost["sampled"]),
            20.0,
        ),
        Row(
            "sampled minus exact bits/dim",
            f"{gap.mean():+.4f}",
            f"standard error {gap_error:.4f}",
            float(gap.mean().abs()) / gap_error,
            3.0,
            at_most=True,
        ),
        Row(f"coverage of 95 % intervals, {seeds} seeds", f"{covered:.1%}", "95 %", float(covered) / 0.95, 0.9),
    ]


if __name__ == "__main__":
    print(show(tyro.cli(rows, description=__doc__)))
