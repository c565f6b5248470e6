"""Shards, their index, and the ordered stream of batches.

A dataset split is a set of WebDataset tars `{split}-{i:05d}.tar` and one `{split}.index.json` next to them. A sample
is two members, the image and `{key}.cls`, the label as text. The image is `{key}.npy` (uint8 [C, H, W]) or
`{key}.png`; the webdataset package decodes both. The index has each sample's location and checksum.

The sequence of samples is a pure function of (seed, dataset, window): position p of the run is always the same sample,
whatever the number of ranks and workers, the state of the cache, or how often the run was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.storage import StorageError, Store

if TYPE_CHECKING:
    import torch

    from pipeline.config import DataConfig

log = logging.getLogger(__name__)
Encoding = Literal["raw", "png"]
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    name: str
    bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Everything about a split that can be known without opening a shard. Samples are numbered in written order."""

    split: str
    source: str
    recipe: str
    """Hash of what the shards were made from and how."""
    encoding: Encoding
    shape: tuple[int, int, int]
    """(C, H, W) of every image."""
    class_names: tuple[str, ...]
    digest: str
    """32 hex digits of a hash of the whole index, and thus of all images and labels."""
    shards: tuple[Shard, ...]
    starts: np.ndarray
    """int64 [shards + 1]: id of each shard's first sample, then the number of samples."""
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    label: np.ndarray
    """int64 [num_samples] each: an image's byte offset in its shard, its number of bytes, their CRC-32, the class."""

    @property
    def num_samples(self) -> int:
        return int(self.starts[-1])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, ids, side="right") - 1


# --- writing ---


def pack_shard(samples: Iterable[tuple[str, np.ndarray, int]], encoding: Encoding) -> tuple[bytes, dict[str, Any]]:
    """Pack (key, image uint8 [C, H, W], label) into a tar; return its bytes and its entry for the index.

    The same samples give the same bytes.
    """
    out, table = io.BytesIO(), {"offset": [], "size": [], "crc32": [], "label": []}  # type: ignore[var-annotated]
    suffix = {"raw": "npy", "png": "png"}[encoding]
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, label in samples:
            data = _encode(image, encoding)
            _add(tar, f"{key}.{suffix}", data)
            table["offset"].append(out.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            table["size"].append(len(data))
            table["crc32"].append(zlib.crc32(data))
            table["label"].append(int(label))
            _add(tar, f"{key}.cls", str(int(label)).encode())
    data = out.getvalue()
    return data, {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **table}


def index_json(
    entries: Sequence[dict[str, Any]],
    *,
    split: str,
    source: str,
    recipe: str,
    encoding: Encoding,
    shape: tuple[int, int, int],
    class_names: Sequence[str],
) -> bytes:
    """Return the content of `{split}.index.json`; `entries` are `pack_shard`'s, each with a "name"."""
    content = {
        "format": FORMAT,
        "split": split,
        "source": source,
        "recipe": recipe,
        "encoding": encoding,
        "shape": list(shape),
        "class_names": list(class_names),
        "shards": list(entries),
    }
    return _canonical({**content, "digest": _digest(content)})


def _encode(image: np.ndarray, encoding: Encoding) -> bytes:
    assert (image.dtype, image.ndim) == (np.uint8, 3), (image.dtype, image.shape)
    out = io.BytesIO()
    if encoding == "raw":
        np.lib.format.write_array(out, np.ascontiguousarray(image), version=(1, 0), allow_pickle=False)
    else:
        from PIL import Image

        pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(out, "png", compress_level=6)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, owner: 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _digest(content: Any) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()[:32]


# --- the index ---


def load_index(store: Store, split: str) -> ShardIndex:
    """Read and check `{split}.index.json`; FileNotFoundError if absent, StorageError if damaged."""
    name = f"{split}.index.json"
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no {split!r} dataset at {store}: {name} is missing; write one with python -m pipeline.prepare"
        ) from None
    return parse_index(data, f"{name} at {store}")


