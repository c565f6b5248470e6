"""What to train: the U-Net's shape and the diffusion process. Imports no torch, so that --help is fast."""

from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["linear", "cosine"]
Mean = Literal["epsilon", "x_start", "x_prev"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
Loss = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]

GROUPS = 32  # of every GroupNorm


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net of IDDPM: residual blocks at several resolutions, self-attention at some of them."""

    image_size: int = 64
    """Height and width of the images, in pixels; a multiple of 2^(levels - 1)."""
    in_channels: int = 3
    """Channels of the images: 3 for RGB, 1 for grey."""
    channels: int = 128
    """Width C of the first level, a multiple of 32. Parameters and FLOPs grow with its square."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    """Width of each level in multiples of `channels`; each level after the first halves the resolution."""
    num_res_blocks: int = 3
    """Residual blocks per level on the way down (one more on the way up), 1 or more."""
    attention_resolutions: tuple[int, ...] = (16, 8)
    """Feature maps of these sizes, in pixels, get self-attention; the smallest one has it in any case."""
    num_heads: int = 4
    """Attention heads. Must divide the width of every level that has attention."""
    num_heads_upsample: int | None = None
    """Attention heads on the way up; None: the same as num_heads."""
    scale_shift_norm: bool = True
    """Whether the timestep scales and shifts each block's GroupNorm (IDDPM) or is added (DDPM)."""
    dropout: float = 0.0
    """Dropout probability in the residual blocks. The paper: 0 on ImageNet 64, 0.1 to 0.3 on CIFAR-10."""
    num_classes: int | None = None
    """Number of classes of a class-conditional model; None: unconditional."""

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels", "channels", "num_res_blocks", "num_heads"):
            _check(f"model.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("num_heads_upsample", "num_classes"):
            value = getattr(self, name)
            _check(f"model.{name}", value, value is None or value >= 1, "1 or more, or None")
        _check(
            "model.channel_mult",
            self.channel_mult,
            bool(self.channel_mult) and min(self.channel_mult) >= 1,
            "one or more whole numbers, each 1 or more",
        )
        _check(
            "model.attention_resolutions",
            self.attention_resolutions,
            all(r >= 1 for r in self.attention_resolutions),
            "feature-map sizes in pixels, each 1 or more",
        )
        _check("model.dropout", self.dropout, 0 <= self.dropout < 1, "a probability in [0, 1)")
        _check(
            "model.channels",
            self.channels,
            self.channels % GROUPS == 0,
            f"a multiple of {GROUPS}, because GroupNorm has {GROUPS} groups",
        )
        halvings = len(self.channel_mult) - 1
        _check(
            "model.image_size",
            self.image_size,
            self.image_size % 2**halvings == 0,
            f"a multiple of {2**halvings}, which channel_mult {self.channel_mult} halves {halvings} times",
        )
        for level, mult in enumerate(self.channel_mult):
            width = mult * self.channels
            attended = self.image_size // 2**level in self.attention_resolutions
            # The smallest feature map has attention in any case, but not on the way up.
            for name, used in (
                ("num_heads", attended or level == halvings),
                ("num_heads_upsample", attended),
            ):
                heads = getattr(self, name)
                _check(
                    f"model.{name}",
                    heads,
                    not used or heads is None or width % heads == 0,
                    f"a divisor of {width}, the width of level {level}, which has attention",
                )


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process and its loss; the defaults are the paper's L_hybrid on the cosine schedule.

    L_simple: loss=mse and a fixed variance. L_hybrid: loss=rescaled_mse and variance=learned_range; it is L_simple
    plus T/1000 times L_vlb's term of t in bits/dim, whose gradient reaches the variance alone (loss=mse with a learned
    variance leaves that term unscaled). L_vlb: loss=rescaled_kl and variance=learned_range; it is T times L_vlb's term
    of t, on average all of L_vlb in bits/dim (loss=kl: the term alone).
    """

    timesteps: int = 4000
    """Number T of diffusion steps. The paper trains with 4000; DDPM had 1000."""
    schedule: Schedule = "cosine"
    """How the noise grows: DDPM's linear betas scaled to T, or IDDPM's cosine (equation 17), which is gentler."""
    mean: Mean = "epsilon"
    """What the network predicts: the added noise, the clean image, or the mean of the previous step."""
    variance: Variance = "learned_range"
    """beta tilde, beta, the network's own log variance, or its mix of the two in log space (IDDPM equation 15)."""
    loss: Loss = "rescaled_mse"
    """What training minimises; the class's description names L_simple, L_hybrid and L_vlb."""
    rescale_timesteps: bool = True
    """Whether the network is told t x 1000/T, or t itself (the paper's class-conditional models)."""

    def __post_init__(self) -> None:
        for name, kind in (("schedule", Schedule), ("mean", Mean), ("variance", Variance), ("loss", Loss)):
            value = getattr(self, name)
            _check(f"diffusion.{name}", value, value in get_args(kind), "one of " + ", ".join(get_args(kind)))
        _check("diffusion.timesteps", self.timesteps, self.timesteps >= 1, "1 or more")
        # The scaled linear schedule ends at beta = 20/T, which has to stay below 1.
        _check(
            "diffusion.timesteps",
            self.timesteps,
            self.schedule != "linear" or self.timesteps > 20,
            "21 or more with schedule=linear (its last beta is 20/T); use schedule=cosine for fewer",
        )

    @property
    def learns_variance(self) -> bool:
        """Whether the network has a second output for the variance."""
        return self.variance in ("learned", "learned_range")

    def out_channels(self, in_channels: int) -> int:
        """Output channels of the network for images of `in_channels` channels."""
        return 2 * in_channels if self.learns_variance else in_channels


def _check(field: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{field}: got {value!r}, expected {expected}")
