"""Gaussian diffusion: the forward process q, the learned reverse process p, and the training losses."""

import math
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from iddpm.config import DiffusionConfig
from iddpm.gaussian import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from iddpm.schedule import make_betas


class Model(Protocol):
    """The network: images [N, C, H, W], float32 timesteps [N], labels [N] -> [N, C or 2C, H, W]."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, /) -> Tensor: ...


class Gaussian(NamedTuple):
    """A diagonal Gaussian over images; each field broadcasts to [N, C, H, W]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) and the x_start that it implies, each [N, C, H, W]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


class Losses(NamedTuple):
    """Per-example losses [N]. mse is None for the kl losses; vb is None for those and for a fixed variance."""

    loss: Tensor
    mse: Tensor | None
    vb: Tensor | None  # in bits/dim, scaled so that loss = mse + vb


class Diffusion:
    """The diffusion process of a DiffusionConfig, or the shorter chain over its timesteps `keep` (IDDPM section 4).

    Timesteps t (int64 [N]) index this chain, 0 .. K-1. Images are [N, C, H, W] in [-1, 1]. The tables are float64
    [K]; values gathered from them are cast to the dtype of the images, so a float64 run is float64 throughout. No
    method synchronises with the device.

    Raises ValueError if `keep` is not increasing or is out of range.
    """

    def __init__(self, config: DiffusionConfig, keep: Sequence[int] | None = None, device: torch.device | str = "cpu"):
        betas = make_betas(config.schedule, config.timesteps)
        kept = list(range(config.timesteps)) if keep is None else list(keep)
        if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= config.timesteps:
            raise ValueError(f"keep: got {kept}, expected increasing timesteps from 0 to {config.timesteps - 1}")
        one = torch.ones(1, dtype=torch.float64)
        if keep is not None:
            kept_cumprod = (1 - betas).cumprod(0)[kept]
            betas = 1 - kept_cumprod / torch.cat([one, kept_cumprod[:-1]])

        self.config = config
        self.num_timesteps = len(kept)
        self.timestep_map = torch.tensor(kept, device=device)
        alphas_cumprod = (1 - betas).cumprod(0)
        alphas_cumprod_prev = torch.cat([one, alphas_cumprod[:-1]])
        self.alphas_cumprod_next = torch.cat([alphas_cumprod[1:], torch.zeros_like(one)]).to(device)
        self._set_tables(betas.to(device), alphas_cumprod.to(device), alphas_cumprod_prev.to(device))

    def _set_tables(
        self, betas: Tensor, alphas_cumprod: Tensor, alphas_cumprod_prev: Tensor, stand_in: Tensor | None = None
    ) -> None:
        """All tensors are float64 [K]. `stand_in` replaces posterior variances of 0; default: the variance at t = 1."""
        self.betas = betas
        self.log_betas = betas.log()
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_prev = alphas_cumprod_prev
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt()
        self.sqrt_recip_alphas_cumprod = alphas_cumprod.rsqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / alphas_cumprod - 1).sqrt()
        # q(x_{t-1} | x_t, x_0): DDPM equations 6 and 7.
        self.posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        self.posterior_mean_coef1 = betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)
        self.posterior_mean_coef2 = (1 - alphas_cumprod_prev) * (1 - betas).sqrt() / (1 - alphas_cumprod)
        # At t = 0 the posterior variance is 0, whose log is infinite; the variance at t = 1 replaces it.
        if stand_in is None:
            stand_in = self.posterior_variance[1:2] if len(betas) > 1 else betas
        exact = alphas_cumprod_prev == 1
        self.posterior_log_variance_clipped = torch.where(exact, stand_in, self.posterior_variance).log()
        self.fixed_large_variance = torch.where(exact, stand_in, betas)
        self.fixed_large_log_variance = self.fixed_large_variance.log()

    def jumps_from(self, t: int) -> "Diffusion":
        """A process of t timesteps whose timestep s takes x_t directly to x_s, as in any chain with both.

        The network's output for x_t serves all t timesteps.
        """
        process = copy(self)
        process.timestep_map = self.timestep_map[t].expand(t)
        now = self.alphas_cumprod[t].expand(t)
        then = self.alphas_cumprod[:t]
        process._set_tables(1 - now / then, now, then)
        return process

    def landings_before(self, t: int) -> "Diffusion":
        """A process of t timesteps whose timestep s takes x_s directly to x_0, in a chain that ends x_t, x_s, x_0."""
        process = copy(self)
        process.timestep_map = self.timestep_map[:t]
        bar = self.alphas_cumprod[:t]
        process._set_tables(1 - bar, bar, torch.ones_like(bar), self.jumps_from(t).posterior_variance)
        return process

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> Gaussian:
        """Return q(x_t | x_0) (DDPM equation 4)."""
        variance = 1 - self.alphas_cumprod
        mean = at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        return Gaussian(mean, at(variance, t, x_start), at(variance.log(), t, x_start))

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Sample x_t from x_start and standard normal `noise` (IDDPM equation 9)."""
        signal = at(self.sqrt_alphas_cumprod, t, x_start)
        sigma = at(self.sqrt_one_minus_alphas_cumprod, t, x_start)
        return signal * x_start + sigma * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """Return q(x_{t-1} | x_t, x_0) (IDDPM equations 10 to 12), with the log variance clipped at t = 0."""
        mean = at(self.posterior_mean_coef1, t, x_t) * x_start + at(self.posterior_mean_coef2, t, x_t) * x_t
        variance = at(self.posterior_variance, t, x_t)
        return Gaussian(mean, variance, at(self.posterior_log_variance_clipped, t, x_t))

    def xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the x_start that `eps` turns into x_t."""
        return at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * eps

    def eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """Return the noise that turns x_start into x_t."""
        scaled = at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return (scaled - x_start) / at(self.sqrt_recipm1_alphas_cumprod, t, x_t)

    def p_mean_variance(
        self, model: Model, x_t: Tensor, t: Tensor, y: Tensor | None = None, clip_denoised: bool = True
    ) -> Prediction:
        """Return the model's p(x_{t-1} | x_t); clip_denoised clips the predicted x_start to [-1, 1]."""
        return self.prediction(self.output(model, x_t, t, y), x_t, t, clip_denoised)

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None
    ) -> Losses:
        """Return the configured loss of each example at its timestep t, given standard normal `noise` [N, C, H, W]."""
        config = self.config
        x_t = self.q_sample(x_start, t, noise)
        output = self.output(model, x_t, t, y)
        posterior = self.q_posterior_mean_variance(x_start, x_t, t)

        def vlb(output: Tensor) -> Tensor:
            return vlb_bits(x_start, t, posterior, self.prediction(output, x_t, t, clip_denoised=False))

        if config.loss in ("kl", "rescaled_kl"):
            # T times the term at a uniform t estimates the sum over t, L_vlb (IDDPM equation 4).
            scale: float = self.num_timesteps if config.loss == "rescaled_kl" else 1
            return Losses(scale * vlb(output), None, None)

        target = {"epsilon": noise, "x_start": x_start, "x_prev": posterior.mean}[config.mean]
        if not config.learns_variance:
            mse = mean_flat((target - output).square())
            return Losses(mse, mse, None)
        # L_hybrid (IDDPM equation 16): the bound trains only the variance; its gradient stops at the mean.
        # The scale is the paper's lambda = 0.001 times the T of rescaled_kl.
        mean, variance = output.chunk(2, dim=1)
        mse = mean_flat((target - mean).square())
        scale = self.num_timesteps / 1000 if config.loss == "rescaled_mse" else 1
        vb = scale * vlb(torch.cat([mean.detach(), variance], dim=1))
        return Losses(mse + vb, mse, vb)

    def output(self, model: Model, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Return the network's output for x_t, in the dtype of x_t."""
        timesteps = self.timestep_map[t].float()
        if self.config.rescale_timesteps:
            timesteps = timesteps * (1000 / self.config.timesteps)
        # The network may be bfloat16, the arithmetic on its output is not.
        output = model(x_t, timesteps, y).to(x_t.dtype)
        expected = self.config.out_channels(x_t.shape[1])
        assert output.shape[1] == expected, f"model gave {output.shape[1]} channels, expected {expected}"
        return output

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = True) -> Prediction:
        """Return the p(x_{t-1} | x_t) that the network's output describes."""
        config = self.config
        smallest = at(self.posterior_log_variance_clipped, t, x_t)
        largest = at(self.log_betas, t, x_t)
        if config.variance == "fixed_small":
            variance = at(self.posterior_variance, t, x_t)
            log_variance = smallest
        elif config.variance == "fixed_large":
            variance = at(self.fixed_large_variance, t, x_t)
            log_variance = at(self.fixed_large_log_variance, t, x_t)
        elif config.variance == "learned":
            output, log_variance = output.chunk(2, dim=1)
            variance = log_variance.exp()
        else:  # IDDPM equation 15, with v scaled from [-1, 1] to [0, 1]
            output, v = output.chunk(2, dim=1)
            log_variance = (v + 1) / 2 * largest + (1 - v) / 2 * smallest
            variance = log_variance.exp()

        if config.mean == "epsilon":
            pred_xstart = self.xstart_from_eps(x_t, t, output)
        elif config.mean == "x_start":
            pred_xstart = output
        else:  # the posterior mean, solved for x_start
            coef1 = self.posterior_mean_coef1
            ratio = self.posterior_mean_coef2 / coef1
            pred_xstart = at(1 / coef1, t, x_t) * output - at(ratio, t, x_t) * x_t
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = output if config.mean == "x_prev" else self.q_posterior_mean_variance(pred_xstart, x_t, t).mean
        return Prediction(mean, variance.expand_as(mean), log_variance.expand_as(mean), pred_xstart)


def vlb_bits(x_start: Tensor, t: Tensor, posterior: Gaussian, p: Prediction) -> Tensor:
    """Bound terms [N] in bits/dim: L_{t-1}, the KL from posterior to model, or the decoder's L_0 where t is 0."""
    kl = mean_flat(normal_kl(posterior.mean, posterior.log_variance, p.mean, p.log_variance))
    decoder_nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, p.mean, 0.5 * p.log_variance))
    return torch.where(t == 0, decoder_nll, kl) / math.log(2)


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Return table[t] in the dtype of `like`, as [N, 1, 1, 1] to broadcast against it."""
    return table[t].to(like.dtype).view(-1, 1, 1, 1)
