"""The variational bound on the negative log-likelihood, in bits per dimension (IDDPM equations 4 to 7).

The model's predicted x_start is clipped to [-1, 1] throughout, as for published bounds.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion import Diffusion, Model, vlb_bits
from iddpm.gaussian import discretized_gaussian_log_likelihood, mean_flat, normal_kl


class VlbTerm(NamedTuple):
    bpd: Tensor  # [N]
    pred_xstart: Tensor  # [N, C, H, W]


class Bpd(NamedTuple):
    """Bits per dimension of each image, and its parts. Column t of an [N, T] tensor is timestep t."""

    total: Tensor  # [N]: prior + vb.sum(1)
    prior: Tensor  # [N]
    vb: Tensor  # [N, T]
    xstart_mse: Tensor  # [N, T]: error of the predicted x_start
    mse: Tensor  # [N, T]: error of the predicted eps


def prior_bpd(diffusion: Diffusion, x_start: Tensor) -> Tensor:
    """L_T [N], the KL divergence of q(x_T | x_0) from the standard normal (IDDPM equation 7); close to 0."""
    last = torch.full((len(x_start),), diffusion.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = diffusion.q_mean_variance(x_start, last)
    zero = torch.zeros_like(mean)
    return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)


def vlb_term(
    diffusion: Diffusion, model: Model, x_start: Tensor, x_t: Tensor, t: Tensor, y: Tensor | None = None
) -> VlbTerm:
    """Evaluate the bound's term at each image's timestep t[i], in bits/dim (IDDPM equations 5 and 6)."""
    posterior = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    p = diffusion.p_mean_variance(model, x_t, t, y)
    return VlbTerm(vlb_bits(x_start, t, posterior, p), p.pred_xstart)


@torch.no_grad()
def exact_bpd(
    diffusion: Diffusion,
    model: Model,
    x_start: Tensor,
    noise: Callable[[int], Tensor],
    y: Tensor | None = None,
    timesteps_per_call: int = 16,
) -> Bpd:
    """Compute the full bound of x_start ([N, C, H, W] in [-1, 1], 8-bit pixels), evaluating each timestep once.

    `noise(t)` returns the eps [N, C, H, W] of x_t. Each network call gets `timesteps_per_call` x N images, which
    affects only speed and memory. With a strided `diffusion` this is the bound of the shorter chain, which differs
    from the full chain's.
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
        term = vlb_term(diffusion, model, x_0, x_t, t, labels)
        pred_eps = diffusion.eps_from_xstart(x_t, t, term.pred_xstart)
        xstart_mse = mean_flat((term.pred_xstart - x_0).square())
        mse = mean_flat((pred_eps - eps).square())
        rows = torch.stack([term.bpd, xstart_mse, mse])  # [3, timesteps x N]
        columns.append(rows.unflatten(1, (len(ts), n)))
    vb, xstart_mse, mse = torch.cat(columns, dim=1).transpose(1, 2)
    prior = prior_bpd(diffusion, x_start)
    return Bpd(prior + vb.sum(1), prior, vb, xstart_mse, mse)


class SampledBpd(NamedTuple):
    """An unbiased estimate of each image's bound in bits/dim, and its exact parts."""

    total: Tensor  # [N]
    prior: Tensor  # [N]
    decoder: Tensor  # [N], L_0


PILOT_UNIFORM = 0.01  # fraction of the probability spread uniformly, to bound the terms' weights


def pilot_timesteps(timesteps: int) -> list[int]:
    """The timesteps of 1 .. T-1 at which `pilot_sizes` measures: at most 80, dense where t is small."""
    last = timesteps - 1
    geometric = {round(last ** (i / 47)) for i in range(48)}
    even = {round(1 + (last - 1) * i / 31) for i in range(32)}
    return sorted(geometric | even)


@torch.no_grad()
def pilot_sizes(
    diffusion: Diffusion,
    model: Model,
    x_start: Tensor,
    noise: Callable[[Tensor], Tensor],
    y: Tensor | None = None,
) -> Tensor:
    """Estimate sqrt(E[L_t^2]) for t = 1 .. T-1 from a few images [N, C, H, W]; returns float64 [T-1] on the CPU.

    It is measured at `pilot_timesteps` and interpolated in log t. `noise(t)` returns the eps [N, C, H, W] for
    timesteps t (int64 [N]).
    """
    grid = pilot_timesteps(diffusion.num_timesteps)
    sizes = []
    for step in grid:
        t = torch.full((len(x_start),), step, device=x_start.device)
        x_t = diffusion.q_sample(x_start, t, noise(t))
        bpd = vlb_term(diffusion, model, x_start, x_t, t, y).bpd
        sizes.append(bpd.double().square().mean().sqrt().clamp(min=1e-12))
    log_size = torch.stack(sizes).cpu().log()
    if len(grid) == 1:
        return log_size.exp()
    log_grid = torch.tensor(grid).double().log()
    log_t = torch.arange(1, diffusion.num_timesteps).double().log()
    right = torch.searchsorted(log_grid, log_t).clamp(1, len(grid) - 1)
    left = right - 1
    weight = (log_t - log_grid[left]) / (log_grid[right] - log_grid[left])
    return torch.lerp(log_size[left], log_size[right], weight).exp()


def pilot_distribution(sizes: Tensor) -> Tensor:
    """Probabilities of t = 1 .. T-1 for `sampled_bpd` (float64 [T-1]), proportional to the terms' sizes."""
    return (1 - PILOT_UNIFORM) * sizes / sizes.sum() + PILOT_UNIFORM / len(sizes)


