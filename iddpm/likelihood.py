"""The variational bound on the negative log-likelihood, in bits per dimension (IDDPM equations 4 to 7)."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from iddpm.diffusion import Diffusion, Model


class VlbTerm(NamedTuple):
    bpd: Tensor  # [N]
    pred_xstart: Tensor  # [N, C, H, W]


class Bpd(NamedTuple):
    """Bits per dimension of each image, and their parts. Column t of a [N, T] tensor is timestep t."""

    total: Tensor  # [N]: prior + vb.sum(1)
    prior: Tensor  # [N]
    vb: Tensor  # [N, T]
    xstart_mse: Tensor  # [N, T], of the predicted x_start
    mse: Tensor  # [N, T], of the predicted eps


def mean_flat(x: Tensor) -> Tensor:
    """[N, ...] -> [N], the mean over everything but the batch."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise."""
    gap = log_variance2 - log_variance1
    return 0.5 * (gap - 1 + (-gap).exp() + (mean1 - mean2).square() * (-log_variance2).exp())


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-likelihood in nats, elementwise, of 8-bit pixels x in [-1, 1] under a Gaussian (DDPM equation 13).

    It is integrated over each pixel's bin, 2/255 wide, the outermost two open. `log_scale` is the log of the
    standard deviation.
    """
    inverse_scale = (-log_scale).exp()
    upper = _normal_cdf(inverse_scale * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_scale * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def prior_bpd(diffusion: "Diffusion", x_start: Tensor) -> Tensor:
    """[N]: L_T, the divergence of q(x_T | x_0) from the standard normal (IDDPM equation 7), about 0."""
    last = torch.full((len(x_start),), diffusion.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = diffusion.q_mean_variance(x_start, last)
    zero = torch.zeros_like(mean)
    return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)


def vlb_bits(
    x_start: Tensor,
    t: Tensor,
    true_mean: Tensor,
    true_log_variance: Tensor,
    mean: Tensor,
    log_variance: Tensor,
) -> Tensor:
    """[N] bits/dim: L_{t-1}, the KL from posterior to model; where t is 0, the decoder's L_0."""
    kl = mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance))
    decoder_nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance))
    return torch.where(t == 0, decoder_nll, kl) / math.log(2)


def vlb_term(
    diffusion: "Diffusion",
    model: "Model",
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    clip_denoised: bool = True,
) -> VlbTerm:
    """The bound's term at timestep t[i] of each image, in bits/dim (IDDPM equations 5 and 6)."""
    true_mean, _, true_log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    p = diffusion.p_mean_variance(model, x_t, t, y, clip_denoised)
    return VlbTerm(vlb_bits(x_start, t, true_mean, true_log_variance, p.mean, p.log_variance), p.pred_xstart)


@torch.no_grad()
def exact_bpd(
    diffusion: "Diffusion",
    model: "Model",
    x_start: Tensor,
    noise: Callable[[int], Tensor],
    y: Tensor | None = None,
    clip_denoised: bool = True,
    timesteps_per_call: int = 16,
) -> Bpd:
    """The whole bound of x_start ([N, C, H, W] in [-1, 1], 8-bit pixels), every timestep evaluated once.

    `noise(t)` gives the eps [N, C, H, W] of x_t. Each call of the network gets `timesteps_per_call` x N
    images; that changes nothing but speed and memory. With a strided `diffusion` this is the bound of that
    shorter chain, another quantity than the full one's.
    """
    n, steps = len(x_start), diffusion.num_timesteps
    columns: list[Tensor] = []
    for first in range(0, steps, timesteps_per_call):
        ts = range(first, min(first + timesteps_per_call, steps))
        t = torch.arange(ts.start, ts.stop, device=x_start.device).repeat_interleave(n)
        x_0 = x_start.repeat(len(ts), 1, 1, 1)
        eps = torch.cat([noise(step) for step in ts])
        x_t = diffusion.q_sample(x_0, t, eps)
        labels = y.repeat(len(ts)) if y is not None else None
        term = vlb_term(diffusion, model, x_0, x_t, t, labels, clip_denoised)
        pred_eps = diffusion.eps_from_xstart(x_t, t, term.pred_xstart)
        squares = (term.pred_xstart - x_0).square(), (pred_eps - eps).square()
        rows = torch.stack([term.bpd, *map(mean_flat, squares)])  # [3, timesteps x N]
        columns.append(rows.unflatten(1, (len(ts), n)))
    vb, xstart_mse, mse = torch.cat(columns, dim=1).transpose(1, 2)
    prior = prior_bpd(diffusion, x_start)
    return Bpd(prior + vb.sum(1), prior, vb, xstart_mse, mse)


def _normal_cdf(x: Tensor) -> Tensor:
    # The tanh approximation, kept because published likelihoods are computed with it.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
