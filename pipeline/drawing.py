"""Draw images from a trained model, on any number of ranks."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from iddpm.bounds import Bound, Count, check_bounds
from iddpm.config import DiffusionConfig
from iddpm.diffusion import Diffusion
from iddpm.noise import normal, stream_key
from iddpm.sampling import Step, ancestral, ddim, ddim_invert, final, slerp
from iddpm.schedule import respace
from pipeline.config import TrainConfig
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.images import read_image
from pipeline.model import Trained, autocast, from_uint8, to_uint8


@dataclass(frozen=True)
class Recipe:
    """How to draw images; together with a model's weights, it determines each image."""

    sampler: Literal["ancestral", "ddim"]
    steps: Count
    eta: Annotated[float, Bound(lambda eta: 0 <= eta <= 1, "0 to 1")]
    seed: int
    classes: tuple[int, ...] | None = None
    """Classes that a class-conditional model cycles through; None: all."""
    frames: int = 0
    """If not 0: instead of each image, the x_start predicted at this many steps of the chain, including the last."""

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)
        if self.eta and self.sampler != "ddim":
            raise InputError(f"--eta: got {self.eta}, which only --sampler ddim supports")

    def chain(self, config: DiffusionConfig, device: torch.device) -> Diffusion:
        """Return the process with this recipe's number of steps, evenly spaced over the run's."""
        if self.steps > config.timesteps:
            raise InputError(f"--steps: got {self.steps}, expected 1 to the run's T = {config.timesteps}")
        return Diffusion(config, respace(config.timesteps, str(self.steps)), device)

    def labels(self, config: TrainConfig, index: Tensor) -> Tensor | None:
        """Return the classes of the images with these numbers, int64 [n]; None for a model without classes.

        Raises InputError if the model lacks one of the recipe's classes.
        """
        count = config.model.num_classes
        if count is None:
            if self.classes:
                raise InputError(
                    f"--classes: got {list(self.classes)}, expected none: the model is not class-conditional"
                )
            return None
        if self.classes and not 0 <= min(self.classes) <= max(self.classes) < count:
            raise InputError(f"--classes: got {list(self.classes)}, expected 0 to {count - 1}")
        classes = torch.tensor(self.classes or range(count), device=index.device)
        return classes[index % len(classes)]

    def run(self, trained: Trained, chain: Diffusion, index: Tensor) -> Iterator[Step]:
        """Yield the steps that draw the images with these numbers (int64 [n]); an image depends on seed and number."""
        noise = partial(_noise, trained, index, self.seed)
        x_T, z = noise("x_T"), partial(noise, "z")
        y = self.labels(trained.config, index)
        if self.sampler == "ddim":
            return ddim(trained.model, chain, x_T, self.eta, z, y)
        return ancestral(trained.model, chain, x_T, z, y)


def _noise(trained: Trained, index: Tensor, seed: int, *stream: str | int) -> Tensor:
    """Return the standard normal noise of the images with these numbers, in one of the seed's streams."""
    return normal(stream_key(seed, *stream), index, trained.shape).to(trained.dtype)


def draw_batches(
    trained: Trained, recipe: Recipe, chain: Diffusion, lo: int, hi: int, batch_size: int = 64, progress: bool = False
) -> Iterator[Tensor]:
    """Yield images lo .. hi-1 as uint8 [n, C, H, W] on the chain's device, `batch_size` at a time.

    `chain` is usually the recipe's own. If the recipe has frames, yields uint8 [n, frames, C, H, W].
    """
    device, steps, frames = chain.betas.device, chain.num_timesteps, recipe.frames
    kept = {round(i * (steps - 1) / max(frames - 1, 1)) for i in range(frames)}
    bar = tqdm(total=(hi - lo) * steps, unit="step", desc="sampling", disable=None if progress else True)
    with closing(bar):
        for start in range(lo, hi, batch_size):
            index = torch.arange(start, min(start + batch_size, hi), device=device)
            seen = []
            with autocast(device, trained.config.precision):
                for step in recipe.run(trained, chain, index):
                    if step.t in kept:
                        seen.append(to_uint8(step.pred_xstart))
                    bar.update(len(index))
            yield torch.stack(seen, dim=1) if frames else to_uint8(step.x)


def draw(
    trained: Trained, recipe: Recipe, count: int, world: World, batch_size: int = 64, progress: bool = False
) -> Tensor | None:
    """Draw `count` images, split over the ranks, like `draw_batches`; on rank 0's CPU, None on the other ranks."""
    chain = recipe.chain(trained.config.diffusion, world.device)
    lo, hi = world.share(count)
    batches = draw_batches(trained, recipe, chain, lo, hi, batch_size, progress and world.rank == 0)
    return _collect(batches, world)


def _collect(batches: Iterator[Tensor], world: World) -> Tensor | None:
    """Concatenate the ranks' images in rank order, on rank 0."""
    shares = world.to_rank0(lambda: [batch.cpu() for batch in batches])
    return torch.cat([batch for share in shares for batch in share]) if world.rank == 0 else None


def interpolate(trained: Trained, recipe: Recipe, ends: tuple[str, str], count: int, world: World) -> Tensor | None:
    """Draw `count` images between two ends by slerp of x_T and DDIM (appendix D.5): uint8 on rank 0, else None.

    An end is a seed, meaning its first image, or a PNG file, whose x_T is found by inversion (section 4.3). All images
    have the class of the recipe's first.
    """
    config, device = trained.config, world.device
    chain = recipe.chain(config.diffusion, device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    y = recipe.labels(config, first)

    def latent(end: str) -> Tensor:
        if end.isdecimal():
            return _noise(trained, first, int(end), "x_T")
        pixels = torch.tensor(read_image(end, trained.shape), device=device)
        x = from_uint8(pixels[None], trained.dtype)
        return final(ddim_invert(trained.model, chain, x, y))

    def images() -> Iterator[Tensor]:
        with autocast(device, config.precision):
            # Every rank finds both ends, then draws its share of the way between them.
            a, b = map(latent, ends)
            for i in range(*world.share(count)):
                x_T = slerp(a, b, i / max(count - 1, 1))
                yield to_uint8(final(ddim(trained.model, chain, x_T, y=y)))

    return _collect(images(), world)
