"""Peak speed of this machine, and the memory that a run needs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from iddpm.flops import FORWARDS_PER_STEP, count_parameters, forward_flops, one_image
from iddpm.unet import UNet
from pipeline.config import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def peak_flops(device: torch.device, precision: str) -> float:
    """Measure the peak FLOP/s in this precision, relative to which utilisation is given: that of a large matrix product
    or a 3x3 convolution, whichever is faster here (libraries differ).
    """
    if device.type == "cuda":
        n, images, channels, size = 8192, 16, 512, 64
    else:
        n, images, channels, size = 1024, 8, 128, 32

    def random(*shape: int) -> torch.Tensor:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.randn(shape, device=device).to(DTYPES[precision], memory_format=layout)

    a = random(n, n)
    x = random(images, channels, size, size)
    w = random(channels, channels, 3, 3)
    works: list[tuple[int, Callable[[], object]]] = [
        (2 * n**3, lambda: a @ a),
        (2 * 9 * channels**2 * images * size**2, lambda: F.conv2d(x, w, padding=1)),
    ]
    best = 0.0
    for flops, work in works:
        work()  # warm-up
        _synchronize(device)
        end = time.perf_counter() + 0.3  # clocks take time to ramp up
        while (start := time.perf_counter()) < end:
            work()
            _synchronize(device)
            best = max(best, flops / (time.perf_counter() - start))
    return best


def memory_bytes(config: TrainConfig, share: int) -> dict[str, int]:
    """Estimate the bytes that training needs on one rank, by purpose, for forward passes of `share` images. Excludes
    allocator fragmentation, convolution workspaces and DDP's buckets.
    """
    with torch.device("meta"):
        model = UNet(config.model, config.out_channels).to(DTYPES[config.precision])
        if config.launch.compile:
            model.fuse()
        activations = _activation_bytes(model, config.checkpoint_activations)
    count = sum(p.numel() for p in model.parameters())
    weights = count * (8 if config.precision == "fp64" else 4)
    copies = 2 * count if config.precision == "bf16" else 0  # autocast's
    return {
        "weights": weights + copies,
        "gradients": weights,
        "Adam": 2 * weights,
        "EMA": len(config.ema_rates) * weights,
        "activations": activations * share,
    }


def _activation_bytes(model: UNet, checkpointed: bool) -> int:
    """Count the bytes that one image's forward pass saves for the backward pass. To be called on the meta device."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, int] = {}  # bytes by storage
    inputs: list[int] = []  # bytes of each stage's input
    before: list[int] = []  # bytes saved before each stage

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    def enter(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs.append(arguments[0].nbytes)
        before.append(sum(saved.values()))

    for stage in (*model.input_blocks, model.middle_block, *model.output_blocks):
        stage.register_forward_pre_hook(enter)
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with hooks, torch.compiler.set_stance("force_eager"):  # the fused parts save the same tensors in eager mode
        model(*one_image(model.config))
    total = sum(saved.values())
    if not checkpointed:
        return total
    stages = [end - start for start, end in pairwise([*before, total])]
    return sum(inputs) + max(stages)  # all inputs, and one stage at a time


@dataclass(frozen=True)
class Cost:
    """What a run's network costs, counted on the meta device."""

    parameters: int
    forward: int
    """FLOPs of one image's forward pass."""
    memory: dict[str, int]
    """Estimated bytes on one rank, by purpose."""
    share: int
    """Images in the forward passes that the memory is for."""

    @property
    def train(self) -> int:
        """FLOPs of one image's training step, as `train_flops` has them."""
        return FORWARDS_PER_STEP * self.forward


def count(config: TrainConfig) -> Cost:
    """Count what a run's network costs, without building it on a device."""
    share = min(config.microbatch or config.batch_size, config.batch_size)
    parameters = count_parameters(config.model, config.out_channels)
    forward = forward_flops(config.model, config.out_channels)
    return Cost(parameters, forward, memory_bytes(config, share), share)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
