"""Measure a trained model: `python -m pipeline.evaluate RUN` prints exact bits/dim on the validation shards."""

import csv
import io
import math
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from iddpm.diffusion import Diffusion, Model
from iddpm.likelihood import exact_bpd
from iddpm.noise import normal, stream_key
from pipeline.config import LaunchConfig, parse_flags
from pipeline.data import load_index, samples
from pipeline.hardware import DTYPES
from pipeline.sample import autocast, load_trained
from pipeline.storage import StorageConfig, Store
from pipeline.world import World


@dataclass(frozen=True)
class Nll:
    """Bits/dim of N images, with what they are made of."""

    total: Tensor
    """[N]: the variational bound of each image."""
    prior: Tensor
    """[N]"""
    vb: Tensor
    """[T]: the mean term of each timestep; the first is the decoder's."""
    mse: Tensor
    """[T]: the mean squared error of the predicted noise at each timestep."""

    @property
    def mean(self) -> float:
        return self.total.mean().item()

    @property
    def standard_error(self) -> float:
        """Of the mean, by the spread over images."""
        return self.total.std().item() / math.sqrt(len(self.total)) if len(self.total) > 1 else math.nan


def exact_nll(
    model: Model,
    diffusion: Diffusion,
    images: Tensor,
    labels: Tensor | None,
    world: World,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    images_per_call: int = 16,
    timesteps_per_call: int = 32,
    progress: bool = False,
) -> Nll | None:
    """The bound with all its T terms for uint8 images [N, C, H, W], shared out over the ranks; None on ranks above 0.

    The noise of image i at timestep t depends on (seed, i, t) alone: any world gives the same numbers.
    """
    lo, hi = world.share(len(images))
    parts = []
    bar = tqdm(total=hi - lo, unit="image", desc="bits/dim", disable=not progress or world.rank != 0)
    for start in range(lo, hi, images_per_call):
        index = torch.arange(start, min(start + images_per_call, hi))
        x = images[index].to(world.device).to(dtype) / 127.5 - 1
        y = labels[index].to(world.device) if labels is not None else None

        def noise(t: int, index: Tensor = index, x: Tensor = x) -> Tensor:
            key = stream_key(seed, "bpd", t)
            return normal(key, index.to(x.device), x.shape[1:]).to(x.dtype)

        with torch.no_grad():
            found = exact_bpd(diffusion, model, x, noise, y, timesteps_per_call=timesteps_per_call)
        parts.append([part.double().cpu() for part in (found.total, found.prior, found.vb, found.mse)])
        bar.update(len(index))
    bar.close()
    gathered = [part for share in world.gather(parts) for part in share]
    if world.rank != 0:
        return None
    total, prior, vb, mse = (torch.cat(column) for column in zip(*gathered, strict=True))
    return Nll(total, prior, vb.mean(0), mse.mean(0))


@dataclass(frozen=True)
class EvaluateConfig:
    """Exact bits/dim of a trained model on its validation shards, with the terms of the bound by timestep."""

    run: tyro.conf.Positional[str]
    """The run: the --out of its training, a folder or URL."""
    images: int | None = 64
    """How many validation images, from the first on; 'None' for all. The cost is T network evaluations an image."""
    split: str = "val"
    """Which shards."""
    data: str | None = None
    """Folder or URL of the shards; default: where the run was trained from."""
    seed: int = 0
    """Seed of the noise."""
    ema_rate: float | None = None
    """Which moving average of the weights; default: the run's first; 0: the weights themselves."""
    step: int | None = None
    """The checkpoint of this training step; default: the newest."""
    images_per_call: int = 16
    """Images in one forward pass, each at `timesteps_per_call` timesteps."""
    timesteps_per_call: int = 32
    """Timesteps of each image in one forward pass."""
    out: str | None = None
    """Write the terms by timestep to this CSV file too."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        for name in ("images", "images_per_call", "timesteps_per_call"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected 1 or more")


def main(config: EvaluateConfig, world: World) -> None:
    trained = load_trained(config.run, config.storage, world.device, config.ema_rate, config.step)
    run = trained.config
    store = Store(config.data or run.data.url, config.storage)
    index = load_index(store, config.split)
    expected = (run.model.in_channels, run.model.image_size, run.model.image_size)
    if index.shape != expected:
        raise ValueError(f"{store.url}: its images are {index.shape} (channels, height, width), the run's {expected}")
    n = min(config.images or index.num_samples, index.num_samples)
    images, labels = samples(store, index, range(n))
    with autocast(world.device, run.precision):
        nll = exact_nll(
            trained.model,
            Diffusion(run.diffusion, device=world.device),
            images,
            labels if run.model.num_classes is not None else None,
            world,
            seed=config.seed,
            dtype=DTYPES["fp64" if run.precision == "fp64" else "fp32"],
            images_per_call=config.images_per_call,
            timesteps_per_call=config.timesteps_per_call,
            progress=True,
        )
    if nll is None:
        return
    print(report(nll))
    print(f"(step {trained.step}, EMA {trained.ema_rate:g}, {n} images of {config.split!r}, seed {config.seed})")
    if config.out:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["timestep", "vb_bits_per_dim", "eps_mse"])
        writer.writerows(zip(range(len(nll.vb)), nll.vb.tolist(), nll.mse.tolist(), strict=True))
        folder, _, name = config.out.rpartition("/")
        Store(folder or ".", config.storage).write(name, table.getvalue().encode())


def report(nll: Nll) -> str:
    """The total and where it comes from, as text."""
    steps = len(nll.vb)
    lines = [
        f"bits/dim  {nll.mean:.4f} +- {nll.standard_error:.4f} (standard error over {len(nll.total)} images)",
        f"  prior       L_T    {nll.prior.mean():.6f}",
        f"  decoder     L_0    {nll.vb[0]:.4f}",
    ]
    edges = sorted({1, *(round(steps * q / 4) for q in (1, 2, 3, 4))})
    for lo, hi in pairwise(edges):
        label = f"t = {lo}..{hi - 1}"
        lines.append(f"  {label:18s} {nll.vb[lo:hi].sum():.4f}   (noise mse {nll.mse[lo:hi].mean():.4f})")
    return "\n".join(lines)


if __name__ == "__main__":
    from pipeline.world import run_main

    config = parse_flags(EvaluateConfig, sys.argv[1:], EvaluateConfig.__doc__ or "")
    run_main(lambda world: main(config, world), config.launch)