def parse_index(data: bytes, where: str) -> ShardIndex:
    try:
        content = json.loads(data)
        digest = content.pop("digest")
        if content["format"] != FORMAT:
            raise StorageError(f"{where} has format {content['format']}, expected {FORMAT}: prepare it again")
        if _digest(content) != digest:
            raise ValueError("its digest does not match")
        entries = content["shards"]
        columns = {
            name: np.concatenate([np.asarray(entry[name], np.int64) for entry in entries] or [np.empty(0, np.int64)])
            for name in ("offset", "size", "crc32", "label")
        }
        counts = [len(entry["label"]) for entry in entries]
        return ShardIndex(
            split=content["split"],
            source=content["source"],
            recipe=content["recipe"],
            encoding=content["encoding"],
            shape=tuple(content["shape"]),
            class_names=tuple(content["class_names"]),
            digest=digest,
            shards=tuple(
                Shard(entry["name"], entry["bytes"], entry["sha256"], count)
                for entry, count in zip(entries, counts, strict=True)
            ),
            starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            **columns,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{where} is damaged ({error}): run the same pipeline.prepare command again") from error


# --- order ---


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


def _sum(ids: np.ndarray, epoch: int) -> int:
    return int(_hashes(ids, "digest", epoch).sum(dtype=np.uint64).astype(np.int64))


# --- opening shards ---

_REPAIR = "run the same pipeline.prepare command again to rewrite it (--verify URL lists all damage)"


class _File:
    """A shard opened for reading; closed with its last reference, and readable even after eviction."""

    def __init__(self, descriptor: int, where: str, evict: Path | None = None) -> None:
        self.descriptor, self.where, self.evict = descriptor, where, evict

    def __del__(self) -> None:
        os.close(self.descriptor)


_verified: set[tuple[Any, ...]] = set()


def _verify(file: _File, shard: Shard) -> bool:
    """Whether the file has the shard's size and sha256; each process hashes each file once."""
    status = os.fstat(file.descriptor)
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, shard.sha256)
    if status.st_size != shard.bytes:
        return False
    if key not in _verified:
        digest, offset = hashlib.sha256(), 0
        while chunk := os.pread(file.descriptor, 1 << 20, offset):
            digest.update(chunk)
            offset += len(chunk)
        if digest.hexdigest() != shard.sha256:
            return False
        _verified.add(key)
    return True


_BYPASS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR),
    *(errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP),  # from flock on file systems without locks
)


