"""Samplers of training timesteps: uniform, or in proportion to each timestep's recent losses.

The caller supplies the random numbers, so that every rank can draw the timesteps of the global batch and take its
share.
"""

from typing import Literal

import torch
from torch import Tensor

from iddpm.noise import mix64


class UniformSampler:
    """Samples every timestep with the same probability and weight 1."""

    needs_losses: Literal[False] = False

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (int64 [n]) and loss weights (float32 [n]) from uniform u (float64 [n] in [0, 1))."""
        return (u * self.num_timesteps).long(), torch.ones_like(u, dtype=torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class LossSecondMomentSampler:
    """Importance sampling of L_vlb: p_t is proportional to the root mean square of t's losses (IDDPM eq. 18).

    It uses the last `history` losses of each timestep and is uniform until every timestep has that many. After that,
    a fraction `uniform_prob` of the probability stays uniform, so that every timestep is still sampled. All
    computation, including the switch, stays on the device.
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
        # The k-th loss of a timestep is in slot k mod history of its row; counts holds its total number of losses.
        self.history = torch.zeros(num_timesteps, history, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def warmed_up(self) -> Tensor:
        """Whether every timestep has a full history, as a bool scalar."""
        return (self.counts >= self.history.shape[1]).all()

    def weights(self) -> Tensor:
        """Unnormalised weights, float64 [T]: the probabilities once warmed up, all ones before."""
        w = self.history.square().mean(1).sqrt()
        w = w / w.sum() * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps
        return torch.where(self.warmed_up(), w, torch.ones_like(w))

    def probabilities(self) -> Tensor:
        """Probability of each timestep, float64 [T]."""
        w = self.weights()
        return w / w.sum()

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (int64 [n]) and loss weights (float32 [n]) from uniform u (float64 [n] in [0, 1)).

        The weights are 1 / (T p_t), so that the weighted loss is in expectation the mean over all timesteps.
        """
        p = self.probabilities()
        # Integer cumulative sums are deterministic and equal on every device.
        edges = (p * 2.0**52).long().cumsum(0)
        t = torch.searchsorted(edges, (u * edges[-1]).long(), right=True)
        t = t.clamp(max=self.num_timesteps - 1)  # if the losses' squares overflow, no edge is meaningful
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Record losses[i] for timestep t[i] (both [n]), as if one after the other; ignore those that are not finite.

        To stay in sync, every rank must record the whole global batch in the same order.
        """
        slots = self.history.shape[1]
        nowhere = self.num_timesteps  # sorted behind all timesteps
        by_t, order = torch.where(losses.isfinite(), t, nowhere).sort(stable=True)
        starts = torch.searchsorted(by_t, torch.arange(nowhere + 1, device=t.device))
        added = starts.diff()
        # Each loss is the nth of its timestep in this batch.
        nth = torch.arange(len(t), device=t.device) - starts[by_t]
        row = by_t.clamp(max=nowhere - 1)
        slot = row * slots + (self.counts[row] + nth) % slots
        # Writes to the same slot have no defined order: a loss that this batch itself overwrites goes to a spare slot.
        kept = (by_t < nowhere) & (nth >= added[row] - slots)
        slot = torch.where(kept, slot, self.history.numel())
        flat = torch.cat([self.history.flatten(), self.history.new_zeros(1)])
        self.history = flat.scatter(0, slot, losses[order].to(flat.dtype))[:-1].view_as(self.history)
        self.counts = self.counts + added

    def digest(self) -> Tensor:
        """Hash of the complete state as an int64 scalar, for comparing ranks."""
        bits = torch.cat([self.history.flatten().view(torch.int64), self.counts])
        return mix64(bits ^ mix64(torch.arange(len(bits), device=bits.device))).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """float64 history [T, history] and int64 counts [T]: the live tensors, to copy a saved state into."""
        return {"history": self.history, "counts": self.counts}


TimestepSampler = UniformSampler | LossSecondMomentSampler


def make_sampler(
    name: Literal["uniform", "loss-second-moment"], num_timesteps: int, device: torch.device | str = "cpu"
) -> TimestepSampler:
    """Return the named sampler over timesteps 0 .. num_timesteps - 1."""
    if name == "uniform":
        return UniformSampler(num_timesteps)
    return LossSecondMomentSampler(num_timesteps, device=device)
