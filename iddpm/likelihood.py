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


# ------------------------------------------------------------------------- sampled instead of summed


class SampledBpd(NamedTuple):
    """An unbiased estimate of the bound of each image in bits/dim, and its parts that are exact."""

    total: Tensor  # [N]
    prior: Tensor  # [N]
    decoder: Tensor  # [N], L_0


PILOT_UNIFORM = 0.01  # of the probability is spread evenly, so that no term's weight can explode


def pilot_timesteps(timesteps: int) -> list[int]:
    """The timesteps of 1 .. T-1 at which `pilot_sizes` measures: at most 80, dense where t is small."""
    last = timesteps - 1
    wanted = [round(last ** (i / 47)) for i in range(48)] + [round(1 + (last - 1) * i / 31) for i in range(32)]
    return sorted(set(wanted))


@torch.no_grad()
def pilot_sizes(
    diffusion: "Diffusion",
    model: "Model",
    x_start: Tensor,
    noise: Callable[[Tensor], Tensor],
    y: Tensor | None = None,
    clip_denoised: bool = True,
) -> Tensor:
    """float64 [T-1] on the CPU: sqrt(E[L_t^2]) for t = 1 .. T-1, from a few images [N, C, H, W].

    Measured at `pilot_timesteps` and interpolated in log t. `noise(t)` gives the eps [N, C, H, W] of images at
    timesteps t (int64 [N]).
    """
    grid = pilot_timesteps(diffusion.num_timesteps)
    sizes = []
    for step in grid:
        t = torch.full((len(x_start),), step, device=x_start.device)
        x_t = diffusion.q_sample(x_start, t, noise(t))
        bpd = vlb_term(diffusion, model, x_start, x_t, t, y, clip_denoised).bpd
        sizes.append(bpd.double().square().mean().sqrt().clamp(min=1e-12))
    at, log_size = torch.tensor(grid).double().log(), torch.stack(sizes).cpu().log()
    every = torch.arange(1, diffusion.num_timesteps).double().log()
    if len(grid) == 1:
        return log_size.exp()
    right = torch.searchsorted(at, every).clamp(1, len(grid) - 1)
    part = (every - at[right - 1]) / (at[right] - at[right - 1])
    return torch.lerp(log_size[right - 1], log_size[right], part).exp()


def pilot_distribution(sizes: Tensor) -> Tensor:
    """float64 [T-1]: the probabilities of t = 1 .. T-1 for `sampled_bpd`, in proportion to the sizes of the terms."""
    return (1 - PILOT_UNIFORM) * sizes / sizes.sum() + PILOT_UNIFORM / len(sizes)


def systematic_timesteps(probabilities: Tensor, u: Tensor, draws: int) -> Tensor:
    """int64 [N, draws]: timesteps CDF^-1((u_i + k) / draws), each with probability p_t, evenly spread for an image.

    `u` is float64 [N] in [0, 1). On the CPU: a running sum on a GPU need not be the same twice.
    """
    points = (u[:, None] + torch.arange(draws)) / draws
    cdf = probabilities.cumsum(0)
    return 1 + torch.searchsorted(cdf / cdf[-1], points, right=True).clamp(max=len(probabilities) - 1)


@torch.no_grad()
def sampled_bpd(
    diffusion: "Diffusion",
    model: "Model",
    x_start: Tensor,
    noise: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,
    probabilities: Tensor,
    draws: int = 16,
    y: Tensor | None = None,
    clip_denoised: bool = True,
) -> SampledBpd:
    """The bound of x_start [N, C, H, W] from draws + 1 network evaluations an image instead of T.

    prior + L_0 + the mean over `draws` timesteps of L_t / p_t: unbiased for any frozen `probabilities` (float64 [T-1],
    of t = 1 .. T-1) and u (float64 [N], uniform in [0, 1), independent for each image; both on the CPU). Its variance
    over images and draws is that of `total`, so sd(total) / sqrt(N) is the standard error of its mean.
    `noise(i, t)` gives the eps of image i[j] at timestep t[j], [len(i), C, H, W].
    """
    n, device = len(x_start), x_start.device
    chosen = systematic_timesteps(probabilities, u, draws)
    t = torch.cat([torch.zeros(n, 1, dtype=torch.int64), chosen], dim=1).flatten().to(device)
    i = torch.arange(n, device=device).repeat_interleave(draws + 1)
    x_0 = x_start[i]
    x_t = diffusion.q_sample(x_0, t, noise(i, t))
    bpd = vlb_term(diffusion, model, x_0, x_t, t, y[i] if y is not None else None, clip_denoised).bpd
    terms = bpd.double().view(n, draws + 1)
    weights = (1 / (draws * probabilities[chosen - 1])).to(device)
    prior, decoder = prior_bpd(diffusion, x_start).double(), terms[:, 0]
    return SampledBpd(prior + decoder + (terms[:, 1:] * weights).sum(1), prior, decoder)