class Cache:
    """Shards on a local disk, at most `max_bytes`, shared by all processes of a node.

    Files are named by their sha256 and appear by rename, so a process may die at any point. Each of 256 lock files
    guards the shards whose hash starts with its number, and `evict.lock` their total size; none is ever removed.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int) -> None:
        self.directory, self.max_bytes = Path(directory).expanduser(), max_bytes
        self._unwarned = threading.Lock()  # held after the first warning: several threads open shards

    @classmethod
    def of(cls, config: DataConfig) -> Cache:
        """Return the cache that a configuration describes."""
        return cls(config.cache_dir, int(config.cache_gb * 1e9))

    def open(self, store: Store, shard: Shard) -> _File:
        """Open a shard from the cache, fetching it first if necessary; in memory if this disk cannot hold it."""
        path = self.directory / f"{shard.sha256}.tar"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if file := self._cached(path, shard):
                return file
            with self._lock(shard.sha256[:2]):
                if file := self._cached(path, shard):  # another process fetched it meanwhile
                    return file
                return self._fetch(store, shard, path)
        except OSError as error:
            if error.errno not in _BYPASS:
                raise
            if self._unwarned.acquire(blocking=False):
                log.warning("the shard cache %s is bypassed, shards stay in memory: %s", self.directory, error)
        return _in_memory(store, shard)

    def _cached(self, path: Path, shard: Shard) -> _File | None:
        try:
            file = _File(os.open(path, os.O_RDONLY), f"the cached copy {path} of {shard.name}", evict=path)
        except FileNotFoundError:
            return None
        if not _verify(file, shard):
            log.warning("%s is damaged: fetching it again", file.where)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # eviction is ordered by access time
            os.utime(path, ns=(time_ns(), os.fstat(file.descriptor).st_mtime_ns))
        return file

    def _fetch(self, store: Store, shard: Shard, path: Path) -> _File:
        temporary = path.with_name(f"{shard.sha256}.{shard.bytes}.tmp")
        try:
            with self._lock("evict"):
                self._make_room(shard.bytes)
                temporary.touch()
            store.download(shard.name, temporary, shard.sha256)
            file = self._cached(temporary, shard)  # open before others can evict it
            if file is None:
                raise StorageError(f"{temporary} changed while it was written: check the cache's disk")
            file.evict = path
            with self._lock("evict"):  # whoever sums the sizes must find this file under one of its names
                os.replace(temporary, path)
            file.where = file.where.replace(str(temporary), str(path))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return file

    def _make_room(self, incoming: int) -> None:
        """Remove leftovers of dead processes, then the least recently used shards, until `incoming` bytes fit."""
        total, shards = incoming, []
        for path in self.directory.iterdir():
            if not re.fullmatch(r"[0-9a-f]{64}\.(tar|\d+\.tmp)", path.name):
                continue  # not ours
            if path.suffix == ".tmp":
                with self._lock(path.name[:2], wait=False) as ours:
                    if ours:  # nobody is writing it
                        path.unlink(missing_ok=True)
                    else:
                        total += int(path.name.split(".")[1])
            else:
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    shards.append((status.st_atime_ns, status.st_size, path))
                    total += status.st_size
        for _, size, path in sorted(shards):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        descriptor = os.open(self.directory / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)


def _in_memory(store: Store, shard: Shard) -> _File:
    data = store.read(shard.name, shard.sha256)
    descriptor = os.memfd_create(shard.sha256)
    with open(descriptor, "wb", closefd=False) as out:
        out.write(data)
    return _File(descriptor, f"{shard.name} at {store}")


# --- reading ---


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


def damage(index: ShardIndex, number: int, content: bytes) -> str:
    """Describe what is wrong with a damaged shard, down to the sample."""
    shard, what = index.shards[number], "bytes between its samples differ"
    for i in range(int(index.starts[number]), int(index.starts[number + 1])):
        data = content[index.offset[i] : index.offset[i] + index.size[i]]
        if zlib.crc32(data) != index.crc32[i]:
            fault = "is truncated" if len(data) < index.size[i] else "does not match its checksum"
            what = f"sample {i} (number {i - int(index.starts[number])} of {shard.num_samples} in the shard) {fault}"
            break
    size = len(content)
    return what if size == shard.bytes else f"{what}; the file has {size} bytes, expected {shard.bytes}"


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
        raise ValueError(f"ids: got {wanted.min()}..{wanted.max()}, expected 0..{index.num_samples - 1}")
    reader = Reader(store, index, cache)
    try:
        return reader.read(wanted)
    finally:
        reader.close()


# --- the stream ---


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
        raise ValueError(f"the {index.split} dataset at {store} is empty")
    for name, got, least in (("position", position, 0), ("batch_size", batch_size, 1), ("window", window, 1),
                             ("workers", workers, 1), ("ahead", ahead, 1)):  # fmt: skip
        if got < least:
            raise ValueError(f"data.{name}: got {got}, expected at least {least}")
    if not 0 <= lo <= hi <= batch_size:
        raise ValueError(f"data slice: got {lo}..{hi}, expected 0 <= lo <= hi <= batch_size = {batch_size}")
    need = sum(sorted(shard.bytes for shard in index.shards)[-2 * window :])
    if cache and store.local is None and cache.max_bytes < need:
        raise ValueError(
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
