"""Configuration of the U-Net and the diffusion process. Does not import torch, so that --help is fast."""

from dataclasses import dataclass
from typing import Annotated, Literal

from iddpm.bounds import NOT_EMPTY, Bound, Count, Fraction, check_bounds

Schedule = Literal["linear", "cosine"]
Mean = Literal["epsilon", "x_start", "x_prev"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
Loss = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]

GROUPS = 32  # in every GroupNorm
Width = Annotated[Count, Bound(lambda c: c % GROUPS == 0, f"a multiple of {GROUPS}, the number of GroupNorm groups")]


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net of IDDPM: residual blocks at several resolutions, self-attention at some of them."""

    image_size: Count = 64
    """Height and width of the images, in pixels; a multiple of 2^(levels - 1)."""
    in_channels: Count = 3
    """Image channels: 3 for RGB, 1 for greyscale."""
    channels: Width = 128
    """Width C of the first level, a multiple of 32. Parameters and FLOPs grow quadratically with it."""
    channel_mult: Annotated[tuple[Count, ...], NOT_EMPTY] = (1, 2, 3, 4)
    """Width of each level as a multiple of `channels`; each level after the first halves the resolution."""
    num_res_blocks: Count = 3
    """Residual blocks per level of the downsampling path (the upsampling path has one more), 1 or more."""
    attention_resolutions: tuple[Count, ...] = (16, 8)
    """Feature maps of these sizes, in pixels, get self-attention; the smallest always has it."""
    num_heads: Count = 4
    """Attention heads; must divide the width of every level with attention."""
    num_heads_upsample: Count | None = None
    """Attention heads of the upsampling path; None: same as num_heads."""
    scale_shift_norm: bool = True
    """Scale and shift each block's GroupNorm by the timestep embedding (IDDPM) instead of adding it (DDPM)."""
    dropout: Fraction = 0.0
    """Dropout probability in the residual blocks. The paper uses 0 on ImageNet 64, 0.1 to 0.3 on CIFAR-10."""
    num_classes: Count | None = None
    """Number of classes for a class-conditional model; None: unconditional."""

    def __post_init__(self) -> None:
        check_bounds(self, "model.")
        halvings = len(self.channel_mult) - 1
        factor = 2**halvings
        if self.image_size % factor:
            raise ValueError(
                f"--model.image-size: got {self.image_size}, expected a multiple of {factor}:"
                f" channel_mult {self.channel_mult} halves it {halvings} times"
            )
        for level, mult in enumerate(self.channel_mult):
            width = mult * self.channels
            attended = self.image_size // 2**level in self.attention_resolutions
            # The middle block always has attention, on the smallest feature maps; the upsampling path need not.
            heads = self.num_heads if attended or level == halvings else 1
            heads_upsample = self.num_heads_upsample if attended else None
            for flag, count in (("num-heads", heads), ("num-heads-upsample", heads_upsample or 1)):
                if width % count:
                    raise ValueError(
                        f"--model.{flag}: got {count}, expected a divisor of {width}, the width of level {level},"
                        " which has attention"
                    )


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process and its loss; the defaults are the paper's L_hybrid on the cosine schedule.

    L_simple: loss=mse with a fixed variance. L_hybrid: loss=rescaled_mse with variance=learned_range, which adds to
    L_simple T/1000 times the L_vlb term at t, in bits/dim; the gradient of that term reaches only the variance
    (loss=mse with a learned variance leaves the term unscaled). L_vlb: loss=rescaled_kl with variance=learned_range,
    which is T times the L_vlb term at t, in expectation L_vlb in bits/dim (loss=kl: the unscaled term).
    """

    timesteps: Count = 4000
    """Number T of diffusion steps. The paper trains with 4000; DDPM used 1000."""
    schedule: Schedule = "cosine"
    """Noise schedule: DDPM's linear betas, scaled to T, or IDDPM's cosine (eq. 17), which adds noise more slowly."""
    mean: Mean = "epsilon"
    """What the network predicts: the added noise, the clean image or the mean of the previous step."""
    variance: Variance = "learned_range"
    """fixed_small: beta tilde; fixed_large: beta; learned: log variance; learned_range: interpolates between
    the two (eq. 15)."""
    loss: Loss = "rescaled_mse"
    """Training loss; see the description above for L_simple, L_hybrid and L_vlb."""
    rescale_timesteps: bool = True
    """Feed the network t x 1000/T instead of t. The paper's class-conditional models use t."""

    def __post_init__(self) -> None:
        check_bounds(self, "diffusion.")
        # The scaled linear schedule ends at beta = 20/T, which must be below 1.
        if self.schedule == "linear" and self.timesteps <= 20:
            raise ValueError(
                f"--diffusion.timesteps: got {self.timesteps}, expected 21 or more with schedule=linear (its last beta"
                " is 20/T); use schedule=cosine for fewer"
            )

    @property
    def learns_variance(self) -> bool:
        """Whether the network also outputs the variance."""
        return self.variance in ("learned", "learned_range")

    def out_channels(self, in_channels: int) -> int:
        """Number of network output channels for images with `in_channels` channels."""
        return 2 * in_channels if self.learns_variance else in_channels
