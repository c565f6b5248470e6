"""GroupNorm, scale, shift and SiLU as few compiled passes over memory, forward and backward.

What lies between two convolutions is bound by memory, and in eager mode it takes a dozen passes, some in float32.
Here the sums over a group are split into sums over each channel's pixels, so that every pass is a loop over
[N, pixels, C], which vectorises in channels_last at any size: few kernels serve all blocks.
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

    Sums are in float32, or x's dtype where that is wider; the result has x's dtype. The first call compiles.
    """
    return _FusedNormAct.apply(x, groups, weight, bias, eps, scale, shift)


class _FusedNormAct(torch.autograd.Function):
    """y = silu(a x + b), where a and b [N, C] hold the normalisation (Wu and He 2018, eq. 1-2) and all that follows.

    For the backward pass it keeps x, and nothing else of its size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        pixels = _pixels(x)
        channel_mean, channel_var = _compiled(_moments)(pixels)
        dtype = channel_mean.dtype
        mean = _over_groups(channel_mean, groups)
        var = _over_groups(channel_var + (channel_mean - mean).square(), groups)
        rstd = (var + eps).rsqrt()
        gain = weight.to(dtype) if scale is None else weight * (1 + scale[:, :, 0, 0].to(dtype))
        offset = bias.to(dtype) if scale is None else bias * (1 + scale[:, :, 0, 0].to(dtype))
        if shift is not None:
            offset = offset + shift[:, :, 0, 0].to(dtype)
        a = rstd * gain
        b = offset - mean * a
        ctx.save_for_backward(x, a, b, mean, rstd, weight, bias, scale)
        ctx.groups = groups
        return _like(x, _compiled(_affine_silu)(pixels, a, b))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mean, rstd, weight, bias, scale = ctx.saved_tensors
        pixels, grad = _pixels(x), _pixels(grads[0])
        dz, dz_x = _compiled(_gradient_sums)(grad, pixels, a, b)  # sums over the pixels [N, C]
        dz_normed = (dz_x - mean * dz) * rstd
        d_weight, d_bias, d_scale, d_shift = dz_normed, dz, None, None
        if scale is not None:
            factor = 1 + scale[:, :, 0, 0].to(dz.dtype)
            d_weight, d_bias = dz_normed * factor, dz * factor
            d_scale = (dz_normed * weight + dz * bias).to(scale.dtype)[:, :, None, None]
            d_shift = dz.to(scale.dtype)[:, :, None, None]
        # Through the mean and the variance, which every pixel of a group has a part in.
        count = pixels.shape[1]
        through_var = -_over_groups(dz_normed * a, ctx.groups) * rstd / count
        through_mean = -_over_groups(dz * a, ctx.groups) / count - through_var * mean
        dx = _like(x, _compiled(_gradient)(grad, pixels, a, b, through_var, through_mean))
        return dx, None, d_weight.sum(0).to(weight.dtype), d_bias.sum(0).to(bias.dtype), None, d_scale, d_shift


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(kernel, dynamic=True, fullgraph=True)


# The kernels: x and grad [N, pixels, C] in the network's dtype, all else [N, C] in the sums' dtype.


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel; about its first pixel, so that a large mean costs no digits."""
    x = _wide(x)
    first = x[:, :1]
    mean = (x - first).mean(1)
    return mean + first[:, 0], (x - first).square().mean(1) - mean.square()


def _affine_silu(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = _wide(x) * a[:, None] + b[:, None]
    return (z * z.sigmoid()).to(x.dtype)


def _gradient_sums(grad: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dz = _dz(grad, x, a, b)
    return dz.sum(1), (dz * _wide(x)).sum(1)


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


def _like(x: Tensor, pixels: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return pixels.view(n, h, w, c).permute(0, 3, 1, 2)


def _over_groups(x: Tensor, groups: int) -> Tensor:
    """The mean of [N, C] over the channels of each group, for each channel."""
    n, c = x.shape
    return x.view(n, groups, -1).mean(2, keepdim=True).expand(-1, -1, c // groups).reshape(n, c)
