"""Draw images from a trained model: `python -m pipeline.sample RUN`."""

import io
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

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
from iddpm.sampling import Step, ancestral, ddim, ddim_invert, final, slerp
from iddpm.schedule import respace
from iddpm.unet import UNet
from pipeline.checkpoint import Checkpoints
from pipeline.config import LaunchConfig, TrainConfig, from_record, parse_flags
from pipeline.storage import StorageConfig, Store, locate
from pipeline.world import World


@dataclass(frozen=True)
class Trained:
    """A checkpoint's model, with the weights of one moving average."""

    config: TrainConfig
    step: int
    meta: dict[str, Any]
    ema_rate: float
    model: Model
    digest: str = ""
    """sha256 of the weights' file."""

    @property
    def identity(self) -> list[object]:
        """Everything that its measurements depend on."""
        return [self.meta.get("uid"), self.step, self.ema_rate, self.digest]

    @property
    def shape(self) -> tuple[int, int, int]:
        return image_shape(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the model's input images."""
        return torch.float64 if self.config.precision == "fp64" else torch.float32


def image_shape(config: TrainConfig) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of a run's images."""
    return config.model.in_channels, config.model.image_size, config.model.image_size


@dataclass(frozen=True)
class Recipe:
    """How to draw images; together with a model's weights, it determines each image."""

    sampler: Literal["ancestral", "ddim"]
    steps: int
    eta: float
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps: got {self.steps}, expected 1 or more")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"--eta: got {self.eta}, expected 0 to 1")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"--eta: got {self.eta}, which only --sampler ddim supports")

    def chain(self, config: DiffusionConfig, device: torch.device) -> Diffusion:
        """Return the process with this recipe's number of steps, evenly spaced over the run's."""
        if self.steps > config.timesteps:
            raise ValueError(f"--steps: got {self.steps}, expected 1 to the run's T = {config.timesteps}")
        return Diffusion(config, respace(config.timesteps, str(self.steps)), device)

    def run(self, trained: Trained, chain: Diffusion, index: Tensor, y: Tensor | None = None) -> Iterator[Step]:
        """Yield the steps that draw the images with these numbers (int64 [n]); an image depends on seed and number."""

        def noise(t: int | str) -> Tensor:
            names = ("z", t) if isinstance(t, int) else (t,)
            return normal(stream_key(self.seed, *names), index, trained.shape).to(trained.dtype)

        if self.sampler == "ddim":
            return ddim(trained.model, chain, noise("x_T"), self.eta, noise, y)
        return ancestral(trained.model, chain, noise("x_T"), noise, y)


def load_trained(
    url: str,
    storage: StorageConfig,
    world: World,
    ema_rate: float | None = None,
    step: int | None = None,
    *,
    fuse: bool = False,
) -> Trained:
    """Load the newest intact checkpoint (or the one at `step`) of the run at `url`.

    `ema_rate` chooses the moving average (default: the run's first; 0: the weights themselves); `fuse` compiles as
    --compile does. Raises ValueError if the run has no checkpoint or no such average.
    """
    checkpoints = Checkpoints(Store(url, storage))
    records = [r for r in checkpoints.records() if r.kind == "checkpoint"]
    if not records:
        raise ValueError(f"{url}: got no checkpoint, expected the --out of a training run")
    rates = from_record(records[-1].meta["config"]).ema_rates
    rate = rates[0] if ema_rate is None else ema_rate
    if rate not in (0, *rates):
        raise ValueError(f"--ema-rate: got {rate}, expected {', '.join(map(str, rates))}, or 0 for the weights")
    part = ema_part(rate) if rate else "model"
    found = world.only_on_rank0(lambda: checkpoints.newest(parts=(part,), step=step))
    # Rank 0 chooses for all ranks: another checkpoint may be committed meanwhile.
    chosen = world.broadcast_object(found[0].step if found else None)
    found = found or checkpoints.newest(parts=(part,), step=chosen)
    assert found, "there are records"
    record, parts = found
    config = from_record(record.meta["config"])
    model = build_model(config)
    model.load_state_dict(parts[part])
    if fuse:
        model.fuse()
    digest = record.parts[part]["sha256"]
    return Trained(config, record.step, record.meta, rate, model.to(world.device).eval(), digest)


def build_model(config: TrainConfig) -> UNet:
    """Build a configuration's network on the CPU, with initial weights from its seed."""
    torch.manual_seed(stream_key(config.seed, "weights"))
    model = UNet(config.model, config.out_channels)
    model.to(memory_format=torch.channels_last)  # fastest for convolutions; activations follow the weights
    return model.double() if config.precision == "fp64" else model


def ema_part(rate: float) -> str:
    """Return the name of a moving average's part in a checkpoint."""
    return f"ema-{rate:g}"


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Use bf16 arithmetic within the context, if that is the run's precision."""
    with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        yield


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> Model:
    """Return the model with other weights, without copying them."""
    return lambda x, t, y=None: functional_call(model, weights, (x, t, y))


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
            raise ValueError(f"--classes: got {list(classes)}, expected none: the model is not class-conditional")
        return None
    if classes and not 0 <= min(classes) <= max(classes) < count:
        raise ValueError(f"--classes: got {list(classes)}, expected 0 to {count - 1}")
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
        x = torch.from_numpy(_read_image(end, trained.shape)).to(device, trained.dtype)[None] / 127.5 - 1
        return final(ddim_invert(trained.model, chain, x, y))

    def images() -> Iterator[Tensor]:
        with autocast(device, config.precision):
            a, b = map(latent, ends)
            for i in range(*world.share(count)):
                x_T = slerp(a, b, i / max(count - 1, 1))
                yield to_uint8(final(ddim(trained.model, chain, x_T, y=y))).cpu()

    return _collect(images(), world)


def _read_image(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Read an image as uint8 [C, H, W]. Raises ValueError if it has another size."""
    channels, height, width = shape
    with Image.open(path) as picture:
        if picture.size != (width, height):
            got = "x".join(map(str, picture.size))
            raise ValueError(f"{path}: got an image of {got} pixels, expected the run's {width}x{height}")
        pixels = np.array(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid_png(images: Tensor, columns: int | None = None) -> bytes:
    """Encode uint8 [N, C, H, W] as one nearly square PNG; small images are enlarged to 64 pixels."""
    from torchvision.utils import make_grid

    scale = max(1, 64 // images.shape[2])
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(large, columns or math.ceil(math.sqrt(len(images))), pad_value=255)
    buffer = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def batch_npz(images: Tensor, labels: Tensor | None = None) -> bytes:
    """Encode uint8 [N, C, H, W] as the guided-diffusion evaluator's sample batch: arr_0 [N, H, W, C], labels arr_1."""
    arrays = [images.permute(0, 2, 3, 1).numpy(), *([labels.numpy()] if labels is not None else [])]
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    return buffer.getvalue()


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
    count: int = 64
    """Images to draw."""
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    """IDDPM's own sampler, or DDIM, which is better below about 50 steps."""
    steps: int | None = None
    """Steps of the strided chain; default: the run's --sample-steps."""
    eta: float = 0.0
    """DDIM's η: 0 is deterministic, 1 has the posterior's variance."""
    classes: tuple[int, ...] | None = None
    """Classes to cycle through, for a class-conditional model; default: all."""
    seed: int = 0
    """Random seed; image i depends only on the seed and i."""
    progressive: int | None = None
    """Show each image as a row of this many intermediate predictions of x_0."""
    between: tuple[str, str] | None = None
    """Interpolate with DDIM, in `count` images, between two seeds, e.g. `--between 3 7`, or two PNG files."""
    ema_rate: float | None = None
    """Decay rate of the moving average to use; default: the run's first; 0: the weights themselves."""
    step: int | None = None
    """Training step of the checkpoint; default: the newest."""
    batch_size: int = 64
    """Images drawn at a time."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "progressive", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected 1 or more")
        if not self.out.endswith((".png", ".npz")):
            raise ValueError(f"--out: got {self.out!r}, expected a name ending in .png or .npz")
        if self.between and (self.progressive or self.eta):
            raise ValueError("--between: cannot be combined with --progressive or --eta; it uses deterministic DDIM")
        if self.progressive and self.out.endswith(".npz"):
            raise ValueError("--progressive: needs a .png --out; an .npz holds only final samples")


def main(config: SampleConfig, world: World) -> None:
    trained = load_trained(config.run, config.storage, world, config.ema_rate, config.step, fuse=config.launch.compile)
    run = trained.config
    steps = run.sample_steps if config.steps is None else config.steps
    recipe = Recipe("ddim" if config.between else config.sampler, steps, config.eta, config.seed)
    if config.progressive and config.progressive > steps:
        raise ValueError(f"--progressive: got {config.progressive}, expected at most the {steps} steps of the chain")
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
            data = batch_npz(images, kinds)
        else:
            data = grid_png(images.flatten(0, 1) if config.progressive else images, columns)
        write_out(config.out, data, config.storage)

    world.only_on_rank0(write)
    world.say(
        f"{config.count} images, {recipe.sampler}, {steps} steps, EMA {trained.ema_rate:g}, step {trained.step}:"
        f" {config.out}"
    )


if __name__ == "__main__":
    from pipeline.world import run_main

    config = parse_flags(SampleConfig, sys.argv[1:], SampleConfig.__doc__ or "")
    run_main(lambda world: main(config, world), config.launch)
