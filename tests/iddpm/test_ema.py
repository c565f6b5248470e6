import pytest
import torch

from iddpm.ema import EMA


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(5, generator=generator)}


def test_every_rate_is_the_closed_form():
    steps = [weights(seed) for seed in range(20)]
    ema = EMA(steps[0], [0.0, 0.5, 0.9, 0.9999])
    for params in steps[1:]:
        ema.update(params)
    for rate in (0.0, 0.5, 0.9, 0.9999):
        for name in ("a", "b"):
            expected = rate**19 * steps[0][name].double()
            for k, params in enumerate(steps[1:]):
                expected += (1 - rate) * rate ** (18 - k) * params[name].double()
            torch.testing.assert_close(ema.weights(rate)[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_starts_as_a_copy_and_follows_by_name():
    params = weights(0)
    ema = EMA(params, [0.5])
    before = params["a"].clone()
    params["a"].zero_()
    assert torch.equal(ema.weights(0.5)["a"], before)
    ema.update({"b": params["b"], "a": params["a"]})
    torch.testing.assert_close(ema.weights(0.5)["a"], before / 2)


def test_parameters_that_need_gradients():
    params = {name: torch.nn.Parameter(p) for name, p in weights(0).items()}
    ema = EMA(params, [0.9])
    ema.update(params)
    assert not any(p.requires_grad for p in ema.weights(0.9).values())


def test_wrong_rates_are_refused():
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match="ema rate: got"):
            EMA(weights(0), [rate])
