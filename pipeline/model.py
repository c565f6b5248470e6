"""Build a run's network, and load it from a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from iddpm.diffusion import Model
from iddpm.ema import without_initial
from iddpm.noise import stream_key
from iddpm.unet import UNet
from pipeline.config import TrainConfig, from_record
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.run.checkpoint import AVERAGES, Checkpoints, Parts
from pipeline.storage.store import Store


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
    def weights(self) -> dict[str, Any]:
        """Passport of the weights: the rate of their average (0: not averaged), and how it was taken."""
        averaged = self.ema_rate > 0 and self.step > 0  # published weights, at step 0, are averages as published
        return {"ema": self.ema_rate} | ({"averages": AVERAGES} if averaged else {})

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images."""
        return self.config.image_shape

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the model's input images."""
        return input_dtype(self.config)


def input_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of a network's input images: autocast makes them bf16."""
    return torch.float64 if config.precision == "fp64" else torch.float32


def load_trained(
    run: Store,
    world: World,
    ema_rate: float | None = None,
    step: int | None = None,
    *,
    fuse: bool = False,
) -> Trained:
    """Load the newest intact checkpoint (or the one at `step`) of a run.

    `ema_rate` chooses the moving average (default: the run's first; 0: the weights themselves); `fuse` compiles as
    --compile does. Raises InputError if the run has no checkpoint or no such average.
    """
    checkpoints = Checkpoints(run)
    committed = checkpoints.committed()
    if not committed:
        raise InputError(f"{run}: got no checkpoint, expected the --out of a training run")
    rates = from_record(committed[-1].meta["config"]).ema_rates
    rate = rates[0] if ema_rate is None else ema_rate
    if rate not in (0, *rates):
        raise InputError(f"--ema-rate: got {rate}, expected {', '.join(map(str, rates))}, or 0 for the weights")

    # Rank 0 chooses the checkpoint for all ranks: another may be committed meanwhile.
    part = ema_part(rate) if rate else "model"
    loaded = world.only_on_rank0(lambda: checkpoints.load((part,), step))
    chosen = world.broadcast_object(loaded[0].step if loaded else None)
    loaded = loaded or checkpoints.load((part,), chosen)
    assert loaded, "there are checkpoints"
    checkpoint, parts = loaded

    config = from_record(checkpoint.meta["config"])
    digest = checkpoint.parts[part]["sha256"]
    if normalise_averages(parts, checkpoint.step, checkpoint.meta):
        digest += "-normalised"
    model = build_model(config)
    model.load_state_dict(parts[part])
    model.fuse(fuse)
    model.to(world.device).eval()
    return Trained(config, checkpoint.step, checkpoint.meta, rate, model, digest)


def normalise_averages(parts: Parts, step: int, meta: dict[str, Any]) -> bool:
    """Take the initial weights out of a checkpoint's averages, in place; return whether there were any to normalise.

    Versions that did not write AVERAGES into a checkpoint's metadata averaged from the initial weights on, which seed
    and configuration determine. Converted checkpoints hold published averages, which stay as they are.
    """
    config = from_record(meta["config"])
    names = {ema_part(rate): rate for rate in config.ema_rates if ema_part(rate) in parts}
    if not names or step == 0 or meta.get("averages") == AVERAGES:
        return False
    initial = build_model(config).state_dict()
    for part, rate in names.items():
        for name, average in parts[part].items():
            average.copy_(without_initial(average, initial[name], rate, step))
    return True


def build_model(config: TrainConfig) -> UNet:
    """Build a configuration's network on the CPU, with initial weights from its seed."""
    torch.manual_seed(stream_key(config.seed, "weights"))
    model = UNet(config.model, config.out_channels)
    model.to(memory_format=torch.channels_last)  # fastest for convolutions; activations follow the weights
    return model.double() if config.precision == "fp64" else model


def ema_part(rate: float) -> str:
    """Return the name of a moving average's part in a checkpoint."""
    return f"ema-{rate:g}"


def from_uint8(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map pixels 0..255 to [-1, 1]."""
    return images.to(dtype) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Map [-1, 1] to pixels 0..255, clipping what lies outside."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Use bf16 arithmetic within the context, if that is the run's precision."""
    with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        yield


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> Model:
    """Return the model with other weights, without copying them."""
    return lambda x, t, y=None: functional_call(model, weights, (x, t, y))
