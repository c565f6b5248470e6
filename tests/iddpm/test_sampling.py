import math

import pytest
import torch
from golden import arrays, denoiser, error, keys, tensor

from iddpm.config import DiffusionConfig
from iddpm.diffusion import Diffusion
from iddpm.sampling import (
    ancestral,
    ancestral_step,
    ddim,
    ddim_invert,
    ddim_invert_step,
    ddim_step,
    final,
    slerp,
)
from iddpm.schedule import respace

STEPS = sorted(key.rpartition("/")[0] for key in keys("step/mean"))
CHAINS = sorted(key.rpartition("/")[0] for key in keys("chain/x_T"))


@pytest.mark.parametrize("path", STEPS)
def test_single_steps_agree_with_the_original(path):
    _, schedule, steps, variance = path.split("/")
    config = DiffusionConfig(timesteps=int(steps), schedule=schedule, variance=variance.lower())
    diffusion = Diffusion(config)
    x_t, t, z = (tensor(f"{path}/{name}") for name in ("x_t", "t", "z"))
    p = diffusion.p_mean_variance(denoiser(config.learns_variance), x_t, t)
    assert error(ancestral_step(p, t, z), tensor(f"{path}/p_sample")) < 1e-5
    for eta in (0.0, 0.5, 1.0):
        assert error(ddim_step(diffusion, p.pred_xstart, x_t, t, z, eta), tensor(f"{path}/ddim_eta={eta}")) < 1e-5
    assert error(ddim_invert_step(diffusion, p.pred_xstart, x_t, t), tensor(f"{path}/ddim_reverse")) < 1e-5


@pytest.mark.parametrize("path", CHAINS)
def test_chains_agree_with_the_original(path):
    _, schedule, steps, spec, kind, eta = path.split("/")
    keep = respace(int(steps), spec)
    assert keep == tensor(f"{path}/timestep_map").tolist()
    diffusion = Diffusion(DiffusionConfig(timesteps=int(steps), schedule=schedule), keep)
    torch.testing.assert_close(diffusion.betas, tensor(f"{path}/betas"), rtol=1e-12, atol=0)

    x_T, noise = tensor(f"{path}/x_T"), None
    if f"{path}/z" in arrays():
        z = tensor(f"{path}/z")

        def noise(t):
            return z[len(z) - 1 - t]

    if kind == "ancestral":
        chain = ancestral(denoiser(True), diffusion, x_T, noise)
    else:
        chain = ddim(denoiser(True), diffusion, x_T, float(eta.removeprefix("eta=")), noise)
    seen = list(chain)
    assert [step.t for step in seen] == list(reversed(range(len(keep))))
    assert error(seen[-1].x, tensor(f"{path}/x_0")) < 1e-5


def gaussian_model(diffusion, mean, std):
    """The optimal eps for data that are N(mean, std^2) in every pixel: smooth, and linear in x."""

    def model(x, t, y=None):
        step = torch.searchsorted(diffusion.timestep_map, (t * diffusion.config.timesteps / 1000).round().long())
        ac = diffusion.alphas_cumprod[step].to(x.dtype).view(-1, 1, 1, 1)
        return (1 - ac).sqrt() * (x - ac.sqrt() * mean) / (ac * std**2 + 1 - ac)

    return model


def gaussian_diffusion(steps):
    config = DiffusionConfig(timesteps=1000, variance="fixed_small", loss="mse")
    return Diffusion(config, respace(1000, str(steps)))


def normals(seed, n):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
def test_samples_have_the_distribution_of_the_data(eta):
    diffusion, n = gaussian_diffusion(400), 300
    model = gaussian_model(diffusion, 0.3, 0.2)

    def noise(t):
        return normals(t + 1, n)

    x_T = normals(0, n)
    chain = ancestral(model, diffusion, x_T, noise) if eta is None else ddim(model, diffusion, x_T, eta, noise)
    x = final(chain)
    assert x.dtype == torch.float64
    assert abs(x.mean() - 0.3) < 0.01
    assert abs(x.std() - 0.2) < 0.01


