"""The U-Net of IDDPM. Its state_dict matches the names and shapes of the published improved-diffusion models."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iddpm.config import GROUPS, UNetConfig
from iddpm.fused import fused_norm_act

PRODUCTS_UP_TO = 256
"""Largest number of pixels for which bfloat16 attention on a CPU uses two matrix products and a softmax, whose
weights fit the caches. There, torch's own kernel computes in float32 and takes two to five times as long."""


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of t [N] at dim/2 frequencies that fall geometrically from 1 to 1e-4: [N, dim].

    t may be fractional. The result is float32, or t's dtype if that is wider.
    """
    dtype = torch.promote_types(t.dtype, torch.float32)
    exponent = torch.arange(dim // 2, dtype=dtype, device=t.device) / (dim // 2)
    angles = t[:, None].to(dtype) * (-math.log(10000) * exponent).exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def norm_act(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """GroupNorm of x [N, C, H, W], then an optional scale and shift ([N, C, 1, 1]), then SiLU."""
    h = group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        h = torch.addcmul(shift, h, 1 + scale)
    return F.silu(h, inplace=not torch.is_grad_enabled())


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm computed in float32 or wider, whatever the network's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """GroupNorm over 32 groups, computed in float32 or wider."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class NormAct(GroupNorm):
    """The operations between two convolutions: they are memory-bound and therefore worth compiling."""

    fused = False

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        run = fused_norm_act if self.fused else norm_act
        return run(x, self.num_groups, self.weight, self.bias, self.eps, scale, shift)


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding injected between them, and a skip connection."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, config: UNetConfig):
        super().__init__()
        self.scale_shift_norm = config.scale_shift_norm
        # Identity keeps the layer numbers of the published models, which have a separate SiLU layer.
        self.in_layers = nn.Sequential(
            NormAct(channels), nn.Identity(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        emb_out = 2 * out_channels if config.scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            NormAct(out_channels),
            nn.Identity(),
            nn.Dropout(config.dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        _zero(self.out_layers[-1])
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        emb = self.emb_layers(emb)[:, :, None, None].to(h.dtype)
        if self.scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h, scale, shift))
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over [N, heads, pixels, channels per head]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= PRODUCTS_UP_TO:
        weights = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        return weights.softmax(3) @ v
    return F.scaled_dot_product_attention(q, k, v)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual connection."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        _zero(self.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        # [N, pixels, C]: no copy in channels_last, and the layout that linear layers and fused attention need.
        pixels = self.norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c)
        qkv = F.linear(pixels, self.qkv.weight.squeeze(2), self.qkv.bias)  # channels: [head, (q, k, v), channel]
        q, k, v = qkv.view(n, h * w, self.num_heads, 3, c // self.num_heads).transpose(1, 2).unbind(3)
        out = attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        out = F.linear(out, self.proj_out.weight.squeeze(2), self.proj_out.bias)
        return x + out.view(n, h, w, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halves the resolution with a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles the resolution by nearest-neighbour interpolation, followed by a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers in sequence; residual blocks also get the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """Images [N, in_channels, S, S], timesteps [N], labels (int64 [N] or None) -> [N, out_channels, S, S].

    The network is initialised to output zero. Images are cast to the dtype of the weights, which is also that of the
    output. `checkpoint_activations` trades time for memory: the backward pass recomputes each stage's activations.

    `forward` raises ValueError if labels are missing, or given to an unconditional model.
    """

    def __init__(self, config: UNetConfig, out_channels: int):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        channels, emb_channels = config.channels, 4 * config.channels
        self.time_embed = nn.Sequential(
            nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb_channels)

        size, width = config.image_size, channels
        last_level = len(config.channel_mult) - 1
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(config.in_channels, width, 3, padding=1)])])
        skips = [width]  # widths of the skip connections
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                stage: list[nn.Module] = [ResBlock(width, mult * channels, emb_channels, config)]
                width = mult * channels
                if size in config.attention_resolutions:
                    stage.append(AttentionBlock(width, config.num_heads))
                self.input_blocks.append(Stage(stage))
                skips.append(width)
            if level < last_level:
                self.input_blocks.append(Stage([Downsample(width)]))
                skips.append(width)
                size //= 2

        self.middle_block = Stage(
            [
                ResBlock(width, width, emb_channels, config),
                AttentionBlock(width, config.num_heads),
                ResBlock(width, width, emb_channels, config),
            ]
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for block in range(config.num_res_blocks + 1):
                stage = [ResBlock(width + skips.pop(), mult * channels, emb_channels, config)]
                width = mult * channels
                if size in config.attention_resolutions:
                    stage.append(AttentionBlock(width, config.num_heads_upsample or config.num_heads))
                if level > 0 and block == config.num_res_blocks:
                    stage.append(Upsample(width))
                    size *= 2
                self.output_blocks.append(Stage(stage))

        self.out = nn.Sequential(NormAct(width), nn.Identity(), nn.Conv2d(width, out_channels, 3, padding=1))
        _zero(self.out[-1])

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if (y is None) != (self.config.num_classes is None):
            got = "no labels" if y is None else "labels"
            raise ValueError(f"y: got {got}, but model.num_classes is {self.config.num_classes}")
        dtype = next(self.parameters()).dtype
        emb = self.time_embed(timestep_embedding(t, self.config.channels).to(dtype))
        if y is not None:
            emb = emb + self.label_emb(y)

        h = x.to(dtype)
        skips = []
        for stage in self.input_blocks:
            h = self._run(stage, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for stage in self.output_blocks:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)

    def _run(self, stage: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return stage(h, emb)
        return checkpoint(stage, h, emb, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)

    def fuse(self, fused: bool = True) -> None:
        """Compile the operations between convolutions on their first run, into a few kernels shared by all blocks."""
        for module in self.modules():
            if isinstance(module, NormAct):
                module.fused = fused


def _zero(layer: nn.Module) -> None:
    # Applied to the last layer of each branch, so that every block starts as the identity.
    for p in layer.parameters():
        nn.init.zeros_(p)
