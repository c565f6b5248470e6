"""Parameter and FLOP counts of a network, computed on the meta device without running it."""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from iddpm.config import UNetConfig
from iddpm.unet import UNet

FORWARDS_PER_STEP = 3  # a training step in forward passes: the backward pass costs two


def count_parameters(config: UNetConfig, out_channels: int) -> int:
    """Return the number of parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config, out_channels).parameters())


def one_image(config: UNetConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the network's inputs for one image, without values, on the current default device."""
    x = torch.empty(1, config.in_channels, config.image_size, config.image_size)
    y = torch.empty(1, dtype=torch.int64) if config.num_classes is not None else None
    return x, torch.empty(1), y


def forward_flops(config: UNetConfig, out_channels: int) -> int:
    """Return the FLOPs of one image's forward pass: 2 per multiply-accumulate in convolutions, linear layers and
    attention.
    """
    with torch.device("meta"), torch.no_grad():
        model = UNet(config, out_channels)
        with FlopCounterMode(display=False) as counter:
            model(*one_image(config))
    return counter.get_total_flops()


def train_flops(config: UNetConfig, out_channels: int) -> int:
    """Return the FLOPs of one image's training step: the backward pass costs as much as two forward passes."""
    return FORWARDS_PER_STEP * forward_flops(config, out_channels)
