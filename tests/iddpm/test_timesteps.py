import math

import pytest
import torch
from golden import error, tensor

from iddpm.noise import uniform
from iddpm.timesteps import LossSecondMomentSampler, UniformSampler, make_sampler


class Sequential:
    """The loss-second-moment sampler, updated one loss at a time."""

    def __init__(self, num_timesteps, history, uniform_prob=0.001):
        self.losses: list[list[float]] = [[] for _ in range(num_timesteps)]
        self.history, self.uniform_prob = history, uniform_prob

    def update(self, t, losses):
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.losses[step] = (self.losses[step] + [loss])[-self.history :]

    def warmed_up(self):
        return all(len(row) == self.history for row in self.losses)

    def weights(self):
        if not self.warmed_up():
            return torch.ones(len(self.losses), dtype=torch.float64)
        w = [math.sqrt(sum(loss**2 for loss in row) / self.history) for row in self.losses]
        return torch.tensor(
            [x / sum(w) * (1 - self.uniform_prob) + self.uniform_prob / len(w) for x in w],
            dtype=torch.float64,
        )


def warm_sampler(scale):
    """A sampler whose timestep t has a history of losses scale[t]."""
    sampler = LossSecondMomentSampler(len(scale))
    t = torch.arange(len(scale)).repeat(10)
    sampler.update(t, scale.repeat(10))
    return sampler


def test_updates_agree_with_the_original():
    sampler = LossSecondMomentSampler(20)
    counts = torch.zeros(20)
    for i, (t, losses) in enumerate(zip(tensor("sampler/timesteps"), tensor("sampler/losses"), strict=True)):
        sampler.update(t, losses)
        counts += torch.bincount(t, minlength=20)
        assert error(sampler.weights(), tensor("sampler/weights_after")[i]) < 1e-12
        assert bool(sampler.warmed_up()) == bool(tensor("sampler/warmed_up_after")[i])
    assert sampler.counts.tolist() == counts.tolist()


@pytest.mark.parametrize(("num_timesteps", "history", "batch"), [(20, 10, 8), (5, 3, 64), (3, 10, 200), (7, 1, 4)])
def test_update_is_one_loss_after_the_other(num_timesteps, history, batch):
    sampler, reference = LossSecondMomentSampler(num_timesteps, history), Sequential(num_timesteps, history)
    warm = []
    for i in range(60):
        u = uniform(i, torch.arange(2 * batch))
        # Skewed, so that some batches contain a timestep more often than the history is long.
        t, losses = (u[:batch] ** 1.5 * num_timesteps).long(), u[batch:]
        sampler.update(t, losses)
        reference.update(t, losses)
        assert error(sampler.weights(), reference.weights()) < 1e-12
        assert bool(sampler.warmed_up()) == reference.warmed_up()
        for step, row in enumerate(reference.losses):
            seen = int(sampler.counts[step])
            slots = [k % history for k in range(max(0, seen - history), seen)]
            assert sampler.history[step, slots].tolist() == row
        warm.append(reference.warmed_up())
    assert not warm[0] or batch >= 64
    assert warm[-1]


def test_splitting_a_batch_changes_nothing():
    u = uniform(1, torch.arange(400))
    t, losses = (u[:200] * 4).long(), u[200:].float()
    whole, parts = LossSecondMomentSampler(4), LossSecondMomentSampler(4)
    whole.update(t, losses)
    for first, last in [(0, 1), (1, 120), (120, 120), (120, 200)]:
        parts.update(t[first:last], losses[first:last])
    assert torch.equal(whole.history, parts.history)
    assert torch.equal(whole.digest(), parts.digest())


