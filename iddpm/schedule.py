"""Noise schedules and timestep selection for shorter chains."""

import math
from itertools import accumulate, pairwise, repeat

import torch
from torch import Tensor

from iddpm.config import Schedule


def make_betas(schedule: Schedule, timesteps: int) -> Tensor:
    """Return the betas of a schedule, float64 [T] on the CPU.

    linear: DDPM's 1e-4 to 0.02 at T = 1000 (section 4), scaled by 1000/T. cosine: IDDPM equation 17 with
    s = 0.008, each beta clipped to 0.999.
    """
    if schedule == "linear":
        first = 1e-4 * 1000 / timesteps
        last = 0.02 * 1000 / timesteps
        step = (last - first) / (timesteps - 1)
        return first + torch.arange(timesteps, dtype=torch.float64) * step
    bar = [math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(timesteps + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(bar)]
    return torch.tensor(betas, dtype=torch.float64)


def respace(timesteps: int, spec: str) -> list[int]:
    """Return the timesteps, out of `timesteps`, that a shorter chain keeps, in increasing order.

    "250" keeps 250 evenly spaced timesteps including the first and last (IDDPM section 4); "10,15,20" splits the
    chain into three equal sections and keeps that many of each; "ddim50" keeps 50 at a fixed integer stride from 0
    (DDIM appendix D.2).

    Raises ValueError for a spec that is malformed or asks for more timesteps than there are.
    """
    by_stride = spec.startswith("ddim")
    fields = [spec.removeprefix("ddim")] if by_stride else spec.split(",")
    if not all(field.strip().isdecimal() and int(field) >= 1 for field in fields):
        raise ValueError(f'timesteps to keep: got {spec!r}, expected a spec like "250", "10,15,20" or "ddim50"')
    counts = [int(field) for field in fields]
    if by_stride:
        for stride in range(1, timesteps + 1):
            kept = list(range(0, timesteps, stride))
            if len(kept) == counts[0]:
                return kept
        raise ValueError(
            f"timesteps to keep: got {spec!r}, but no integer stride selects {counts[0]} of {timesteps} "
            f'timesteps; use "{counts[0]}" to space them evenly'
        )
    kept = []
    start = 0
    size, longer = divmod(timesteps, len(counts))
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(f"timesteps to keep: got {spec!r}, but section {section + 1} has only {length} timesteps")
        spacing = (length - 1) / (count - 1) if count > 1 else 0.0
        # A running sum, not a product: they round halves differently, and published numbers use the sum.
        places = accumulate(repeat(spacing, count - 1), initial=0.0)
        kept += [start + round(place) for place in places]
        start += length
    return kept
