"""Draw images from a trained model, on any number of ranks."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
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

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)
        if self.eta and self.sampler != "ddim":
            raise InputError(f"--eta: got {self.eta}, which only --sampler ddim supports")

    def chain(self, config: DiffusionConfig, device: torch.device) -> Diffusion:
        """Return the process with this recipe's number of steps, evenly spaced over the run's."""
        if self.steps > config.timesteps:
            raise InputError(f"--steps: got {self.steps}, expected 1 to the run's T = {config.timesteps}")
        return Diffusion(config, respace(config.timesteps, str(self.steps)), device)

    def run(self, trained: Trained, chain: Diffusion, index: Tensor, y: Tensor | None = None) -> Iterator[Step]:
        """Yield the steps that draw the images with these numbers (int64 [n]); an image depends on seed and number."""

        def noise(t: int | str) -> Tensor:
            names = ("z", t) if isinstance(t, int) else (t,)
            return normal(stream_key(self.seed, *names), index, trained.shape).to(trained.dtype)

        if self.sampler == "ddim":
            return ddim(trained.model, chain, noise("x_T"), self.eta, noise, y)
        return ancestral(trained.model, chain, noise("x_T"), noise, y)


def draw_batches(
    trained: Trained,
    recipe: Recipe,
    lo: int,
    hi: int,
    *,
    device: torch.device,
    chain: Diffusion | None = None,
    classes: Sequence[int] | None = None,
    frames: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Yield images lo .. hi-1 as uint8 [n, C, H, W] on the device, `batch_size` at a time.

    `chain` replaces the recipe's evenly spaced chain. With `frames`, yields uint8 [n, frames, C, H, W]: the x_start
    predicted at that many steps of the chain, including the last. Class-conditional models cycle through `classes`
    (default: all).
    """
    config, chain = trained.config, chain or recipe.chain(trained.config.diffusion, device)
    kept = {round(i * (recipe.steps - 1) / max(frames - 1, 1)) for i in range(frames)} if frames else set()
    kinds = _classes(config, classes, device)
    bar = tqdm(total=(hi - lo) * chain.num_timesteps, unit="step", desc="sampling", disable=None if progress else True)
    with closing(bar):
        for start in range(lo, hi, batch_size):
            index = torch.arange(start, min(start + batch_size, hi), device=device)
            y = kinds[index % len(kinds)] if kinds is not None else None
            seen = []
            with autocast(device, config.precision):
                for step in recipe.run(trained, chain, index, y):
                    if step.t in kept:
                        seen.append(to_uint8(step.pred_xstart))
                    bar.update(len(index))
            yield torch.stack(seen, dim=1) if frames else to_uint8(step.x)


def draw(
    trained: Trained,
    recipe: Recipe,
    count: int,
    world: World,
    *,
    classes: Sequence[int] | None = None,
    frames: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor | None:
    """Draw `count` images, split over the ranks, like `draw_batches`; on rank 0's CPU, None on the other ranks."""
    batches = draw_batches(
        trained,
        recipe,
        *world.share(count),
        device=world.device,
        classes=classes,
        frames=frames,
        batch_size=batch_size,
        progress=progress and world.rank == 0,
    )
    return _collect((batch.cpu() for batch in batches), world)


def _collect(mine: Iterator[Tensor], world: World) -> Tensor | None:
    """Concatenate the ranks' images in rank order, on rank 0."""

    def own() -> Tensor | None:
        drawn = list(mine)
        return torch.cat(drawn) if drawn else None

    shares = world.to_rank0(own)
    return torch.cat([share for share in shares if share is not None]) if world.rank == 0 else None


def _classes(config: TrainConfig, classes: Sequence[int] | None, device: torch.device) -> Tensor | None:
    count = config.model.num_classes
    if count is None:
        if classes:
            raise InputError(f"--classes: got {list(classes)}, expected none: the model is not class-conditional")
        return None
    if classes and not 0 <= min(classes) <= max(classes) < count:
        raise InputError(f"--classes: got {list(classes)}, expected 0 to {count - 1}")
    return torch.tensor(classes or range(count), device=device)


def interpolate(
    trained: Trained,
    recipe: Recipe,
    ends: tuple[str, str],
    count: int,
    world: World,
    classes: Sequence[int] | None = None,
) -> Tensor | None:
    """Draw `count` images between two ends by slerp of x_T and DDIM (appendix D.5): uint8 on rank 0, else None.

    An end is a seed, meaning its first image, or a PNG file, whose x_T is found by inversion (section 4.3).
    """
    config, device = trained.config, world.device
    chain = recipe.chain(config.diffusion, device)
    kinds = _classes(config, classes, device)
    y = kinds[:1] if kinds is not None else None

    def latent(end: str) -> Tensor:
        if end.isdecimal():
            first = torch.zeros(1, dtype=torch.int64, device=device)
            return normal(stream_key(int(end), "x_T"), first, trained.shape).to(trained.dtype)
        image = torch.tensor(read_image(end, trained.shape), device=device)
        x = from_uint8(image[None], trained.dtype)
        return final(ddim_invert(trained.model, chain, x, y))

    def images() -> Iterator[Tensor]:
        with autocast(device, config.precision):
            a, b = map(latent, ends)
            for i in range(*world.share(count)):
                x_T = slerp(a, b, i / max(count - 1, 1))
                yield to_uint8(final(ddim(trained.model, chain, x_T, y=y))).cpu()

    return _collect(images(), world)
