"""What a network costs, counted without running it: on the meta device, which has shapes and no numbers."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from iddpm.config import UNetConfig
from iddpm.unet import UNet


def count_parameters(config: UNetConfig, out_channels: int) -> int:
    """Number of weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config, out_channels).parameters())


def forward_flops(config: UNetConfig, out_channels: int) -> int:
    """FLOPs of one image's forward pass: 2 for each multiply-accumulate of a convolution, linear layer or
    attention.
    """
    with torch.device("meta"), torch.no_grad():
        model = UNet(config, out_channels)
        x = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        y = torch.empty(1, dtype=torch.int64) if config.num_classes is not None else None
        with FlopCounterMode(display=False) as counter:
            model(x, torch.empty(1), y)
    return counter.get_total_flops()


def train_flops(config: UNetConfig, out_channels: int) -> int:
    """FLOPs of one image's training step: the backward pass costs two forward passes."""
    return 3 * forward_flops(config, out_channels)