def systematic_timesteps(probabilities: Tensor, u: Tensor, draws: int) -> Tensor:
    """Draw timesteps CDF^-1((u_i + k) / draws), each with probability p_t and evenly spread within an image.

    `u` is float64 [N] in [0, 1); the result is int64 [N, draws]. Runs on the CPU, because cumulative sums on a GPU are
    not deterministic.
    """
    points = (u[:, None] + torch.arange(draws)) / draws
    cdf = probabilities.cumsum(0)
    return 1 + torch.searchsorted(cdf / cdf[-1], points, right=True).clamp(max=len(probabilities) - 1)


@torch.no_grad()
def sampled_bpd(
    diffusion: Diffusion,
    model: Model,
    x_start: Tensor,
    noise: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,
    probabilities: Tensor,
    draws: int = 16,
    y: Tensor | None = None,
) -> SampledBpd:
    """Estimate the bound of x_start [N, C, H, W] from draws + 1 network evaluations per image instead of T.

    The estimate is prior + L_0 + the mean of L_t / p_t over `draws` timesteps. It is unbiased for any fixed
    `probabilities` (float64 [T-1], for t = 1 .. T-1) and u (float64 [N], uniform in [0, 1), independent for each
    image), both on the CPU. The variance of `total` covers both images and draws, so sd(total) / sqrt(N) is the
    standard error of its mean. `noise(i, t)` returns the eps of image i[j] at timestep t[j], [len(i), C, H, W].
    """
    n, device = len(x_start), x_start.device
    chosen = systematic_timesteps(probabilities, u, draws)
    t = torch.cat([torch.zeros(n, 1, dtype=torch.int64), chosen], dim=1).flatten().to(device)
    i = torch.arange(n, device=device).repeat_interleave(draws + 1)
    x_0 = x_start[i]
    x_t = diffusion.q_sample(x_0, t, noise(i, t))
    labels = y[i] if y is not None else None
    terms = vlb_term(diffusion, model, x_0, x_t, t, labels).bpd.double().view(n, draws + 1)
    weights = (1 / (draws * probabilities[chosen - 1])).to(device)
    prior = prior_bpd(diffusion, x_start).double()
    decoder = terms[:, 0]
    return SampledBpd(prior + decoder + (terms[:, 1:] * weights).sum(1), prior, decoder)


class JumpCosts(NamedTuple):
    """Mean bits/dim, over some images, of every step that a shorter chain can take; float64 [T, T], inf below.

    Watson et al. 2021 (arXiv:2106.03802) call these L(t, s).
    """

    kl: Tensor  # [s, t]: the step from timestep t directly to s < t
    decoder: Tensor  # [s, t]: the step from s to the image, after the step from t to s


@torch.no_grad()
def jump_costs(
    diffusion: Diffusion,
    model: Model,
    x_start: Tensor,
    noise: Callable[[int], Tensor],
    y: Tensor | None = None,
) -> JumpCosts:
    """Compute the costs of all steps between timesteps, with T network evaluations per image.

    There are T^2 costs, so use a `diffusion` of a few hundred timesteps. `noise` is as in `exact_bpd`.
    """
    steps, device = diffusion.num_timesteps, x_start.device
    kl = torch.full((steps, steps), math.inf, dtype=torch.float64, device=device)
    decoder = kl.clone()
    noisy, outputs = [], []
    for step in range(steps):
        t = torch.full((len(x_start),), step, device=device)
        noisy.append(diffusion.q_sample(x_start, t, noise(step)))
        outputs.append(diffusion.output(model, noisy[step], t, y))
        if step == 0:
            continue
        jumps = diffusion.jumps_from(step)
        landings = diffusion.landings_before(step)
        s = torch.arange(step, device=device)
        sums = torch.zeros(2, step, dtype=torch.float64, device=device)
        for i in range(len(x_start)):
            x_0, x_t, output = (x[i].expand(step, -1, -1, -1) for x in (x_start, noisy[step], outputs[step]))
            posterior = jumps.q_posterior_mean_variance(x_0, x_t, s)
            p = jumps.prediction(output, x_t, s)
            sums[0] += mean_flat(normal_kl(posterior.mean, posterior.log_variance, p.mean, p.log_variance)).double()

            x_s = torch.stack([x[i] for x in noisy[:step]])
            output = torch.stack([x[i] for x in outputs[:step]])
            p = landings.prediction(output, x_s, s)
            sums[1] -= mean_flat(discretized_gaussian_log_likelihood(x_0, p.mean, 0.5 * p.log_variance)).double()
        kl[:step, step], decoder[:step, step] = sums / (len(x_start) * math.log(2))
    return JumpCosts(kl, decoder)


def best_path(costs: JumpCosts, steps: int) -> list[int]:
    """Find by dynamic programming the `steps` timesteps, including the last, whose chain has the lowest bound.

    Raises ValueError unless `steps` is between 2 and the number of timesteps.
    """
    total = len(costs.kl)
    if not 2 <= steps <= total:
        raise ValueError(f"steps of the best path: got {steps}, expected 2 to {total}")
    best, first = (costs.decoder + costs.kl).min(0)  # of the chains with timesteps first[t], t
    before = [first]
    for _ in range(steps - 2):
        best, previous = (best[:, None] + costs.kl).min(0)
        before.append(previous)
    path = [total - 1]
    for previous in reversed(before):
        path.append(int(previous[path[-1]]))
    return path[::-1]
