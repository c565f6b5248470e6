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


def test_state_restores_every_rate_exactly():
    ema = EMA(weights(0), [0.9, 0.999])
    ema.update(weights(1))
    other = EMA(weights(2), [0.9, 0.999])
    other.load_state_dict(ema.state_dict())
    for one in (ema, other):
        one.update(weights(3))
    for rate in (0.9, 0.999):
        assert all(torch.equal(ema.weights(rate)[name], other.weights(rate)[name]) for name in ("a", "b"))
    assert not torch.equal(ema.weights(0.9)["a"], ema.weights(0.999)["a"])


def test_wrong_states_and_rates_are_refused():
    ema = EMA(weights(0), [0.9])
    with pytest.raises(ValueError, match=r"ema rates: got \['0.99'\], expected \['0.9'\]"):
        ema.load_state_dict(EMA(weights(0), [0.99]).state_dict())
    with pytest.raises(ValueError, match=r"names or shapes differ from the model's: \['c'\]"):
        ema.load_state_dict({"0.9": {**weights(0), "c": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"differ from the model's: \['b'\]"):
        ema.load_state_dict({"0.9": {**weights(0), "b": torch.zeros(4)}})
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match="ema rate: got"):
            EMA(weights(0), [rate])
