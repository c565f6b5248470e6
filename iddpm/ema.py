"""Exponential moving averages of the weights at several rates."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class EMA:
    """One normalised average of `params` (name to tensor) per rate r.

    After t updates it is sum_k r^(t-k) params_k / sum_k r^(t-k), k = 1 .. t: the weighted mean of trained weights. The
    parameters at construction, which are what it holds before the first update, have no part in it. The averages have
    the parameters' dtype, which must be float32 or wider: 1 - r would round to 0 in a narrower one.
    """

    def __init__(self, params: Mapping[str, Tensor], rates: Sequence[float]):
        for rate in rates:
            if not 0 <= rate < 1:
                raise ValueError(f"ema rate: got {rate}, expected a number in [0, 1), like 0.9999")
        self._averages = {rate: {name: p.detach().clone() for name, p in params.items()} for rate in rates}

    @torch.no_grad()
    def update(self, params: Mapping[str, Tensor], step: int) -> None:
        """Add the parameters after training step `step`, counted from 1; their names are those at construction."""
        for rate, average in self._averages.items():
            share = (1 - rate) / (1 - rate**step)
            torch._foreach_lerp_(list(average.values()), [params[name] for name in average], share)

    def weights(self, rate: float) -> dict[str, Tensor]:
        """Return the average at `rate` by name; these are the live tensors, which the next update changes in place."""
        return self._averages[rate]


def without_initial(average: Tensor, initial: Tensor, rate: float, step: int) -> Tensor:
    """Normalise an average that started as the initial weights, of which it contains rate^step after `step` updates."""
    remaining = rate**step
    return ((average.double() - remaining * initial.double()) / (1 - remaining)).to(average.dtype)
