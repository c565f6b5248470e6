"""GroupNorm, scale, shift and SiLU in a few compiled passes over memory, forward and backward.

The operations between two convolutions are memory-bound; in eager mode they take a dozen passes, some in float32.
Here the sums over a group are split into sums over each channel's pixels, so that every pass is a loop over
[N, pixels, C], which vectorises in channels_last at any size: a few kernels serve all blocks.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def fused_norm_act(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """silu(GroupNorm(x) (1 + scale) + shift); x [N, C, H, W], weight, bias [C], scale, shift [N, C, 1, 1] or None.

    Sums are in float32, or x's dtype if that is wider; the result has x's dtype. The first call compiles.
    """
    if torch.is_grad_enabled():
        return _FusedNormAct.apply(x, groups, weight, bias, eps, scale, shift)
    return _forward(x, groups, weight, bias, eps, scale, shift)[0]


def _forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, ...]:
    """Return y [N, C, H, W] and `_norm_act`'s other results."""
    y, *rest = _compiled(_norm_act)(_pixels(x), groups, weight[:], bias[:], eps, _flat(scale), _flat(shift))
    return _like(x, y), *rest


class _FusedNormAct(torch.autograd.Function):
    """y = silu(a x + b), where a and b [N, C] combine the normalisation (Wu and He 2018, eq. 1-2), scale and shift.

    x is the only tensor of its size that is saved for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, groups, weight, bias, _, scale, _ = inputs
        y, *coefficients = _forward(*inputs)
        ctx.save_for_backward(x, *coefficients, weight, bias, scale)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *coefficients, weight, bias, scale = ctx.saved_tensors
        pixels = _pixels(x)
        grad = _pixels(grads[0])
        sums = _compiled(_gradient_sums)(grad, pixels, *coefficients, ctx.groups, weight[:], bias[:], _flat(scale))
        slope, offset, d_weight, d_bias, *rest = sums
        d_scale, d_shift = (d[:, :, None, None] for d in rest) if rest else (None, None)
        a, b, _, _ = coefficients
        d_x = _like(x, _compiled(_gradient)(grad, pixels, a, b, slope, offset))
        return d_x, None, d_weight, d_bias, None, d_scale, d_shift


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    # One variant per dtype, with or without scale, one or more channels per group, under autocast or not.
    # (torch's own overloads lack recompile_limit.)
    return torch.compile(kernel, dynamic=True, fullgraph=True, recompile_limit=64)  # type: ignore[call-overload]


# The compiled functions: x and grad are [N, pixels, C] in the network's dtype, scale and shift [N, C], weight and bias
# [C], and all other tensors [N, C] in the dtype of the sums.


def _norm_act(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, ...]:
    """Return y, a, b, and the mean and reciprocal standard deviation of each channel's group."""
    wide = _wide(x)
    first = wide[:, :1]  # moments about the first pixel, so that a large mean costs no precision
    about = (wide - first).mean(1)
    channel_mean = about + first[:, 0]
    channel_var = (wide - first).square().mean(1) - about.square()
    mean = _over_groups(channel_mean, groups)
    rstd = (_over_groups(channel_var + (channel_mean - mean).square(), groups) + eps).rsqrt()
    factor = 1 if scale is None else 1 + scale.to(mean.dtype)
    a = rstd * weight * factor
    b = bias * factor - mean * a
    b = b if shift is None else b + shift
    z = wide * a[:, None] + b[:, None]
    return (z * z.sigmoid()).to(x.dtype), a, b, mean, rstd


def _gradient_sums(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradient that reaches x through its group's mean and variance, as a slope and an offset [N, C]; then
    the gradients of weight and bias [C] and, if there is a scale, of scale and shift [N, C].
    """
    dz = _dz(grad, x, a, b)
    dz, dz_x = dz.sum(1), (dz * _wide(x)).sum(1)
    dz_normed = (dz_x - mean * dz) * rstd
    slope = -_over_groups(dz_normed * a, groups) * rstd / x.shape[1]
    offset = -_over_groups(dz * a, groups) / x.shape[1] - slope * mean
    if scale is None:
        return slope, offset, dz_normed.sum(0).to(weight.dtype), dz.sum(0).to(bias.dtype)
    factor = 1 + scale.to(dz.dtype)
    d_weight, d_bias = ((d * factor).sum(0).to(weight.dtype) for d in (dz_normed, dz))
    return slope, offset, d_weight, d_bias, (dz_normed * weight + dz * bias).to(scale.dtype), dz.to(scale.dtype)


def _gradient(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return (_dz(grad, x, a, b) * a[:, None] + _wide(x) * slope[:, None] + offset[:, None]).to(x.dtype)


def _dz(grad: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = _wide(x) * a[:, None] + b[:, None]
    s = z.sigmoid()
    return _wide(grad) * s * (1 + z * (1 - s))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H W, C]: a view in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[:, :, 0, 0]


def _like(x: Tensor, pixels: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return pixels.view(n, h, w, c).permute(0, 3, 1, 2)


def _over_groups(x: Tensor, groups: int) -> Tensor:
    """Replace each channel of x [N, C] by the mean over its group."""
    n, c = x.shape
    return x.view(n, groups, -1).mean(2, keepdim=True).expand(-1, -1, c // groups).reshape(n, c)
