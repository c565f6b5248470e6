"""The ordered stream of batches."""

from __future__ import annotations

import functools
import io
import os
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store

if TYPE_CHECKING:
    import torch

from pipeline.data.cache import _REPAIR, Cache, _File, _in_memory, _verify
from pipeline.data.shards import ShardIndex, damage
from pipeline.errors import InputError


def _hashes(values: np.ndarray, *key: int | str) -> np.ndarray:
    """Hash each value under a key to uint64."""
    import torch

    from iddpm.noise import random_bits, stream_key

    return random_bits(stream_key(*key), torch.from_numpy(values.astype(np.int64))).numpy().view(np.uint64)


def permutation(n: int, *key: int | str) -> np.ndarray:
    """Shuffle 0..n-1 (int64 [n]) by the key alone, not by any library's random numbers."""
    return np.argsort(_hashes(np.arange(n), *key), kind="stable")


class _Order:
    """The endless sequence of sample ids: shuffled shards, then shuffled samples within each `window` of shards."""

    def __init__(self, index: ShardIndex, seed: int, window: int) -> None:
        self.index, self.seed, self.window = index, seed, window
        self.plan = functools.lru_cache(maxsize=3)(self._plan)
        self.ids = functools.lru_cache(maxsize=3)(self._ids)

    def _plan(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return each window's shards, and each window's first position in the epoch."""
        shards = permutation(len(self.index.shards), "shards", self.seed, epoch)
        windows = [shards[i : i + self.window] for i in range(0, len(shards), self.window)]
        counts = np.diff(self.index.starts)
        return windows, np.cumsum([0] + [counts[w].sum() for w in windows])

    def _ids(self, epoch: int, number: int) -> np.ndarray:
        starts = self.index.starts
        ids = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in self.plan(epoch)[0][number]])
        return ids[permutation(len(ids), "samples", self.seed, epoch, number)]

    def find(self, position: int) -> tuple[int, int, int]:
        """Return the epoch, the window and the place in the window of a position in the run."""
        epoch, place = divmod(position, self.index.num_samples)
        starts = self.plan(epoch)[1]
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
        windows = self.plan(epoch)[0]
        after = windows[number + 1] if number + 1 < len(windows) else self.plan(epoch + 1)[0][0]
        return [int(s) for w in (windows[number], after) for s in np.roll(w, -int(turn * len(w)))]


def sample_order(index: ShardIndex, seed: int, epoch: int, window: int) -> np.ndarray:
    """Return one epoch's sample ids, int64 [num_samples], in stream order."""
    n = index.num_samples
    return _Order(index, seed, window).slice(epoch * n, (epoch + 1) * n)


def epoch_digests(index: ShardIndex, batch: Batch) -> dict[int, int]:
    """Sum the hashes of a batch's samples, for each epoch in it, modulo 2^64, as a signed 64-bit number.

    Summed over all batches of an epoch and all ranks (int64 sums wrap around), this must equal `expected_digest`.
    """
    epochs, ids = batch.index.numpy() // index.num_samples, batch.ids.numpy()
    return {int(e): _sum(ids[epochs == e], int(e)) for e in np.unique(epochs)}


def expected_digest(index: ShardIndex, epoch: int) -> int:
    """Return the digest of an epoch in which each sample was seen exactly once."""
    return _sum(np.arange(index.num_samples), epoch)


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


def _sum(ids: np.ndarray, epoch: int) -> int:
    return int(_hashes(ids, "digest", epoch).sum(dtype=np.uint64).astype(np.int64))


class Reader:
    """Reads samples by id and checks each against the index; opens shards ahead in its own threads."""

    def __init__(self, store: Store, index: ShardIndex, cache: Cache | None = None, threads: int = 2) -> None:
        self.store, self.index, self.cache = store, index, cache
        self.files: dict[int, Future[_File]] = {}
        self.threads = ThreadPoolExecutor(threads, "shards")

    def open(self, shards: Iterable[int]) -> dict[int, Future[_File]]:
        """Start opening these shards, in this order, and release all others."""
        self.files = {s: self.files.get(s) or self.threads.submit(self._open, s) for s in dict.fromkeys(shards)}
        return self.files

    def read(self, ids: np.ndarray, files: dict[int, Future[_File]] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images, uint8 [n, C, H, W], and labels, int64 [n], of these samples, in this order."""
        import torch

        index, shards = self.index, self.index.shard_of(ids)
        if files is None:
            files = self.open(shards.tolist())
        opened = {s: files[s].result() for s in np.unique(shards).tolist()}
        images = np.empty((len(ids), *index.shape), np.uint8)
        read_into = _read_raw if index.encoding == "raw" else _read_png
        columns = (shards, index.offset[ids], index.size[ids], index.crc32[ids])
        rows = zip(images, *(column.tolist() for column in columns), strict=True)
        for image, shard, offset, size, crc32 in rows:
            if read_into(opened[shard].descriptor, offset, size, image) != crc32:
                raise self._damage(opened[shard], shard)
        return torch.from_numpy(images), torch.from_numpy(index.label[ids])

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.files = {}

    def _open(self, number: int) -> _File:
        shard, store = self.index.shards[number], self.store
        try:
            if store.local is None:
                return self.cache.open(store, shard) if self.cache else _in_memory(store, shard)
            file = _File(os.open(store.local / shard.name, os.O_RDONLY), str(store.local / shard.name))
        except FileNotFoundError:
            raise StorageError(f"shard {store}/{shard.name} is missing: {_REPAIR}") from None
        if not _verify(file, shard):
            raise self._damage(file, number)
        return file

    def _damage(self, file: _File, number: int) -> StorageError:
        content = os.pread(file.descriptor, os.fstat(file.descriptor).st_size, 0)
        what = damage(self.index, number, content)
        if file.evict:
            file.evict.unlink(missing_ok=True)
            return StorageError(f"{file.where} is damaged: {what}; it was removed: run the command again")
        return StorageError(f"shard {file.where} is damaged: {what}; {_REPAIR}")


def _read_raw(descriptor: int, offset: int, size: int, image: np.ndarray) -> int:
    """Read the pixels behind the .npy header straight into the batch; return the CRC of header and pixels."""
    header, pixels = bytearray(size - image.nbytes), image.reshape(-1).data
    os.preadv(descriptor, [header, pixels], offset)
    return zlib.crc32(pixels, zlib.crc32(header))


def _read_png(descriptor: int, offset: int, size: int, image: np.ndarray) -> int:
    from PIL import Image

    data = os.pread(descriptor, size, offset)
    try:
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        image[:] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError):
        return -1  # no CRC
    return zlib.crc32(data)


def samples(
    store: Store, index: ShardIndex, ids: Sequence[int] | np.ndarray, cache: Cache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, uint8 [n, C, H, W], and labels, int64 [n], of the given samples, in the given order.

    For many calls on one remote dataset, use a `Reader` or pass a cache.
    """
    wanted = np.asarray(ids, np.int64).reshape(-1)
    if wanted.size and not 0 <= wanted.min() <= wanted.max() < index.num_samples:
        raise InputError(f"ids: got {wanted.min()}..{wanted.max()}, expected 0..{index.num_samples - 1}")
    reader = Reader(store, index, cache)
    try:
        return reader.read(wanted)
    finally:
        reader.close()


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch."""

    images: torch.Tensor
    """uint8 [n, C, H, W]"""
    labels: torch.Tensor
    """int64 [n]"""
    ids: torch.Tensor
    """int64 [n]: the samples' ids in the dataset."""
    index: torch.Tensor
    """int64 [n]: their positions in the run, counted from its start over all ranks."""


def stream(
    store: Store,
    index: ShardIndex,
    *,
    seed: int,
    position: int,
    batch_size: int,
    lo: int = 0,
    hi: int | None = None,
    window: int = 8,
    workers: int = 2,
    ahead: int = 4,
    cache: Cache | None = None,
) -> Generator[Batch, None, None]:
    """Yield rows lo..hi-1 of every global batch from `position` on, forever.

    `position` counts samples since the run began, and `batch_size` is that of the global batch, so the next position
    is position + batch_size. Batches straddle epochs; nothing is padded, repeated or dropped. `window` shards are
    shuffled together. `workers` threads read and decode up to `ahead` batches in advance, while the shards of the next
    window are fetched. Close the iterator to end the threads.
    """
    import torch

    hi = batch_size if hi is None else hi
    if not index.num_samples:
        raise InputError(f"the {index.split} dataset at {store} is empty")
    for name, got, least in (("position", position, 0), ("batch_size", batch_size, 1), ("window", window, 1),
                             ("workers", workers, 1), ("ahead", ahead, 1)):  # fmt: skip
        if got < least:
            raise InputError(f"data.{name}: got {got}, expected at least {least}")
    if not 0 <= lo <= hi <= batch_size:
        raise InputError(f"data slice: got {lo}..{hi}, expected 0 <= lo <= hi <= batch_size = {batch_size}")
    need = sum(sorted(shard.bytes for shard in index.shards)[-2 * window :])
    if cache and store.local is None and cache.max_bytes < need:
        raise InputError(
            f"data cache: got {cache.max_bytes} bytes, expected at least {need}, two windows of "
            f"{window} shards of {store}: raise --data.cache-gb or lower --data.window"
        )
    order = _Order(index, seed, window)

    def batches(position: int) -> Generator[Batch, None, None]:
        def load(ids: np.ndarray, first: int, files: dict[int, Future[_File]]) -> Batch:
            images, labels = reader.read(ids, files)
            return Batch(images, labels, torch.from_numpy(ids), torch.arange(first, first + len(ids)))

        reader, decoders = Reader(store, index, cache), ThreadPoolExecutor(workers, "decode")
        pending: deque[Future[Batch]] = deque()
        try:
            while True:
                while len(pending) < ahead:
                    ids = order.slice(position + lo, position + hi)
                    # Ranks that share a cache start with different shards: together they fetch more at once.
                    soon = order.shards_from(position + hi, turn=lo / batch_size)
                    files = reader.open([*index.shard_of(ids).tolist(), *soon])
                    pending.append(decoders.submit(load, ids, position + lo, files))
                    position += batch_size
                yield pending.popleft().result()
        finally:
            decoders.shutdown(wait=False, cancel_futures=True)
            reader.close()

    return batches(position)
