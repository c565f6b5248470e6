"""Draw images from a trained model: `python -m pipeline.sample RUN`."""

import io
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from iddpm.config import DiffusionConfig
from iddpm.diffusion import Diffusion, Model
from iddpm.noise import normal, stream_key
from iddpm.sampling import ancestral
from iddpm.schedule import respace
from iddpm.unet import UNet
from pipeline.checkpoint import Checkpoints
from pipeline.config import LaunchConfig, TrainConfig, from_record, parse_flags
from pipeline.storage import StorageConfig, Store
from pipeline.world import World


@dataclass(frozen=True)
class Trained:
    """A checkpoint's model, with the weights of one moving average."""

    config: TrainConfig
    step: int
    meta: dict[str, Any]
    ema_rate: float
    model: UNet


def load_trained(
    url: str,
    storage: StorageConfig,
    device: torch.device,
    ema_rate: float | None = None,
    step: int | None = None,
) -> Trained:
    """The newest whole checkpoint (or that of `step`) of the run at `url`.

    `ema_rate`: which average; default the run's first, 0 for the weights themselves.
    Raises ValueError where the run has no checkpoint or no such average.
    """
    checkpoints = Checkpoints(Store(url, storage))
    records = [r for r in checkpoints.records() if r.kind == "checkpoint"]
    if not records:
        raise ValueError(f"{url}: no checkpoint there; expected the --out of a training run")
    rates = from_record(records[-1].meta["config"]).ema_rates
    rate = rates[0] if ema_rate is None else ema_rate
    if rate not in (0, *rates):
        raise ValueError(f"--ema-rate: got {rate}, the run has {', '.join(map(str, rates))}, or 0 for the weights")
    part = ema_part(rate) if rate else "model"
    found = checkpoints.newest(parts=(part,), step=step)
    assert found, "there are records"
    record, parts = found
    config = from_record(record.meta["config"])
    model = build_model(config)
    model.load_state_dict(parts[part])
    return Trained(config, record.step, record.meta, rate, model.to(device).eval())


def build_model(config: TrainConfig) -> UNet:
    """The network of a configuration, with the initial weights of its seed, on the CPU."""
    torch.manual_seed(stream_key(config.seed, "weights"))
    model = UNet(config.model, config.diffusion.out_channels(config.model.in_channels))
    return model.double() if config.precision == "fp64" else model


def ema_part(rate: float) -> str:
    """The name of an average's part in a checkpoint."""
    return f"ema-{rate:g}"


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """bf16 arithmetic within it, where that is the run's precision."""
    with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        yield


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> Model:
    """The model as it would be with other weights, which are not copied."""
    return lambda x, t, y=None: functional_call(model, weights, (x, t, y))


def draw(
    model: Model,
    diffusion: DiffusionConfig,
    shape: tuple[int, int, int],
    *,
    count: int,
    steps: int,
    seed: int,
    world: World,
    num_classes: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """`count` images by the strided ancestral chain: uint8 [count, C, H, W] on rank 0, None on the others.

    Image i depends on (seed, i) alone, so any world draws the same ones. Class-conditional models go through the
    classes in turn.
    """
    chain = Diffusion(diffusion, respace(diffusion.timesteps, str(steps)), world.device)
    lo, hi = world.share(count)
    images = []
    bar = tqdm(total=(hi - lo) * steps, unit="step", desc="sampling", disable=not progress or world.rank != 0)
    for start in range(lo, hi, batch_size):
        index = torch.arange(start, min(start + batch_size, hi), device=world.device)
        y = index % num_classes if num_classes is not None else None

        def noise(t: int, index: Tensor = index) -> Tensor:
            return normal(stream_key(seed, "z", t), index, shape).to(dtype)

        x = normal(stream_key(seed, "x_T"), index, shape).to(dtype)
        for step in ancestral(model, chain, x, noise, y):
            x = step.x
            bar.update(len(x))
        images.append(to_uint8(x).cpu())
    bar.close()
    shares = world.gather(torch.cat(images) if images else torch.empty(0, *shape, dtype=torch.uint8))
    return torch.cat(shares) if world.rank == 0 else None


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid_png(images: Tensor) -> bytes:
    """uint8 [N, C, H, W] as one PNG, near square; small images enlarged so that a person sees them."""
    n, _, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, 64 // height)
    gap = 2
    canvas = np.full((rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        tile = image.repeat(scale, 0).repeat(scale, 1)
        top = gap + i // columns * (height * scale + gap)
        left = gap + i % columns * (width * scale + gap)
        canvas[top : top + height * scale, left : left + width * scale] = tile  # grey spreads over RGB
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class SampleConfig:
    """Draw images from a trained model into a grid a person can open."""

    run: tyro.conf.Positional[str]
    """The run: the --out of its training, a folder or URL."""
    out: str = "samples.png"
    """PNG file to write."""
    count: int = 64
    """Images to draw."""
    steps: int | None = None
    """Steps of the strided ancestral chain; default: the run's --sample-steps."""
    seed: int = 0
    """Image i depends on the seed and i alone."""
    ema_rate: float | None = None
    """Which moving average of the weights; default: the run's first; 0: the weights themselves."""
    step: int | None = None
    """The checkpoint of this training step; default: the newest."""
    batch_size: int = 64
    """Images drawn at a time."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        for name in ("count", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected 1 or more")


def main(config: SampleConfig, world: World) -> None:
    trained = load_trained(config.run, config.storage, world.device, config.ema_rate, config.step)
    run = trained.config
    steps = run.sample_steps if config.steps is None else config.steps
    if not 1 <= steps <= run.diffusion.timesteps:
        raise ValueError(f"--steps: got {steps}, expected 1 to the run's T = {run.diffusion.timesteps}")
    with autocast(world.device, run.precision):
        images = draw(
            trained.model,
            run.diffusion,
            (run.model.in_channels, run.model.image_size, run.model.image_size),
            count=config.count,
            steps=steps,
            seed=config.seed,
            world=world,
            num_classes=run.model.num_classes,
            batch_size=config.batch_size,
            progress=True,
            dtype=next(trained.model.parameters()).dtype,
        )
    if images is not None:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_bytes(grid_png(images))
        print(f"{config.count} images, {steps} steps, EMA {trained.ema_rate:g}, step {trained.step}: {config.out}")


if __name__ == "__main__":
    from pipeline.world import run_main

    config = parse_flags(SampleConfig, sys.argv[1:], SampleConfig.__doc__ or "")
    run_main(lambda world: main(config, world), config.launch)