@pytest.mark.parametrize(("steps", "limit"), [(50, 0.1), (250, 0.02), (1000, 0.005)])
def test_inversion_and_ddim_bring_an_image_back(steps, limit):
    diffusion = gaussian_diffusion(steps)
    model = gaussian_model(diffusion, 0.3, 0.2)
    x_0 = 0.3 + 0.2 * normals(0, 10)
    encoded = list(ddim_invert(model, diffusion, x_0))
    assert [step.t for step in encoded] == list(range(steps))
    x_T = encoded[-1].x
    assert abs(x_T.std() - 1) < 0.1
    assert (final(ddim(model, diffusion, x_T)) - x_0).abs().max() < limit
    assert (x_T - x_0).abs().max() > 1


def test_the_inverse_of_a_step_has_the_noise_level_of_its_timestep():
    diffusion = gaussian_diffusion(1000)
    x_0 = 0.3 + 0.2 * normals(0, 40)
    for step in ddim_invert(gaussian_model(diffusion, 0.3, 0.2), diffusion, x_0, clip_denoised=False):
        if step.t % 100 == 0:
            ac = diffusion.alphas_cumprod[step.t]
            assert abs(step.x.std() - (ac * 0.2**2 + 1 - ac).sqrt()) < 0.03


def test_ddim_with_eta_zero_draws_nothing_and_above_wants_noise():
    def noise(t):
        raise AssertionError("drawn")

    diffusion = gaussian_diffusion(10)
    model, x_T = gaussian_model(diffusion, 0.0, 0.5), normals(0, 2)
    assert torch.equal(final(ddim(model, diffusion, x_T, 0.0, noise)), final(ddim(model, diffusion, x_T)))
    with pytest.raises(ValueError, match=r"noise: got None with eta=0\.5"):
        next(ddim(model, diffusion, x_T, 0.5))


def test_labels_and_clipping_reach_the_network():
    diffusion, seen = gaussian_diffusion(10), []

    def model(x, t, y=None):
        seen.append(y)
        return -2 * x

    y, x_T = torch.tensor([4, 2]), normals(0, 2)
    for clip, biggest in ((True, 1.0), (False, math.inf)):
        for chain in (
            ancestral(model, diffusion, x_T, lambda t: normals(t, 2), y, clip),
            ddim(model, diffusion, x_T, y=y, clip_denoised=clip),
            ddim_invert(model, diffusion, x_T, y, clip),
        ):
            predicted = torch.stack([step.pred_xstart.abs().max() for step in chain]).max()
            assert predicted <= biggest
            assert clip or predicted > 1
    assert len(seen) == 60
    assert all(label is y for label in seen)


def test_a_chain_is_lazy_and_leaves_gradients_on_for_its_caller():
    calls = []

    def model(x, t, y=None):
        calls.append(len(x))
        assert not torch.is_grad_enabled()
        return torch.zeros_like(x)

    chain = ddim(model, gaussian_diffusion(10), normals(0, 2))
    assert calls == []
    next(chain)
    assert calls == [2]
    assert torch.is_grad_enabled()


def test_slerp_ends_norm_and_angle():
    a, b = normals(0, 3), normals(1, 3)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    radius = a.flatten(1).norm(dim=1)
    whole = torch.cosine_similarity(a.flatten(1), b.flatten(1)).acos()
    for weight in (0.1, 0.5, 0.8):
        between = slerp(a, b, weight).flatten(1)
        torch.testing.assert_close(between.norm(dim=1), radius)
        angle = torch.cosine_similarity(between, a.flatten(1)).acos()
        torch.testing.assert_close(angle, weight * whole)


def test_slerp_of_the_same_image_is_that_image():
    a = normals(0, 3).float()
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    mixed = slerp(a, torch.cat([a[:1], normals(1, 2).float()]), 0.5)
    assert mixed.isfinite().all()
    torch.testing.assert_close(mixed[0], a[0])
