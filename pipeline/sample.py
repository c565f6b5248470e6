"""Draw images from a trained model: `python -m pipeline.sample RUN`."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from iddpm.bounds import Count, check_bounds
from pipeline.cli import parse_flags
from pipeline.config import LaunchConfig
from pipeline.distributed.world import World
from pipeline.drawing import Recipe, draw, interpolate
from pipeline.errors import InputError
from pipeline.images import batch_npz, grid_png
from pipeline.model import load_trained
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store, write_file


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from a trained model, on one or several workers; the images do not depend on their number."""

    run: tyro.conf.Positional[str]
    """The run: the --out of its training, a folder or URL."""
    out: str = "samples.png"
    """File or URL to write: .png: a grid; .npz: uint8 [N, H, W, C] as arr_0, for evaluators (labels, if any, as arr_1).
    """
    count: Count = 64
    """Images to draw."""
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    """IDDPM's own sampler, or DDIM, which is better below about 50 steps."""
    steps: Count | None = None
    """Steps of the strided chain; default: the run's --sample-steps."""
    eta: float = 0.0
    """DDIM's η: 0 is deterministic, 1 has the posterior's variance."""
    classes: tuple[int, ...] | None = None
    """Classes to cycle through, for a class-conditional model; default: all."""
    seed: int = 0
    """Random seed; image i depends only on the seed and i."""
    progressive: Count | None = None
    """Show each image as a row of this many intermediate predictions of x_0."""
    between: tuple[str, str] | None = None
    """Interpolate with DDIM, in `count` images, between two seeds, e.g. `--between 3 7`, or two PNG files."""
    ema_rate: float | None = None
    """Decay rate of the moving average to use; default: the run's first; 0: the weights themselves."""
    step: int | None = None
    """Training step of the checkpoint; default: the newest."""
    batch_size: Count = 64
    """Images drawn at a time."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)
        if not self.out.endswith((".png", ".npz")):
            raise InputError(f"--out: got {self.out!r}, expected a name ending in .png or .npz")
        if self.between and (self.progressive or self.eta):
            raise InputError("--between: cannot be combined with --progressive or --eta; it uses deterministic DDIM")
        if self.progressive and self.out.endswith(".npz"):
            raise InputError("--progressive: needs a .png --out; an .npz holds only final samples")


def main(config: SampleConfig, world: World) -> None:
    # What to draw: mistakes are reported before anything is drawn.
    run = Store(config.run, config.storage)
    trained = load_trained(run, world, config.ema_rate, config.step, fuse=config.launch.compile)
    steps, frames = config.steps or trained.config.sample_steps, config.progressive or 0
    sampler = "ddim" if config.between else config.sampler
    recipe = Recipe(sampler, steps, config.eta, config.seed, config.classes, frames)
    if frames > steps:
        raise InputError(f"--progressive: got {frames}, expected at most the {steps} steps of the chain")
    numbers = torch.arange(config.count)
    labels = recipe.labels(trained.config, torch.zeros_like(numbers) if config.between else numbers)

    # The images, on rank 0, which writes them.
    if config.between:
        images = interpolate(trained, recipe, config.between, config.count, world)
    else:
        images = draw(trained, recipe, config.count, world, config.batch_size, progress=True)
    world.only_on_rank0(lambda: write_file(config.out, _encode(config, images, labels), config.storage))
    world.say(
        f"{config.count} images, {recipe.sampler}, {steps} steps, EMA {trained.ema_rate:g}, step {trained.step}:"
        f" {config.out}"
    )


def _encode(config: SampleConfig, images: Tensor | None, labels: Tensor | None) -> bytes:
    assert images is not None, "rank 0 has them"
    if config.out.endswith(".npz"):
        return batch_npz(images.numpy(), labels.numpy() if labels is not None else None)
    if config.progressive:
        return grid_png(images.flatten(0, 1).numpy(), config.progressive)
    return grid_png(images.numpy(), config.count if config.between else None)


if __name__ == "__main__":
    from pipeline.distributed.launch import run_main

    config = parse_flags(SampleConfig, sys.argv[1:], SampleConfig.__doc__ or "")
    run_main(lambda world: main(config, world), config.launch)
