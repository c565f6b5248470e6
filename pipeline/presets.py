"""Named training configurations for `python -m pipeline.train --preset NAME`; flags override individual fields."""

import math
from dataclasses import replace

from iddpm.config import DiffusionConfig, UNetConfig
from pipeline.config import DataConfig, TrainConfig

# scikit-learn's 8x8 handwritten digits; trains in minutes on a laptop CPU.
DIGITS = TrainConfig(
    out="runs/digits",
    horizon="3000steps",
    batch_size=64,
    lr=1e-3,
    warmup_steps=100,
    ema_rates=(0.995,),
    checkpoint_every=500,
    sample_every=1000,
    sample_steps=50,
    model=UNetConfig(
        image_size=8,
        in_channels=1,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=2,
        attention_resolutions=(4,),
    ),
    diffusion=DiffusionConfig(timesteps=1000),
    data=DataConfig(url="data/digits"),
)


# IDDPM, Table 1: unconditional ImageNet 64x64, L_hybrid, cosine, T = 4000, 121M parameters.
IMAGENET64 = TrainConfig(
    out="runs/imagenet64",
    horizon="1500000steps",
    batch_size=128,
    lr=1e-4,
    log_every=100,
    checkpoint_every=5000,
    keep_every=100_000,
    sample_every=10_000,
    data=DataConfig(url="data/imagenet64"),
)


# IDDPM, Table 4: class-conditional ImageNet 64x64, 273M parameters.
IMAGENET64_COND = replace(
    IMAGENET64,
    out="runs/imagenet64-cond",
    horizon="250000steps",
    batch_size=2048,
    lr=3e-4,
    model=replace(IMAGENET64.model, channels=192, num_classes=1000),
    diffusion=replace(IMAGENET64.diffusion, rescale_timesteps=False),
)


# IDDPM, Table 2: CIFAR-10 with the cosine schedule (dropout 0.3; the linear schedule used 0.1).
CIFAR10 = replace(
    IMAGENET64,
    out="runs/cifar10",
    horizon="500000steps",
    model=replace(IMAGENET64.model, image_size=32, channel_mult=(1, 2, 2, 2), dropout=0.3),
    data=DataConfig(url="data/cifar10"),
)


def study_width(channels: int) -> TrainConfig:
    """One size of the scaling study (IDDPM section 6): lr = 1e-4 / sqrt(channels / 128)."""
    return replace(
        IMAGENET64,
        out=f"runs/study-{channels}",
        lr=1e-4 / math.sqrt(channels / 128),
        model=replace(IMAGENET64.model, channels=channels),
    )


PRESETS: dict[str, TrainConfig] = {
    "digits": DIGITS,
    "cifar10": CIFAR10,
    "imagenet64": IMAGENET64,
    "imagenet64-cond": IMAGENET64_COND,
    **{f"study-{channels}": study_width(channels) for channels in (64, 96, 128, 192)},
}
