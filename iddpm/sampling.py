"""Samplers as generators that yield every step, so that the caller can watch, record or stop.

For a shorter chain, pass a Diffusion with `keep`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion import Diffusion, Model, Prediction, at


class Step(NamedTuple):
    t: int  # index in the chain
    x: Tensor  # [N, C, H, W] after the step
    pred_xstart: Tensor  # [N, C, H, W], predicted by the step


@torch.no_grad()
def ancestral(
    model: Model,
    diffusion: Diffusion,
    x_T: Tensor,
    noise: Callable[[int], Tensor],
    y: Tensor | None = None,
    clip_denoised: bool = True,
) -> Iterator[Step]:
    """Run DDPM's sampler (algorithm 2) from standard normal x_T [N, C, H, W] through t = K-1 .. 0.

    `noise(t)` returns the standard normal z [N, C, H, W] of a step; the last step, t = 0, adds none.
    """
    x = x_T
    for i in reversed(range(diffusion.num_timesteps)):
        t = _filled(i, x)
        p = diffusion.p_mean_variance(model, x, t, y, clip_denoised)
        z = noise(i) if i > 0 else torch.zeros_like(x)
        x = ancestral_step(p, t, z)
        yield Step(i, x, p.pred_xstart)


@torch.no_grad()
def ddim(
    model: Model,
    diffusion: Diffusion,
    x_T: Tensor,
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    y: Tensor | None = None,
    clip_denoised: bool = True,
) -> Iterator[Step]:
    """Run DDIM's sampler (equation 12) from standard normal x_T through t = K-1 .. 0.

    eta = 0 is deterministic; eta = 1 uses the variance of DDPM's posterior. eta > 0 needs `noise(t)`, as in
    `ancestral`.
    """
    if eta == 0:
        noise = None
    elif noise is None:
        raise ValueError(f"noise: got None with eta={eta}, expected a function of the timestep; only eta=0 needs none")
    x = x_T
    for i in reversed(range(diffusion.num_timesteps)):
        t = _filled(i, x)
        pred_xstart = diffusion.p_mean_variance(model, x, t, y, clip_denoised).pred_xstart
        z = noise(i) if noise and i > 0 else torch.zeros_like(x)
        x = ddim_step(diffusion, pred_xstart, x, t, z, eta)
        yield Step(i, x, pred_xstart)


@torch.no_grad()
def ddim_invert(
    model: Model, diffusion: Diffusion, x_0: Tensor, y: Tensor | None = None, clip_denoised: bool = True
) -> Iterator[Step]:
    """Run deterministic DDIM in reverse (DDIM section 4.3): step t's x has the noise level of timestep t.

    From the last step's x as x_T, `ddim` reconstructs x_0, more closely the longer the chain.
    """
    t = _filled(0, x_0)
    pred_xstart = diffusion.p_mean_variance(model, x_0, t, y, clip_denoised).pred_xstart
    x = diffusion.q_sample(x_0, t, diffusion.eps_from_xstart(x_0, t, pred_xstart))
    yield Step(0, x, pred_xstart)
    for i in range(diffusion.num_timesteps - 1):
        t = _filled(i, x)
        pred_xstart = diffusion.p_mean_variance(model, x, t, y, clip_denoised).pred_xstart
        x = ddim_invert_step(diffusion, pred_xstart, x, t)
        yield Step(i + 1, x, pred_xstart)


def final(steps: Iterable[Step]) -> Tensor:
    """Run the chain to its end and return the x [N, C, H, W] of its last step."""
    for step in steps:
        last = step
    return last.x


def ancestral_step(p: Prediction, t: Tensor, z: Tensor) -> Tensor:
    """Return x_{t-1} of each image's prediction at its own timestep t (int64 [N]); z is ignored where t is 0."""
    noisy = (t > 0).to(z.dtype).view(-1, 1, 1, 1)
    sigma = (0.5 * p.log_variance).exp()
    return p.mean + noisy * sigma * z


def ddim_step(diffusion: Diffusion, pred_xstart: Tensor, x_t: Tensor, t: Tensor, z: Tensor, eta: float = 0.0) -> Tensor:
    """Return x_{t-1} by DDIM equations 12 and 16; sigma is 0 at t = 0."""
    eps = diffusion.eps_from_xstart(x_t, t, pred_xstart)  # consistent with the clipped x_start
    ac, ac_prev = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    variance = eta**2 * (1 - ac_prev) / (1 - ac) * (1 - ac / ac_prev)
    direction = (1 - ac_prev - variance).clamp(min=0).sqrt()  # 0 at t = 0, up to rounding
    mean = at(ac_prev.sqrt(), t, x_t) * pred_xstart + at(direction, t, x_t) * eps
    return mean + at(variance.sqrt(), t, x_t) * z


def ddim_invert_step(diffusion: Diffusion, pred_xstart: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return x_{t+1} by an Euler step of DDIM equation 14. Past the last timestep is pure noise."""
    eps = diffusion.eps_from_xstart(x_t, t, pred_xstart)
    ac_next = diffusion.alphas_cumprod_next
    signal = at(ac_next.sqrt(), t, x_t)
    sigma = at((1 - ac_next).sqrt(), t, x_t)
    return signal * pred_xstart + sigma * eps


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate spherically from a (weight 0) to b (weight 1), both [N, ...], per image (DDIM appendix D.5)."""
    cosine = torch.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)
    angle = cosine.acos().view(-1, *[1] * (a.dim() - 1))
    sine = angle.sin()
    along = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / sine
    # If a and b are parallel, the great circle is undefined: interpolate linearly.
    return torch.where(sine < 1e-4, torch.lerp(a, b, weight), along)


def _filled(t: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, device=x.device)
