"""The order in which a run sees the samples, and the digests that prove that each epoch had each sample once."""

import functools
from collections.abc import Sequence

import numpy as np

from pipeline.data.shards import ShardIndex


def hashes(values: np.ndarray, *key: int | str) -> np.ndarray:
    """Hash each value under a key to uint64."""
    import torch

    from iddpm.noise import random_bits, stream_key

    bits = random_bits(stream_key(*key), torch.from_numpy(values.astype(np.int64)))
    return bits.numpy().view(np.uint64)


def permutation(n: int, *key: int | str) -> np.ndarray:
    """Shuffle 0..n-1 (int64 [n]) by the key alone, not by any library's random numbers."""
    return np.argsort(hashes(np.arange(n), *key), kind="stable")


class Order:
    """The endless sequence of sample ids: shuffled shards, then shuffled samples within each `window` of shards."""

    def __init__(self, index: ShardIndex, seed: int, window: int) -> None:
        self.index, self.seed, self.window = index, seed, window
        self.windows = functools.lru_cache(maxsize=3)(self._windows)
        self.ids = functools.lru_cache(maxsize=3)(self._ids)

    def _windows(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return each window's shards, and each window's first position in the epoch."""
        shards = permutation(len(self.index.shards), "shards", self.seed, epoch)
        windows = [shards[i : i + self.window] for i in range(0, len(shards), self.window)]
        counts = np.diff(self.index.starts)
        return windows, np.cumsum([0] + [counts[window].sum() for window in windows])

    def _ids(self, epoch: int, number: int) -> np.ndarray:
        """Return the sample ids of a window, in order."""
        starts = self.index.starts
        window = self.windows(epoch)[0][number]
        ids = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in window])
        return ids[permutation(len(ids), "samples", self.seed, epoch, number)]

    def find(self, position: int) -> tuple[int, int, int]:
        """Return the epoch, the window and the place in the window of a position in the run."""
        epoch, place = divmod(position, self.index.num_samples)
        starts = self.windows(epoch)[1]
        number = int(np.searchsorted(starts, place, side="right")) - 1
        return epoch, number, place - int(starts[number])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Return the sample ids at these positions of the run, int64 [stop - start]."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, number, place = self.find(start)
            parts.append(self.ids(epoch, number)[place : place + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def shards_from(self, position: int, turn: float = 0.0) -> list[int]:
        """Return the shards of the window at `position`, then of the next, each rotated by the fraction `turn`."""
        epoch, number, _ = self.find(position)
        windows = [*self.windows(epoch)[0], self.windows(epoch + 1)[0][0]]
        shards = [np.roll(window, -int(turn * len(window))) for window in windows[number : number + 2]]
        return np.concatenate(shards).tolist()


def epoch_digests(index: ShardIndex, positions: np.ndarray, ids: np.ndarray) -> dict[int, int]:
    """Sum the hashes of the samples at these positions of the run, by epoch, modulo 2^64, as a signed 64-bit number.

    Summed over all batches of an epoch and all ranks (int64 sums wrap around), this must equal `expected_digest`.
    """
    epochs = positions // index.num_samples
    return {epoch: _digest(ids[epochs == epoch], epoch) for epoch in np.unique(epochs).tolist()}


def expected_digest(index: ShardIndex, epoch: int) -> int:
    """Return the digest of an epoch in which each sample was seen exactly once."""
    return _digest(np.arange(index.num_samples), epoch)


def sum_digests(shares: Sequence[dict[int, int]]) -> dict[int, int]:
    """Sum the ranks' digests of each epoch, wrapping around as int64 does."""
    epochs = sorted({epoch for share in shares for epoch in share})
    totals = {epoch: sum(share.get(epoch, 0) for share in shares) for epoch in epochs}
    return {epoch: (total + 2**63) % 2**64 - 2**63 for epoch, total in totals.items()}


def finished_epochs(digests: dict[int, int], index: ShardIndex, position: int) -> list[tuple[int, int]]:
    """Return the epochs that end at or before a position in the run, with their digests.

    Raises AssertionError unless each had each sample exactly once.
    """
    finished = [(epoch, digest) for epoch, digest in digests.items() if (epoch + 1) * index.num_samples <= position]
    for epoch, digest in finished:
        expected = expected_digest(index, epoch)
        assert digest == expected, f"epoch {epoch} missed or repeated samples: got digest {digest}, expected {expected}"
    return finished


def _digest(ids: np.ndarray, epoch: int) -> int:
    return int(hashes(ids, "digest", epoch).sum(dtype=np.uint64).astype(np.int64))
