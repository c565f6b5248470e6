"""Which timesteps to train on: uniformly, or in proportion to how large each one's loss has lately been.

The random numbers come from outside, so that every rank can draw the timesteps of the whole global batch and
take its share.
"""

from typing import Literal

import torch
from torch import Tensor

from iddpm.noise import mix64


class UniformSampler:
    """Every timestep with the same probability, weight 1."""

    needs_losses: Literal[False] = False

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (int64 [n]) and loss weights (float32 [n]) from uniform u (float64 [n] in [0, 1))."""
        return (u * self.num_timesteps).long(), torch.ones_like(u, dtype=torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class LossSecondMomentSampler:
    """Importance sampling of L_vlb: p_t in proportion to the root mean square of t's losses (IDDPM eq. 18).

    Of its last `history` losses, that is; uniform until every timestep has so many. `uniform_prob` of the
    probability stays uniform after that, so that no timestep is forgotten. All of it, the switch included,
    stays on the device.
    """

    needs_losses: Literal[True] = True

    def __init__(
        self,
        num_timesteps: int,
        history: int = 10,
        uniform_prob: float = 0.001,
        device: torch.device | str = "cpu",
    ):
        self.num_timesteps = num_timesteps
        self.uniform_prob = uniform_prob
        # The k-th loss of a timestep is in slot k mod history of its row; counts says how many it ever had.
        self.history = torch.zeros(num_timesteps, history, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def warmed_up(self) -> Tensor:
        """Bool scalar: whether every timestep has a full history."""
        return (self.counts >= self.history.shape[1]).all()

    def weights(self) -> Tensor:
        """float64 [T]: the probabilities once warmed up, before that all ones."""
        w = self.history.square().mean(1).sqrt()
        w = w / w.sum() * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps
        return torch.where(self.warmed_up(), w, torch.ones_like(w))

    def probabilities(self) -> Tensor:
        """float64 [T], summing to 1."""
        w = self.weights()
        return w / w.sum()

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (int64 [n]) and loss weights (float32 [n]) from uniform u (float64 [n] in [0, 1)).

        The weights are 1 / (T p_t), by which the losses average in expectation to their mean over all
        timesteps.
        """
        p = self.probabilities()
        # In integers, whose running sum is the same on every device and every time.
        edges = (p * 2.0**52).long().cumsum(0)
        t = torch.searchsorted(edges, (u * edges[-1]).long(), right=True)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Records losses[i] for timestep t[i] (both [n]), as if one after the other.

        Every rank must record the whole global batch in the same order to stay the same.
        """
        slots = self.history.shape[1]
        by_t, order = t.sort(stable=True)
        starts = torch.searchsorted(by_t, torch.arange(self.num_timesteps + 1, device=t.device))
        added = starts.diff()
        # Among the losses of its timestep in this batch, each is the nth.
        nth = torch.arange(len(t), device=t.device) - starts[by_t]
        slot = by_t * slots + (self.counts[by_t] + nth) % slots
        # Two writes to one slot have no order: a loss that this batch itself overwrites goes to a spare slot.
        slot = torch.where(nth >= added[by_t] - slots, slot, self.history.numel())
        flat = torch.cat([self.history.flatten(), self.history.new_zeros(1)])
        self.history = flat.scatter(0, slot, losses[order].to(flat.dtype))[:-1].view_as(self.history)
        self.counts = self.counts + added

    def digest(self) -> Tensor:
        """int64 scalar: a hash of every bit of the state, to compare ranks by."""
        bits = torch.cat([self.history.flatten().view(torch.int64), self.counts])
        return mix64(bits ^ mix64(torch.arange(len(bits), device=bits.device))).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """float64 history [T, history] and int64 counts [T]: the live tensors, into which a saved state is copied."""
        return {"history": self.history, "counts": self.counts}


TimestepSampler = UniformSampler | LossSecondMomentSampler


def make_sampler(
    name: Literal["uniform", "loss-second-moment"], num_timesteps: int, device: torch.device | str = "cpu"
) -> TimestepSampler:
    """The sampler of that name over timesteps 0 .. num_timesteps - 1."""
    if name == "uniform":
        return UniformSampler(num_timesteps)
    if name == "loss-second-moment":
        return LossSecondMomentSampler(num_timesteps, device=device)
    raise ValueError(f"timestep sampler: got {name!r}, expected uniform or loss-second-moment")
