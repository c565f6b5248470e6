"""Exponential moving averages of the weights, at several rates at once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class EMA:
    """One average of `params` (name to tensor) for each rate: average = rate x average + (1 - rate) x params,
    at each update.

    Starts as a copy of `params`, in their dtype: float32 or wider, since 1 - rate is lost in a narrower one.
    """

    def __init__(self, params: Mapping[str, Tensor], rates: Sequence[float]):
        for rate in rates:
            if not 0 <= rate < 1:
                raise ValueError(f"ema rate: got {rate}, expected a number in [0, 1), like 0.9999")
        self._averages = {rate: {name: p.detach().clone() for name, p in params.items()} for rate in rates}

    @torch.no_grad()
    def update(self, params: Mapping[str, Tensor]) -> None:
        """One step towards `params`, which have the names of the start."""
        for rate, average in self._averages.items():
            torch._foreach_lerp_(list(average.values()), [params[name] for name in average], 1 - rate)

    def weights(self, rate: float) -> dict[str, Tensor]:
        """The average at that rate, by name: the tensors themselves, which the next update changes."""
        return self._averages[rate]
