"""What tests ask of a dataset and no program does: chosen samples, and a whole epoch's order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch

from pipeline.data.cache import Cache
from pipeline.data.order import Order
from pipeline.data.shards import ShardIndex
from pipeline.data.stream import Reader
from pipeline.storage.store import Store


def samples(
    store: Store, index: ShardIndex, ids: Sequence[int] | np.ndarray, cache: Cache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, uint8 [n, C, H, W], and labels, int64 [n], of the given samples, in the given order."""
    with closing(Reader(store, index, cache)) as reader:
        return reader.read(np.asarray(ids, np.int64))


def sample_order(index: ShardIndex, seed: int, epoch: int, window: int) -> np.ndarray:
    """Return one epoch's sample ids, int64 [num_samples], in stream order."""
    n = index.num_samples
    return Order(index, seed, window).slice(epoch * n, (epoch + 1) * n)
