"""Exponential moving averages of the weights at several rates."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class EMA:
    """One average of `params` (name to tensor) per rate, updated by average = rate x average + (1 - rate) x params.

    Each average starts as a copy of `params` in their dtype, which must be float32 or wider: 1 - rate would round to 0
    in a narrower one.
    """

    def __init__(self, params: Mapping[str, Tensor], rates: Sequence[float]):
        for rate in rates:
            if not 0 <= rate < 1:
                raise ValueError(f"ema rate: got {rate}, expected a number in [0, 1), like 0.9999")
        self._averages = {rate: {name: p.detach().clone() for name, p in params.items()} for rate in rates}

    @torch.no_grad()
    def update(self, params: Mapping[str, Tensor]) -> None:
        """Move every average one step towards `params`, which must have the same names as at construction."""
        for rate, average in self._averages.items():
            torch._foreach_lerp_(list(average.values()), [params[name] for name in average], 1 - rate)

    def weights(self, rate: float) -> dict[str, Tensor]:
        """Return the average at `rate` by name; these are the live tensors, which the next update changes in place."""
        return self._averages[rate]
