import pytest
import torch

from iddpm.ema import EMA, without_initial

RATES = (0.0, 0.5, 0.9, 0.9999)


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(5, generator=generator)}


def closed_form(steps, rate, name):
    """The weighted mean of trained weights, without the initial ones."""
    shares = [rate ** (len(steps) - k) for k in range(1, len(steps) + 1)]
    total = sum(share * params[name].double() for share, params in zip(shares, steps, strict=True))
    return total / sum(shares)


@pytest.mark.parametrize("updates", [1, 2, 19])
def test_every_rate_is_the_closed_form(updates):
    initial, *steps = [weights(seed) for seed in range(updates + 1)]
    ema = EMA(initial, RATES)
    for step, params in enumerate(steps, start=1):
        ema.update(params, step)
    for rate in RATES:
        for name in ("a", "b"):
            expected = closed_form(steps, rate, name)
            torch.testing.assert_close(ema.weights(rate)[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_an_average_from_the_initial_weights_is_normalised():
    initial, *steps = [weights(seed)["a"] for seed in range(20)]
    for rate in RATES:
        average = initial
        for params in steps:
            average = rate * average + (1 - rate) * params
        expected = closed_form([{"a": params} for params in steps], rate, "a").float()
        torch.testing.assert_close(without_initial(average, initial, rate, len(steps)), expected, rtol=1e-3, atol=1e-3)


def test_starts_as_a_copy_and_follows_by_name():
    params = weights(0)
    ema = EMA(params, [0.5])
    before = params["a"].clone()
    params["a"].zero_()
    assert torch.equal(ema.weights(0.5)["a"], before)
    ema.update({"b": params["b"], "a": params["a"]}, 1)
    assert torch.equal(ema.weights(0.5)["a"], params["a"])  # the initial weights have no part


def test_parameters_that_need_gradients():
    params = {name: torch.nn.Parameter(p) for name, p in weights(0).items()}
    ema = EMA(params, [0.9])
    ema.update(params, 1)
    assert not any(p.requires_grad for p in ema.weights(0.9).values())


def test_wrong_rates_are_refused():
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match="ema rate: got"):
            EMA(weights(0), [rate])
