"""The fused normalisation and activation match torch's own operations, forward and backward."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from iddpm.fused import fused_norm_act
from iddpm.unet import norm_act

GROUPS, EPS = 32, 1e-5


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Run the kernels uncompiled; test_unet compiles them."""
    with torch.compiler.set_stance("force_eager"):
        yield


def inputs(channels: int, dtype: torch.dtype, layout: torch.memory_format, mean: float = 0.0) -> list[Tensor]:
    """Random x, weight, bias, scale and shift."""
    torch.manual_seed(0)
    x = (torch.randn(3, channels, 5, 4, dtype=dtype) + mean).to(memory_format=layout)
    weights = [torch.randn(channels, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
    return [x, *weights, *torch.randn(3, 2 * channels, 1, 1, dtype=dtype).chunk(2, dim=1)]


def both(tensors: list[Tensor], scaled: bool) -> list[list[Tensor]]:
    """The output and all gradients, fused and torch's."""
    found = []
    for function in (fused_norm_act, norm_act):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[: 5 if scaled else 3]]
        x, weight, bias, scale, shift = leaves if scaled else (*leaves, None, None)
        out = function(x, GROUPS, weight, bias, EPS, scale, shift)
        torch.manual_seed(1)
        found.append([out, *torch.autograd.grad(out, leaves, torch.randn_like(out))])
    return found


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("channels", [32, 96])
def test_outcome_and_gradients_equal_torch_s(channels: int, scaled: bool, layout: torch.memory_format) -> None:
    fused, expected = both(inputs(channels, torch.float64, layout), scaled)
    for got, want in zip(fused, expected, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    x, weight, bias, scale, shift = (
        tensor.requires_grad_() for tensor in inputs(32, torch.float64, torch.channels_last)
    )
    assert torch.autograd.gradcheck(
        lambda *leaves: fused_norm_act(leaves[0][:1], GROUPS, leaves[1], leaves[2], EPS, leaves[3][:1], leaves[4][:1]),
        (x, weight, bias, scale, shift),
        fast_mode=True,
    )


def test_a_large_mean_costs_no_digits() -> None:
    narrow = inputs(64, torch.float32, torch.channels_last, mean=1e3)
    wide = [tensor.double() for tensor in narrow]
    torch.testing.assert_close(both(narrow, True)[0][0].double(), both(wide, True)[1][0], rtol=1e-3, atol=1e-3)


def test_bf16_is_rounded_once() -> None:
    narrow = inputs(64, torch.bfloat16, torch.channels_last)
    (got, *_), (want, *_) = both(narrow, False)[0], both([tensor.double() for tensor in narrow], False)[1]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-6)
