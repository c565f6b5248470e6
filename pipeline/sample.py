"""Draw images from a trained model: `python -m pipeline.sample RUN`."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import tyro

from iddpm.bounds import Count, check_bounds
from pipeline.cli import parse_flags
from pipeline.config import LaunchConfig
from pipeline.distributed.world import World
from pipeline.drawing import Recipe, _classes, draw, interpolate
from pipeline.errors import InputError
from pipeline.images import batch_npz, grid_png
from pipeline.model import load_trained
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store, locate


def write_out(out: str, data: bytes, storage: StorageConfig) -> None:
    """Write a file to a path or URL."""
    store, name = locate(out, storage)
    store.write(name, data)


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
    store = Store(config.run, config.storage)
    trained = load_trained(store, world, config.ema_rate, config.step, fuse=config.launch.compile)
    run = trained.config
    steps = run.sample_steps if config.steps is None else config.steps
    recipe = Recipe("ddim" if config.between else config.sampler, steps, config.eta, config.seed)
    if config.progressive and config.progressive > steps:
        raise InputError(f"--progressive: got {config.progressive}, expected at most the {steps} steps of the chain")
    columns = config.progressive
    if config.between:
        images = interpolate(trained, recipe, config.between, config.count, world, config.classes)
        columns = config.count
    else:
        images = draw(
            trained,
            recipe,
            config.count,
            world,
            classes=config.classes,
            frames=config.progressive,
            batch_size=config.batch_size,
            progress=True,
        )

    def write() -> None:
        assert images is not None, "rank 0 has them"
        if config.out.endswith(".npz"):
            kinds = _classes(run, config.classes, torch.device("cpu"))
            if kinds is not None:
                kinds = kinds[torch.arange(len(images)) % (1 if config.between else len(kinds))]
            data = batch_npz(images.numpy(), kinds if kinds is None else kinds.numpy())
        else:
            data = grid_png((images.flatten(0, 1) if config.progressive else images).numpy(), columns)
        write_out(config.out, data, config.storage)

    world.only_on_rank0(write)
    world.say(
        f"{config.count} images, {recipe.sampler}, {steps} steps, EMA {trained.ema_rate:g}, step {trained.step}:"
        f" {config.out}"
    )


if __name__ == "__main__":
    from pipeline.distributed.launch import run_main

    config = parse_flags(SampleConfig, sys.argv[1:], SampleConfig.__doc__ or "")
    run_main(lambda world: main(config, world), config.launch)
