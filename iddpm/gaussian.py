"""Diagonal Gaussians: KL, and the discretized likelihood of 8-bit pixels."""

import math

import torch
from torch import Tensor


def mean_flat(x: Tensor) -> Tensor:
    """Average over all dimensions but the batch: [N, ...] -> [N]."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Elementwise KL(N(mean1, variance1) || N(mean2, variance2)) in nats."""
    gap = log_variance2 - log_variance1
    return 0.5 * (gap - 1 + (-gap).exp() + (mean1 - mean2).square() * (-log_variance2).exp())


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Elementwise log-likelihood in nats of 8-bit pixels x in [-1, 1] under a Gaussian (DDPM equation 13).

    The density is integrated over each pixel's bin, 2/255 wide; the two outermost bins extend to infinity.
    `log_scale` is the log of the standard deviation.
    """
    inverse_scale = (-log_scale).exp()
    upper = _normal_cdf(inverse_scale * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_scale * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    # The tanh approximation, because published likelihoods use it.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
