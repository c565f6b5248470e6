"""The ordered stream of batches."""

import io
import os
import zlib
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pipeline.data.cache import Cache, ShardFile, in_memory
from pipeline.data.order import Order
from pipeline.data.shards import ShardIndex, damage
from pipeline.errors import InputError
from pipeline.images import planes
from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store

REPAIR = "run the same pipeline.prepare command again to rewrite it (--verify URL lists all damage)"


class Reader:
    """Reads samples by id and checks each against the index; opens shards ahead in its own threads."""

    def __init__(self, store: Store, index: ShardIndex, cache: Cache | None = None, threads: int = 2) -> None:
        self.store, self.index, self.cache = store, index, cache
        self.files: dict[int, Future[ShardFile]] = {}
        self.threads = ThreadPoolExecutor(threads, "shards")

    def open(self, shards: Iterable[int]) -> dict[int, Future[ShardFile]]:
        """Start opening these shards, in this order, and release all others."""
        self.files = {s: self.files.get(s) or self.threads.submit(self._open, s) for s in dict.fromkeys(shards)}
        return self.files

    def read(
        self, ids: np.ndarray, files: dict[int, Future[ShardFile]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images, uint8 [n, C, H, W], and labels, int64 [n], of these samples, in this order."""
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

    def _open(self, number: int) -> ShardFile:
        shard, store = self.index.shards[number], self.store
        try:
            if store.local is None:
                return self.cache.open(store, shard) if self.cache else in_memory(store, shard)
            path = store.local / shard.name
            file = ShardFile(os.open(path, os.O_RDONLY), str(path))
        except FileNotFoundError:
            raise StorageError(f"shard {store}/{shard.name} is missing: {REPAIR}") from None
        if not file.matches(shard):
            raise self._damage(file, number)
        return file

    def _damage(self, file: ShardFile, number: int) -> StorageError:
        content = os.pread(file.descriptor, os.fstat(file.descriptor).st_size, 0)
        what = damage(self.index, number, content)
        if file.evict:
            file.evict.unlink(missing_ok=True)
            return StorageError(f"{file.where} is damaged: {what}; it was removed: run the command again")
        return StorageError(f"shard {file.where} is damaged: {what}; {REPAIR}")


def _read_raw(descriptor: int, offset: int, size: int, image: np.ndarray) -> int:
    """Read the pixels behind the .npy header straight into the batch; return the CRC of header and pixels."""
    header, pixels = bytearray(size - image.nbytes), image.reshape(-1).data
    os.preadv(descriptor, [header, pixels], offset)
    return zlib.crc32(pixels, zlib.crc32(header))


def _read_png(descriptor: int, offset: int, size: int, image: np.ndarray) -> int:
    """Decode an image into the batch; return the CRC of the file."""
    data = os.pread(descriptor, size, offset)
    try:
        image[:] = planes(Image.open(io.BytesIO(data)))
    except (OSError, ValueError, SyntaxError):
        return -1  # no CRC
    return zlib.crc32(data)


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
    window are fetched. Close the iterator to end the threads. Raises InputError if the cache is too small.
    """
    hi = batch_size if hi is None else hi
    assert 0 <= lo <= hi <= batch_size, (lo, hi, batch_size)
    need = sum(sorted(shard.bytes for shard in index.shards)[-2 * window :])
    if cache and store.local is None and cache.max_bytes < need:
        raise InputError(
            f"data cache: got {cache.max_bytes} bytes, expected at least {need}, two windows of "
            f"{window} shards of {store}: raise --data.cache-gb or lower --data.window"
        )
    order, reader = Order(index, seed, window), Reader(store, index, cache)
    decoders = ThreadPoolExecutor(workers, "decode")
    pending: deque[Future[Batch]] = deque()

    def decode(ids: np.ndarray, first: int, files: dict[int, Future[ShardFile]]) -> Batch:
        images, labels = reader.read(ids, files)
        return Batch(images, labels, torch.from_numpy(ids), torch.arange(first, first + len(ids)))

    try:
        while True:
            # Keep the threads busy: decode the next batches, and fetch the shards of this window and the next.
            while len(pending) < ahead:
                ids = order.slice(position + lo, position + hi)
                # Ranks that share a cache start with different shards: together they fetch more at once.
                soon = order.shards_from(position + hi, turn=lo / batch_size)
                files = reader.open([*index.shard_of(ids).tolist(), *soon])
                pending.append(decoders.submit(decode, ids, position + lo, files))
                position += batch_size

            # Hand out the oldest batch: the order does not depend on which thread is done first.
            yield pending.popleft().result()
    finally:
        decoders.shutdown(wait=False, cancel_futures=True)
        reader.close()