def test_uniform_sampling_of_each_sampler_and_weight_one():
    n, steps = 100_000, 40
    u = uniform(5, torch.arange(n))
    for sampler in (UniformSampler(steps), LossSecondMomentSampler(steps)):
        t, weight = sampler.sample(u)
        counts = torch.bincount(t, minlength=steps).double()
        assert ((counts - n / steps) ** 2 / (n / steps)).sum() < steps - 1 + 4 * math.sqrt(2 * (steps - 1))
        assert t.dtype == torch.int64
        assert weight.dtype == torch.float32
        assert torch.equal(weight, torch.ones(n))


@pytest.mark.parametrize("steps", [1, 3, 4000, 4096])
def test_the_ends_of_the_unit_interval_are_timesteps(steps):
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for sampler in (
        UniformSampler(steps),
        LossSecondMomentSampler(steps),
        warm_sampler(torch.arange(steps) + 1.0),
    ):
        assert sampler.sample(u)[0].tolist() == [0, steps - 1]


def test_sampled_frequencies_are_the_probabilities():
    scale = torch.tensor([5.0, 0.1, 2.0, 0.0, 1.0, 3.0, 1e-4, 1.0])
    sampler = warm_sampler(scale)
    p = sampler.probabilities()
    expected = 0.999 * scale.double() / scale.double().sum() + 0.001 / 8
    assert error(p, expected) < 1e-6
    n = 400_000
    t, weight = sampler.sample(uniform(5, torch.arange(n)))
    counts = torch.bincount(t, minlength=8).double()
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 7 + 4 * math.sqrt(14)
    assert error(weight, 1 / (8 * p[t]).float()) < 1e-6


def test_the_weighted_loss_is_unbiased_and_less_noisy():
    scale = torch.logspace(0, -4, 50, dtype=torch.float64)
    sampler = warm_sampler(scale)
    n = 100_000
    t, weight = sampler.sample(uniform(2, torch.arange(n)))
    estimates = scale[t] * weight
    assert abs(estimates.mean() - scale.mean()) < 4 * estimates.std() / math.sqrt(n)
    uniformly, _ = UniformSampler(50).sample(uniform(2, torch.arange(n)))
    assert estimates.std() < 0.1 * scale[uniformly].std()


def test_state_restores_the_sampler():
    sampler = warm_sampler(torch.rand(30, generator=torch.Generator().manual_seed(0)))
    other = LossSecondMomentSampler(30)
    assert not torch.equal(other.digest(), sampler.digest())
    for name, own in other.state_dict().items():
        own.copy_(sampler.state_dict()[name])
    for one in (sampler, other):
        one.update(torch.tensor([3, 3, 29]), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(other.digest(), sampler.digest())
    assert torch.equal(other.weights(), sampler.weights())


def test_a_snapshot_of_the_state_is_not_changed_by_updates():
    sampler = LossSecondMomentSampler(4)
    state = sampler.state_dict()
    sampler.update(torch.tensor([1]), torch.tensor([2.0]))
    assert state["history"].sum() == 0
    assert state["counts"].sum() == 0


def test_digest_sees_every_bit_and_its_place():
    def digest(change):
        sampler = warm_sampler(torch.ones(6))
        change(sampler)
        return int(sampler.digest())

    def nudge(sampler):
        sampler.history[2, 3] = math.nextafter(1.0, 2.0)

    def swap(sampler):
        sampler.history[2, 3], sampler.history[2, 4] = 2.0, 3.0

    def swap_back(sampler):
        sampler.history[2, 3], sampler.history[2, 4] = 3.0, 2.0

    def count(sampler):
        sampler.counts[5] += 1

    digests = [digest(change) for change in (lambda s: None, nudge, swap, swap_back, count)]
    assert len(set(digests)) == 5
    assert digest(lambda s: None) == digests[0]


def test_make_sampler():
    uniform_sampler, weighted = make_sampler("uniform", 10), make_sampler("loss-second-moment", 10)
    assert isinstance(uniform_sampler, UniformSampler)
    assert not uniform_sampler.needs_losses
    assert isinstance(weighted, LossSecondMomentSampler)
    assert weighted.needs_losses
    assert weighted.history.shape == (10, 10)