# ----------------------------------------------------------------------------- the best shorter chain


class JumpCosts(NamedTuple):
    """Mean bits/dim over some images of the steps that shorter chains are made of; float64 [T, T], inf below.

    Watson et al. 2021 (arXiv:2106.03802) call them L(t, s).
    """

    kl: Tensor  # [s, t]: the step from timestep t straight to s < t
    decoder: Tensor  # [s, t]: from s to the image, where the timestep before s is t


@torch.no_grad()
def jump_costs(
    diffusion: "Diffusion",
    model: "Model",
    x_start: Tensor,
    noise: Callable[[int], Tensor],
    y: Tensor | None = None,
    clip_denoised: bool = True,
) -> JumpCosts:
    """The costs of all steps between timesteps, from T network evaluations an image.

    For a `diffusion` of some hundred timesteps: there are T^2 costs. `noise` as for `exact_bpd`.
    """
    steps, device = diffusion.num_timesteps, x_start.device
    kl = torch.full((steps, steps), math.inf, dtype=torch.float64, device=device)
    decoder = kl.clone()
    noisy, outputs = [], []
    for step in range(steps):
        t = torch.full((len(x_start),), step, device=device)
        noisy.append(diffusion.q_sample(x_start, t, noise(step)))
        outputs.append(diffusion.output(model, noisy[-1], t, y))
        if step == 0:
            continue
        jumps, landings = diffusion.jumps_from(step), diffusion.landings_before(step)
        s = torch.arange(step, device=device)
        sums = torch.zeros(2, step, dtype=torch.float64, device=device)
        for i in range(len(x_start)):
            x_0, x_t = (x[i].expand(step, -1, -1, -1) for x in (x_start, noisy[-1]))
            true = jumps.q_posterior_mean_variance(x_0, x_t, s)
            p = jumps.prediction(outputs[-1][i].expand(step, -1, -1, -1), x_t, s, clip_denoised)
            sums[0] += mean_flat(normal_kl(true.mean, true.log_variance, p.mean, p.log_variance)).double()
            at_s, output = (torch.stack([row[i] for row in rows[:step]]) for rows in (noisy, outputs))
            p = landings.prediction(output, at_s, s, clip_denoised)
            sums[1] -= mean_flat(discretized_gaussian_log_likelihood(x_0, p.mean, 0.5 * p.log_variance)).double()
        kl[:step, step], decoder[:step, step] = sums / (len(x_start) * math.log(2))
    return JumpCosts(kl, decoder)


def best_path(costs: JumpCosts, steps: int) -> list[int]:
    """The `steps` timesteps, the last one among them, whose chain has the lowest bound: dynamic programming.

    ValueError unless there are so many, and two or more.
    """
    total = len(costs.kl)
    if not 2 <= steps <= total:
        raise ValueError(f"steps of the best path: got {steps}, expected 2 to {total}")
    best, first = (costs.decoder + costs.kl).min(0)  # of the chains 0, first[t], t
    before = [first]
    for _ in range(steps - 2):
        best, previous = (best[:, None] + costs.kl).min(0)
        before.append(previous)
    path = [total - 1]
    for previous in reversed(before):
        path.append(int(previous[path[-1]]))
    return path[::-1]


def _normal_cdf(x: Tensor) -> Tensor:
    # The tanh approximation, kept because published likelihoods are computed with it.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
