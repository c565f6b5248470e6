"""Open shards: on the local disk, from a cache shared by a node's processes, or in memory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Any

from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store

if TYPE_CHECKING:
    from pipeline.config import DataConfig
from pipeline.data.shards import Shard

log = logging.getLogger(__name__)


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
