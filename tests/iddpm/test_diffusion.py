from dataclasses import replace

import pytest
import torch
from golden import MEANS, arrays, denoiser, error, keys, tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iddpm.config import DiffusionConfig
from iddpm.diffusion import Diffusion
from iddpm.schedule import respace
from iddpm.timesteps import LossSecondMomentSampler

LOSSES = sorted(key.rpartition("/")[0] for key in keys("loss/loss"))
STEPS = sorted(key.rpartition("/")[0] for key in keys("step/mean"))


class NoHostSync(TorchDispatchMode):
    """Fails on any operation that waits for the device or has a data-dependent shape."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.FORBIDDEN), f"{name} waits for the device"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean indexing waits for the device"
        return func(*args, **(kwargs or {}))


def golden_config(path: str) -> DiffusionConfig:
    _, schedule, steps, mean, variance, loss, rescale = path.split("/")
    return DiffusionConfig(
        timesteps=int(steps),
        schedule=schedule,
        mean=MEANS[mean],
        variance=variance.lower(),
        loss=loss.lower(),
        rescale_timesteps=rescale.endswith("1"),
    )


def test_the_golden_losses_are_every_combination():
    assert len(LOSSES) == len({golden_config(path) for path in LOSSES})
    combinations = {(c.mean, c.variance, c.loss) for c in map(golden_config, LOSSES) if c.schedule == "cosine"}
    assert len(combinations) == 3 * 4 * 4


@pytest.mark.parametrize("path", LOSSES)
def test_losses_agree_with_the_original(path):
    config = golden_config(path)
    t = tensor(f"loss/{config.schedule}/{config.timesteps}/t")
    losses = Diffusion(config).training_losses(
        denoiser(config.learns_variance), tensor("batch/x0"), t, tensor("batch/noise")
    )
    for name, got in losses._asdict().items():
        if f"{path}/{name}" in arrays():
            assert error(got, tensor(f"{path}/{name}")) < 1e-5, name
        else:
            assert got is None


@pytest.mark.parametrize("path", STEPS)
def test_a_reverse_step_agrees_with_the_original(path):
    _, schedule, steps, variance = path.split("/")
    config = DiffusionConfig(timesteps=int(steps), schedule=schedule, variance=variance.lower())
    model = denoiser(config.learns_variance)
    p = Diffusion(config).p_mean_variance(model, tensor(f"{path}/x_t"), tensor(f"{path}/t"))
    for name, got in p._asdict().items():
        assert error(got, tensor(f"{path}/{name}")) < 1e-5, name


def test_q_sample_and_its_inverses():
    diffusion = Diffusion(DiffusionConfig(timesteps=100))
    x_0, eps = tensor("batch/x0").double(), tensor("batch/noise").double()
    t = torch.tensor([0, 1, 20, 50, 90, 98])
    x_t = diffusion.q_sample(x_0, t, eps)
    assert error(diffusion.xstart_from_eps(x_t, t, eps), x_0) < 1e-10
    assert error(diffusion.eps_from_xstart(x_t, t, x_0), eps) < 1e-10
    q = diffusion.q_mean_variance(x_0, t)
    assert error(q.mean + q.variance.sqrt() * eps, x_t) < 1e-14
    assert error(q.log_variance.exp(), q.variance) < 1e-14


def test_posterior_is_bayes_rule():
    # q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add.
    diffusion = Diffusion(DiffusionConfig(timesteps=100))
    x_0, eps = tensor("batch/x0").double(), tensor("batch/noise").double()
    t = torch.tensor([1, 2, 20, 50, 90, 99])
    x_t = diffusion.q_sample(x_0, t, eps)
    beta = diffusion.betas[t].view(-1, 1, 1, 1)
    previous = diffusion.q_mean_variance(x_0, t - 1)
    variance = 1 / ((1 - beta) / beta + 1 / previous.variance)
    mean = variance * ((1 - beta).sqrt() / beta * x_t + previous.mean / previous.variance)
    posterior = diffusion.q_posterior_mean_variance(x_0, x_t, t)
    assert error(posterior.mean, mean) < 1e-10
    assert error(posterior.variance, variance) < 1e-10


@pytest.mark.parametrize("mean", MEANS.values())
def test_a_perfect_network_has_no_loss_and_finds_x_start(mean):
    diffusion = Diffusion(DiffusionConfig(timesteps=100, mean=mean, variance="fixed_small", loss="mse"))
    x_0, eps = tensor("batch/x0").double(), tensor("batch/noise").double()
    t = torch.tensor([0, 1, 20, 50, 90, 98])

    def model(x, tt, y=None):
        posterior = diffusion.q_posterior_mean_variance(x_0, x, t).mean
        return {"epsilon": eps, "x_start": x_0, "x_prev": posterior}[mean]

    assert diffusion.training_losses(model, x_0, t, eps).loss.abs().max() < 1e-20
    x_t = diffusion.q_sample(x_0, t, eps)
    assert error(diffusion.p_mean_variance(model, x_t, t).pred_xstart, x_0) < 1e-9
    kl = Diffusion(replace(diffusion.config, loss="kl")).training_losses(model, x_0, t, eps).loss
    assert kl[1:].abs().max() < 1e-9  # the decoder term at t = 0 is not a divergence


class TwoParameters(torch.nn.Module):
    """The golden denoiser with one factor on its mean and another on its variance."""

    def __init__(self):
        super().__init__()
        self.of_mean = torch.nn.Parameter(torch.tensor(1.0))
        self.of_variance = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x, t, y=None):
        mean, v = denoiser(True)(x, t).chunk(2, dim=1)
        return torch.cat([mean * self.of_mean, v * self.of_variance], dim=1)


@pytest.mark.parametrize("loss", ["mse", "rescaled_mse"])
def test_in_the_hybrid_loss_the_bound_trains_the_variance_alone(loss):
    diffusion = Diffusion(DiffusionConfig(timesteps=100, loss=loss))
    model, t = TwoParameters(), torch.tensor([0, 5, 20, 50, 90, 99])
    losses = diffusion.training_losses(model, tensor("batch/x0"), t, tensor("batch/noise"))

    def gradients(part):
        return torch.autograd.grad(
            part.sum(), [model.of_mean, model.of_variance], retain_graph=True, materialize_grads=True
        )

    assert gradients(losses.vb)[0] == 0
    assert gradients(losses.vb)[1] != 0
    assert gradients(losses.mse)[0] != 0
    assert gradients(losses.mse)[1] == 0
    torch.testing.assert_close(losses.loss, losses.mse + losses.vb)


def test_in_the_vlb_loss_the_bound_trains_both():
    diffusion = Diffusion(DiffusionConfig(timesteps=100, loss="rescaled_kl"))
    model, t = TwoParameters(), torch.tensor([0, 5, 20, 50, 90, 99])
    diffusion.training_losses(model, tensor("batch/x0"), t, tensor("batch/noise")).loss.sum().backward()
    assert model.of_mean.grad != 0
    assert model.of_variance.grad != 0


def test_float64_stays_float64():
    seen = []

    def model(x, t, y=None):
        seen.append((x.dtype, t.dtype))
        return denoiser(True)(x, t)

    diffusion = Diffusion(DiffusionConfig(timesteps=100))
    x_0, eps, t = tensor("batch/x0").double(), tensor("batch/noise").double(), torch.arange(0, 60, 10)
    losses = diffusion.training_losses(model, x_0, t, eps)
    p = diffusion.p_mean_variance(model, x_0, t)
    assert seen == [(torch.float64, torch.float32)] * 2
    assert all(part.dtype == torch.float64 for part in (*losses, *p))
    # float64 is used throughout, not just for the result
    single = diffusion.training_losses(model, x_0.float(), t, eps.float()).loss
    assert 0 < error(single, losses.loss) < 1e-5


def test_a_bfloat16_network_leaves_the_arithmetic_in_float32():
    diffusion = Diffusion(DiffusionConfig(timesteps=100))
    t = torch.arange(0, 60, 10)

    def model(x, t, y=None):
        return denoiser(True)(x, t).bfloat16()

    losses = diffusion.training_losses(model, tensor("batch/x0"), t, tensor("batch/noise"))
    assert losses.loss.dtype == torch.float32


def test_what_the_network_is_told():
    told = []

    def model(x, t, y=None):
        told.append((t.tolist(), y))
        return denoiser(True)(x, t)

    x, t, y = torch.zeros(2, 1, 2, 2), torch.tensor([0, 2]), torch.tensor([3, 4])
    for rescale in (True, False):
        config = DiffusionConfig(timesteps=4000, rescale_timesteps=rescale)
        Diffusion(config, keep=[0, 100, 3999]).p_mean_variance(model, x, t, y)
    assert told == [([0.0, 999.75], y), ([0.0, 3999.0], y)]


def test_a_strided_chain_has_the_full_ones_marginals():
    config = DiffusionConfig(timesteps=1000)
    keep = respace(1000, "20")
    full, strided = Diffusion(config), Diffusion(config, keep)
    torch.testing.assert_close(strided.alphas_cumprod, full.alphas_cumprod[keep], rtol=1e-9, atol=0)
    assert strided.num_timesteps == 20
    assert strided.timestep_map.tolist() == keep
    everything = Diffusion(config, range(1000))
    torch.testing.assert_close(everything.betas, full.betas, rtol=1e-9, atol=0)


def test_a_chain_of_one_step_is_finite():
    diffusion = Diffusion(DiffusionConfig(timesteps=1000), keep=[500])
    x, t = tensor("batch/x0"), torch.zeros(6, dtype=torch.int64)
    assert all(part.isfinite().all() for part in diffusion.p_mean_variance(denoiser(True), x, t))


@pytest.mark.parametrize("keep", [[], [3, 2], [1, 1], [-1, 4], [0, 100]])
def test_wrong_timesteps_to_keep_are_refused(keep):
    with pytest.raises(ValueError, match=r"keep: got .*from 0 to 99"):
        Diffusion(DiffusionConfig(timesteps=100), keep)


@pytest.mark.parametrize("loss", ["mse", "rescaled_mse", "kl", "rescaled_kl"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_training_never_waits_for_the_device(variance, loss):
    config = DiffusionConfig(timesteps=100, variance=variance, loss=loss)
    diffusion = Diffusion(config)
    sampler = LossSecondMomentSampler(100)
    x_0, eps = tensor("batch/x0"), tensor("batch/noise")
    u = torch.linspace(0, 0.99, 6, dtype=torch.float64)
    with NoHostSync():
        t, weight = sampler.sample(u)
        losses = diffusion.training_losses(denoiser(config.learns_variance), x_0, t, eps)
        (losses.loss * weight).mean()
        sampler.update(t, losses.loss)
        sampler.digest()


def test_the_watch_for_waiting_works():
    x = torch.ones(3)
    for wait in (lambda: x[0].item(), lambda: x[x > 0], lambda: float(x.sum()), lambda: x.nonzero()):
        with NoHostSync(), pytest.raises(AssertionError, match="waits"):
            wait()


def test_training_losses_run_on_the_meta_device():
    diffusion = Diffusion(DiffusionConfig(timesteps=100), device="meta")
    x = torch.empty(4, 3, 8, 8, device="meta")
    t = torch.empty(4, dtype=torch.int64, device="meta")
    losses = diffusion.training_losses(denoiser(True), x, t, x)
    assert losses.loss.shape == (4,)
