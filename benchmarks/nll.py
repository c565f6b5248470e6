"""Does the sampled bits/dim keep its word? `python benchmarks/nll.py RUN [--images 64] [--seeds 200]`.

Takes some validation images as the whole population and computes their exact bits/dim. Then, for each seed, draws half
as many of them with replacement, as an evaluation draws images from a distribution, and estimates. Printed: whether
the mean over all seeds agrees with the exact value, how often the 95 % interval covers it, and how many network
evaluations each way takes for a standard error of 0.01 bits/dim.
"""

import argparse
import math
import time

import torch
from torch import Tensor

from iddpm.diffusion import Diffusion
from iddpm.likelihood import exact_bpd, pilot_distribution, pilot_sizes, sampled_bpd
from iddpm.noise import normal, stream_key, uniform
from pipeline.data import load_index, samples
from pipeline.passport import NORMAL_95
from pipeline.sample import load_trained
from pipeline.storage import StorageConfig, Store

SE = 0.01  # bits/dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", help="default: where the run was trained from")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--draws", type=int, default=16)
    options = parser.parse_args()

    trained = load_trained(options.run, StorageConfig(), torch.device("cpu"))
    diffusion, model, steps = Diffusion(trained.config.diffusion), trained.model, trained.config.diffusion.timesteps
    store = Store(options.data or trained.config.data.url)
    population = options.images
    pixels, _ = samples(store, load_index(store, "val"), range(population))
    x = pixels.float() / 127.5 - 1
    everyone = torch.arange(population)

    def noise(seed: int, index: Tensor, t: Tensor | int) -> Tensor:
        return normal(stream_key(seed, "benchmark"), index * steps + t, trained.shape)

    # Twice, with other noise, because the bound is an expectation over noise: one evaluation has an error as well.
    start = time.perf_counter()
    twice = [exact_bpd(diffusion, model, x, lambda t, i=i: noise(i, everyone, t)).total.double() for i in (-1, -3)]
    exact = (twice[0] + twice[1]) / 2
    exact_error = (twice[0] - twice[1]).std() / 2 / math.sqrt(population)
    print(
        f"exact: {exact.mean():.4f} +- {exact_error:.4f} (noise) bits/dim over {population} images,"
        f" sd {exact.std():.3f}"
    )
    print(f"  {2 * population * steps:,} network evaluations ({time.perf_counter() - start:.0f} s)")

    few = everyone[:16]
    p = pilot_distribution(pilot_sizes(diffusion, model, x[few], lambda t: noise(-2, few, t)))
    pilot = 16 * 80
    means, errors, gaps, n = [], [], [], population // 2
    start = time.perf_counter()
    for seed in range(options.seeds):
        order = torch.arange(n)
        chosen = (uniform(stream_key(seed, "choice"), order) * population).long()
        u = uniform(stream_key(seed, "u"), order)

        def eps(i: Tensor, t: Tensor, seed: int = seed) -> Tensor:
            return noise(seed, i, t)  # by the place in the sample: an image that is drawn twice has new noise

        total = sampled_bpd(diffusion, model, x[chosen], eps, u, p, options.draws).total
        means.append(total.mean())
        gaps.append((total - exact[chosen]).mean())
        errors.append(total.std() / math.sqrt(n))
    mean, error = torch.stack(means), torch.stack(errors)
    evaluations = options.seeds * n * (options.draws + 1)
    print(f"sampled: {options.seeds} seeds of {n} images, {evaluations:,} evaluations")
    spread = mean.std() / math.sqrt(options.seeds)
    gap = torch.stack(gaps)
    gap_error = math.hypot(gap.std() / math.sqrt(options.seeds), exact_error)
    print(
        f"  mean over seeds {mean.mean():.4f} +- {spread:.4f}, {(mean.mean() - exact.mean()) / spread:+.2f} standard"
        " errors from exact"
    )
    print(
        f"  minus exact on the very images drawn {gap.mean():+.4f} +- {gap_error:.4f},"
        f" {gap.mean() / gap_error:+.2f} standard errors"
    )
    covered = ((mean - exact.mean()).abs() <= NORMAL_95 * error).double().mean()
    print(f"  the 95 % interval covers the exact value in {covered:.1%} of seeds")
    print(f"  standard error: {error.mean():.4f} as estimated, {mean.std():.4f} as the seeds have it")

    images = {"exact": (exact.std() / SE) ** 2, "sampled": (error.mean() * math.sqrt(n) / SE) ** 2}
    cost = {"exact": images["exact"] * steps, "sampled": images["sampled"] * (options.draws + 1) + pilot}
    print(f"for a standard error of {SE} bits/dim:")
    for name in images:
        print(f"  {name:8s} {images[name]:8,.0f} images {cost[name]:12,.0f} network evaluations")
    print(f"  ratio {cost['exact'] / cost['sampled']:.1f}")


if __name__ == "__main__":
    main()
