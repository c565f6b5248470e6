"""Open shards: on the local disk, from a cache shared by a node's processes, or in memory."""

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
from typing import ClassVar

from pipeline.config import DataConfig
from pipeline.data.shards import Shard
from pipeline.storage.store import Store

log = logging.getLogger(__name__)

_BYPASS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR),
    *(errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP),  # from flock on file systems without locks
)


class ShardFile:
    """A shard opened for reading; closed with its last reference, and readable even after eviction."""

    verified: ClassVar[set[tuple[int | str, ...]]] = set()
    """What this process has hashed: each file once."""

    def __init__(self, descriptor: int, where: str, evict: Path | None = None) -> None:
        self.descriptor, self.where, self.evict = descriptor, where, evict

    def __del__(self) -> None:
        os.close(self.descriptor)

    def matches(self, shard: Shard) -> bool:
        """Whether this file has the shard's size and sha256."""
        status = os.fstat(self.descriptor)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, shard.sha256)
        if status.st_size != shard.bytes:
            return False
        if key not in self.verified:
            with open(self.descriptor, "rb", closefd=False) as file:
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256")
            if digest.hexdigest() != shard.sha256:
                return False
            self.verified.add(key)
        return True


class Cache:
    """Shards on a local disk, at most `max_bytes`, shared by all processes of a node.

    Files are named by their sha256 and appear by rename, so a process may die at any point. Each of 256 lock files
    guards the shards whose hash starts with its number, and `evict.lock` their total size; none is ever removed.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int) -> None:
        self.directory, self.max_bytes = Path(directory).expanduser(), max_bytes
        self._unwarned = threading.Lock()  # held after the first warning: several threads open shards

    @classmethod
    def of(cls, config: DataConfig) -> "Cache":
        """Return the cache that a configuration describes."""
        return cls(config.cache_dir, int(config.cache_gb * 1e9))

    def open(self, store: Store, shard: Shard) -> ShardFile:
        """Open a shard from the cache, fetching it first if necessary; in memory if this disk cannot hold it."""
        path = self.directory / f"{shard.sha256}.tar"
        try:
            # Is it there? This needs no lock: files appear whole.
            self.directory.mkdir(parents=True, exist_ok=True)
            if file := self._cached(path, shard):
                return file

            # One process fetches it; the others wait and find it.
            with self._lock(shard.sha256[:2]):
                return self._cached(path, shard) or self._fetch(store, shard, path)
        except OSError as error:
            if error.errno not in _BYPASS:
                raise
            if self._unwarned.acquire(blocking=False):
                log.warning("the shard cache %s is bypassed, shards stay in memory: %s", self.directory, error)
        return in_memory(store, shard)

    def _cached(self, path: Path, shard: Shard) -> ShardFile | None:
        """Open a shard if it is there and intact."""
        try:
            file = _open_cached(path, shard)
        except FileNotFoundError:
            return None
        if not file.matches(shard):
            log.warning("%s is damaged: fetching it again", file.where)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # eviction is ordered by access time
            os.utime(path, ns=(time_ns(), os.fstat(file.descriptor).st_mtime_ns))
        return file

    def _fetch(self, store: Store, shard: Shard, path: Path) -> ShardFile:
        """Copy a shard here, checking its hash on the way, and open it. The caller holds its lock."""
        temporary = path.with_name(f"{shard.sha256}.{shard.bytes}.tmp")
        try:
            # Make room and claim it: the file's name tells other processes how large it will be.
            with self._lock("evict"):
                self._make_room(shard.bytes)
                temporary.touch()
            store.download(shard.name, temporary, shard.sha256)

            # Give it its name, under which others may evict it as soon as the lock is free: open it first.
            with self._lock("evict"):
                os.replace(temporary, path)
                return _open_cached(path, shard)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, incoming: int) -> None:
        """Remove leftovers of dead processes, then the least recently used shards, until `incoming` bytes fit."""
        # What is there, and what has been claimed?
        total, shards = incoming, []
        for path in self.directory.iterdir():
            if not re.fullmatch(r"[0-9a-f]{64}\.(tar|\d+\.tmp)", path.name):
                continue  # not ours
            if path.suffix == ".tmp":
                with self._lock(path.name[:2], wait=False) as abandoned:
                    if abandoned:  # nobody is writing it
                        path.unlink(missing_ok=True)
                    else:
                        total += int(path.name.split(".")[1])
            else:
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    shards.append((status.st_atime_ns, status.st_size, path))
                    total += status.st_size

        # Evict the least recently used.
        for _, size, path in sorted(shards):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        with (self.directory / f"{name}.lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                locked = True
            except BlockingIOError:
                locked = False
            yield locked


def _open_cached(path: Path, shard: Shard) -> ShardFile:
    return ShardFile(os.open(path, os.O_RDONLY), f"the cached copy {path} of {shard.name}", evict=path)


def in_memory(store: Store, shard: Shard) -> ShardFile:
    data = store.read(shard.name, shard.sha256)
    descriptor = os.memfd_create(shard.sha256)
    with open(descriptor, "wb", closefd=False) as out:
        out.write(data)
    return ShardFile(descriptor, f"{shard.name} at {store}")
