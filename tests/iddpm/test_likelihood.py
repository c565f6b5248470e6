import math
from itertools import combinations, pairwise

import pytest
import torch
from golden import arrays, denoiser, error, keys, tensor

from iddpm.config import DiffusionConfig
from iddpm.diffusion import Diffusion
from iddpm.gaussian import discretized_gaussian_log_likelihood, normal_kl
from iddpm.likelihood import (
    best_path,
    exact_bpd,
    jump_costs,
    pilot_distribution,
    pilot_sizes,
    prior_bpd,
    sampled_bpd,
    systematic_timesteps,
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


# ------------------------------------------------------------------------------------------- sampled

STEPS = 50
FULL = Diffusion(DiffusionConfig(timesteps=STEPS))
EPS = torch.randn(STEPS, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def images(n=3):
    return tensor("batch/x0")[:n]


def noise_of(i, t):
    return EPS[t.cpu(), i.cpu()]


def skewed(power):
    return torch.arange(1, STEPS).double() ** -power / (torch.arange(1, STEPS).double() ** -power).sum()


@pytest.mark.parametrize("draws", [1, 4])
def test_systematic_timesteps_have_their_probabilities(draws):
    p = skewed(1.0)
    u = (torch.arange(40_000).double() + 0.5) / 40_000
    t = systematic_timesteps(p, u, draws)
    assert t.shape == (40_000, draws)
    assert (t.min(), t.max()) == (1, STEPS - 1)
    shares = torch.bincount(t.flatten(), minlength=STEPS)[1:] / t.numel()
    assert (shares - p).abs().max() < 1e-4
    # Systematic sampling: each timestep is drawn its expected number of times per image, rounded up or down.
    for step in (1, 5, 30):
        count = (t == step).sum(1)
        expected = draws * p[step - 1]
        assert set(count.tolist()) <= {math.floor(expected), math.ceil(expected)}


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_sampled_bound_is_unbiased_for_any_distribution(power):
    """Averaged over a grid of u, the estimate equals the exact bound for the same noise, for any probabilities."""
    exact = exact_bpd(FULL, denoiser(True), images(), lambda t: EPS[t])
    n = 4000
    u = (torch.arange(n).double() + 0.5) / n
    for row in range(3):
        x = images()[row].expand(n, -1, -1, -1)
        got = sampled_bpd(FULL, denoiser(True), x, lambda i, t, row=row: EPS[t, row], u, skewed(power), draws=1)
        assert abs(got.total.mean() / exact.total[row] - 1) < (2e-3 if power == 2 else 5e-4)
        assert error(got.decoder[:1], exact.vb[row : row + 1, 0].double()) < 1e-6
        assert error(got.prior[:1], exact.prior[row : row + 1].double()) < 1e-6


def test_importance_lowers_the_variance_and_draws_lower_it_more():
    x = images()
    p = pilot_distribution(pilot_sizes(FULL, denoiser(True), x, lambda t: EPS[t, torch.arange(3)] * -1))
    even = torch.full_like(p, 1 / len(p))
    u = (torch.arange(500).double() * 0.6180339887) % 1

    def spread(p, draws):
        parts = [sampled_bpd(FULL, denoiser(True), x[:1].expand(500, -1, -1, -1), lambda i, t: EPS[t, 0], u, p, draws)]
        return parts[0].total.std()

    assert spread(p, 4) < 0.5 * spread(even, 4)
    assert spread(p, 16) < 0.5 * spread(p, 4)


def test_the_pilot_measures_the_terms_and_leaves_none_out():
    sizes = pilot_sizes(FULL, denoiser(True), images(), lambda t: EPS[t, torch.arange(3)])
    exact = exact_bpd(FULL, denoiser(True), images(), lambda t: EPS[t])
    rms = exact.vb[:, 1:].double().square().mean(0).sqrt()
    assert sizes.shape == (STEPS - 1,)
    assert error(sizes[:5], rms[:5]) < 1e-5  # small timesteps are measured, not interpolated
    assert (sizes / rms).log().abs().max() < 0.7
    p = pilot_distribution(sizes)
    assert abs(p.sum() - 1) < 1e-12
    assert p.min() >= 0.01 / (STEPS - 1)


def test_labels_follow_their_images():
    seen = []

    def model(x, t, y=None):
        seen.append(y)
        return denoiser(True)(x, t)

    u = torch.tensor([0.1, 0.5, 0.9]).double()
    sampled_bpd(FULL, model, images(), noise_of, u, skewed(1.0), 2, torch.tensor([7, 8, 9]))
    assert seen[0].tolist() == [7, 7, 7, 8, 8, 8, 9, 9, 9]


# ---------------------------------------------------------------------------------------- best path


@pytest.fixture(scope="module", params=["learned_range", "fixed_large", "fixed_small"])
def small(request):
    """Return the costs of a chain of 8 timesteps, and a function for the images' bound along any path through it."""
    config = DiffusionConfig(timesteps=50, variance=request.param)
    grid = [0, 2, 5, 11, 20, 30, 40, 49]
    model = denoiser(config.learns_variance)

    def bound(path):
        kept = [grid[i] for i in path]
        return exact_bpd(Diffusion(config, kept), model, images(), lambda t: EPS[kept[t]]).vb.sum(1).mean()

    return jump_costs(Diffusion(config, grid), model, images(), lambda t: EPS[grid[t]]), bound


@pytest.mark.parametrize("path", [[0, 7], [3, 7], [0, 3, 7], [1, 2, 6, 7], list(range(8))])
def test_costs_add_up_to_the_bound_of_the_shorter_chain(small, path):
    costs, bound = small
    total = costs.decoder[path[0], path[1]] + sum(costs.kl[s, t] for s, t in pairwise(path))
    assert abs(total / bound(path) - 1) < 1e-5


@pytest.mark.parametrize("steps", [2, 3, 5, 8])
def test_no_path_is_better_than_the_best_path(small, steps):
    costs, bound = small
    path = best_path(costs, steps)
    assert len(path) == steps
    least = min(bound([*rest, 7]) for rest in combinations(range(7), steps - 1))
    assert bound(path) <= least * (1 + 1e-6)


def test_a_path_of_too_many_steps_is_refused(small):
    with pytest.raises(ValueError, match="expected 2 to 8"):
        best_path(small[0], 9)
