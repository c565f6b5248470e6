import math

import pytest
import torch
from golden import arrays, denoiser, error, keys, tensor

from iddpm.config import DiffusionConfig
from iddpm.diffusion import Diffusion
from iddpm.likelihood import (
    discretized_gaussian_log_likelihood,
    exact_bpd,
    normal_kl,
    prior_bpd,
    vlb_term,
)

BOUNDS = sorted(key.rpartition("/")[0] for key in keys("bpd/total_bpd"))


def golden_bound(path):
    _, schedule, steps, variance = path.split("/")
    config = DiffusionConfig(timesteps=int(steps), schedule=schedule, variance=variance.lower())
    z = tensor(f"{path}/z_from_last_timestep_down")
    x_0 = tensor("batch/x0")[: z.shape[1]]
    return Diffusion(config), denoiser(config.learns_variance), x_0, lambda t: z[int(steps) - 1 - t]


@pytest.mark.parametrize("path", BOUNDS)
def test_exact_bound_agrees_with_the_original(path):
    got = exact_bpd(*golden_bound(path))
    assert error(got.total, tensor(f"{path}/total_bpd")) < 1e-5
    assert error(got.prior, tensor(f"{path}/prior_bpd")) < 1e-5
    for name in ("vb", "xstart_mse", "mse"):
        assert error(getattr(got, name).flip(1), tensor(f"{path}/{name}")) < 1e-5, name


@pytest.mark.parametrize("timesteps_per_call", [7, 100, 1000])
def test_timesteps_per_call_changes_nothing_but_the_calls(timesteps_per_call):
    diffusion, model, x_0, noise = golden_bound("bpd/cosine/100/LEARNED_RANGE")
    calls = []

    def counted(x, t, y=None):
        calls.append(len(x))
        assert y.tolist() == [3, 5] * (len(x) // 2)
        return model(x, t)

    y = torch.tensor([3, 5])
    one = exact_bpd(diffusion, counted, x_0, noise, y, timesteps_per_call=1)
    assert calls == [2] * 100
    calls.clear()
    many = exact_bpd(diffusion, counted, x_0, noise, y, timesteps_per_call=timesteps_per_call)
    assert len(calls) == math.ceil(100 / timesteps_per_call)
    assert sum(calls) == 200
    for got, expected in zip(many, one, strict=True):
        assert error(got, expected) < 1e-6


def test_column_t_is_timestep_t_of_a_strided_chain_too():
    full, model, x_0, _ = golden_bound("bpd/cosine/100/LEARNED_RANGE")
    diffusion = Diffusion(full.config, keep=[0, 30, 60, 99])
    eps = torch.randn(4, *x_0.shape, generator=torch.Generator().manual_seed(0))
    bpd = exact_bpd(diffusion, model, x_0, lambda t: eps[t])
    assert bpd.vb.shape == (2, 4)
    for step in range(4):
        t = torch.full((2,), step)
        term = vlb_term(diffusion, model, x_0, diffusion.q_sample(x_0, t, eps[step]), t)
        assert error(bpd.vb[:, step], term.bpd) < 1e-6
    assert error(bpd.total, prior_bpd(diffusion, x_0) + bpd.vb.sum(1)) < 1e-6


def test_the_bound_needs_no_gradients():
    diffusion, _, x_0, noise = golden_bound("bpd/linear/100/FIXED_LARGE")
    factor = torch.ones((), requires_grad=True)
    bpd = exact_bpd(diffusion, lambda x, t, y: denoiser(False)(x, t) * factor, x_0, noise)
    assert not bpd.total.requires_grad


@pytest.mark.parametrize("key", [key for key in arrays() if key.startswith("likelihood/")])
def test_pixel_likelihood_agrees_with_the_original(key):
    mean, log_scale = (float(field.split("=")[1]) for field in key.split("/")[1:])
    pixels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float()
    got = discretized_gaussian_log_likelihood(pixels, torch.tensor(mean), torch.tensor(log_scale))
    assert error(got, tensor(key)) < 1e-5


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, -2.0), (0.95, -1.0), (-1.3, 0.0)])
def test_pixel_likelihoods_add_to_one(mean, log_scale):
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretized_gaussian_log_likelihood(pixels, torch.tensor(mean), torch.tensor(log_scale))
    assert abs(log_p.exp().sum() - 1) < 1e-6


def test_normal_kl_agrees_with_the_original_and_with_torch():
    mean1, log_variance1, mean2, log_variance2 = tensor("normal_kl/in")
    got = normal_kl(mean1, log_variance1, mean2, log_variance2)
    assert error(got, tensor("normal_kl/out")) < 1e-5
    torchs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean1, (0.5 * log_variance1).exp()),
        torch.distributions.Normal(mean2, (0.5 * log_variance2).exp()),
    )
    assert error(got, torchs) < 1e-5
    assert normal_kl(mean1, log_variance1, mean1, log_variance1).abs().max() < 1e-6


def test_the_prior_is_nearly_nothing():
    x_0 = tensor("batch/x0")
    for schedule in ("linear", "cosine"):
        prior = prior_bpd(Diffusion(DiffusionConfig(timesteps=1000, schedule=schedule)), x_0)
        assert (prior >= 0).all()
        assert prior.max() < 1e-4
