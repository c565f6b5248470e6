"""One flat key space under a URL: a local directory, ``s3://bucket/prefix`` or any other fsspec URL.

Every operation either succeeds, if necessary after retries until the store's deadline, or fails with one
`StorageError` that says what to do. Writes are atomic for readers on local disks and S3; on other backends, as far as
fsspec's are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import random
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, TypeVar

from pipeline.errors import InputError
from pipeline.masking import carries_credentials, mask
from pipeline.storage.backends import _S3, PART, StorageConfig, _Fsspec, _Local
from pipeline.storage.errors import _ADVICE, _NO_CREATE, DamagedError, StorageError, _advice, _code, _describe

log = logging.getLogger(__name__)


T = TypeVar("T")
DEFAULTS = StorageConfig()


class Store:
    """Named byte strings under `url`.

    Names are relative, with "/" between parts; names whose last part starts with a dot are reserved for the store
    and never listed. Operations raise FileNotFoundError for a missing name and StorageError for every other failure.
    A Store may be used from several threads and after a fork.
    """

    def __init__(self, url: str | os.PathLike[str], config: StorageConfig = DEFAULTS) -> None:
        scheme, separator, rest = os.fspath(url).rpartition("://")
        self.url = scheme + separator + (rest.rstrip("/") or rest[:1])
        self.config = config
        self._backend: _Local | _S3 | _Fsspec
        if carries_credentials(self.url):
            raise InputError(
                f"storage URL: {mask(self.url)} carries credentials, which would be recorded; provide them"
                " in the environment or the backend's own configuration"
            )
        if scheme in ("", "file", "local"):
            self._backend = _Local(Path(rest).expanduser())
        elif scheme in ("s3", "s3a"):
            if not rest.split("/")[0]:
                raise InputError(f"storage URL: got {self.url!r}, expected s3://bucket/prefix")
            self._backend = _S3(rest.rstrip("/"), config)
        else:
            self._backend = _Fsspec(self.url)

    def __str__(self) -> str:
        return mask(self.url)

    @property
    def local(self) -> Path | None:
        """The directory, if this store is one on this machine; else None."""
        return self._backend.root if isinstance(self._backend, _Local) else None

    def child(self, name: str) -> Store:
        """Return the store of a folder in this one."""
        return Store(_join(self.url, _checked(name)), self.config)

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """Read an object. With `sha256` (hex), retries after damage in transit; raises DamagedError if it persists."""
        parts: list[bytes] = []
        self._fetch(name, parts.clear, parts.append, sha256)
        return b"".join(parts)

    def download(self, name: str, local_path: str | os.PathLike[str], sha256: str | None = None) -> None:
        """Copy an object to a local file with a few MB of memory; `sha256` as in `read`. Not atomic."""
        with Path(local_path).open("wb") as file:
            self._copy(name, file, sha256)

    def open(self, name: str) -> io.BufferedReader | io.BufferedRandom:
        """Open an object as a seekable file; a remote one is first copied to a local file that `close` removes."""
        if self.local:
            path = self.local / _checked(name)
            return self._retry("open", name, lambda: path.open("rb"))
        file = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._copy(name, file, None)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write an object; readers see the old or the new one, never a part."""
        key, backend = _checked(name), self._backend

        def retry(attempt: Callable[[], T]) -> T:
            return self._retry("write", name, attempt)

        if isinstance(backend, _S3) and len(data) > PART:
            retry(lambda: backend.put_in_parts(key, data, retry))
        else:
            retry(lambda: backend.put(key, data))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object if none exists: True if it now holds `data`, False if it holds other bytes.

        Of several writers with different bytes, exactly one gets True. A successful put whose reply was lost is
        recognised by reading back, so racing writers must write different bytes, e.g. with a random token.
        """
        key = _checked(name)
        for _ in range(8):
            if self._retry("create", name, lambda: self._backend.create(key, data)):
                return True
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile: try again
                return self.read(name) == data
        raise StorageError(f"{self._where(name)} keeps appearing and vanishing: another process deletes it")

    def list(self, prefix: str = "") -> list[str]:
        """List all names that start with `prefix`, sorted; never from a cache."""
        names = self._retry("list", prefix, lambda: self._backend.names(prefix))
        return sorted(n for n in names if n.startswith(prefix) and not n.rpartition("/")[2].startswith("."))

    def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        key = _checked(name)
        return self._retry("size", name, lambda: self._backend.size(key))

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def delete(self, name: str) -> None:
        """Delete an object; it need not exist."""
        key = _checked(name)
        self._retry("delete", name, lambda: self._backend.delete(key))

    def check(self, write: bool, once: bool = False) -> None:
        """Fail within seconds, with advice, if this store cannot be read (or written, if `write`).

        With `once`, also fail if it does not support `create`, which keeps two attempts at a run apart.
        """
        quick = Store(self.url, replace(self.config, deadline_s=min(self.config.deadline_s, 8.0)))
        if not (write and self.local):  # some servers create a missing bucket on write: list first
            quick._retry("list", "", quick._backend.probe)
        if write:
            name = f".write-check-{secrets.token_hex(8)}"
            try:
                if once and (quick.create(name, b"1"), quick.create(name, b"2")) != (True, False):
                    raise StorageError(f"{self}: this store overwrites what must be created once: {_NO_CREATE}")
                quick.write(name, b"")
            except BaseException:
                with contextlib.suppress(Exception):  # report the first failure
                    quick.delete(name)
                raise
            quick.delete(name)

    def _where(self, name: str) -> str:
        return mask(_join(self.url, name))

    def _copy(self, name: str, file: IO[bytes], sha256: str | None) -> None:
        def rewind() -> None:
            file.seek(0)
            file.truncate()

        self._fetch(name, rewind, file.write, sha256)

    def _fetch(
        self, name: str, rewind: Callable[[], None], write: Callable[[bytes], object], sha256: str | None
    ) -> None:
        key = _checked(name)
        wrong: set[tuple[int, str]] = set()

        def attempt() -> None:
            rewind()
            (size, etag), chunks = self._backend.chunks(key)
            got, expected = 0, sha256 or etag
            digest = hashlib.new("sha256" if sha256 else "md5", usedforsecurity=False)
            for chunk in chunks:
                got += len(chunk)
                if expected:
                    digest.update(chunk)
                write(chunk)
            if size is not None and got != size:
                raise ConnectionError(f"got {got} of {size} bytes")
            if expected is None or digest.hexdigest() == expected:
                return
            # Damage in transit hardly repeats itself: two equal bodies are what the store holds.
            seen = (got, digest.hexdigest())
            if seen in wrong and got == self._backend.size(key):
                if sha256 is None:
                    return  # some servers' ETags are not an MD5
                raise DamagedError(
                    f"{self._where(name)} is damaged in the store: its sha256 is {seen[1][:16]}…, expected "
                    f"{sha256[:16]}…; restore the object or rewrite it"
                )
            wrong.add(seen)
            raise ConnectionError(f"got {got} bytes with a wrong checksum")

        self._retry("read", name, attempt)

    def _retry(self, verb: str, name: str, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it succeeds, fails permanently, or the deadline has passed."""
        start, tries = time.monotonic(), 0
        while True:
            try:
                return attempt()
            except StorageError:
                raise
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise self._failure(verb, name, error, _ADVICE["NoSuchBucket"]) from error
                raise FileNotFoundError(f"{self._where(name)} does not exist") from error
            except Exception as error:
                advice = _advice(error)
                if advice is not None:
                    raise self._failure(verb, name, error, advice) from error
                tries += 1
                wait = min(0.1 * 2 ** min(tries, 8), 10.0) * random.uniform(0.5, 1.0)
                spent = time.monotonic() - start
                if spent + wait >= self.config.deadline_s:
                    hint = "check the disk" if self.local else "check that the server is up and its address correct"
                    gave_up = f"gave up after {tries} tries in {spent:.0f} s; {hint}"
                    raise self._failure(verb, name, error, gave_up) from error
                _log_burst(str(self), mask(f"{verb} {name}: {_describe(error)}"), self.config.deadline_s)
                time.sleep(wait)

    def _failure(self, verb: str, name: str, error: Exception, advice: str) -> StorageError:
        failure = StorageError(f"cannot {verb} {self._where(name)}: {_describe(error)}; {advice}")
        failure.errno = getattr(error, "errno", None)
        return failure


def locate(url: str, config: StorageConfig) -> tuple[Store, str]:
    """Split a file's path or URL into its store and its name there."""
    folder, _, name = url.rpartition("/")
    return Store(folder or ("/" if url.startswith("/") else "."), config), name


def write_file(url: str, data: bytes, config: StorageConfig) -> None:
    """Write a file to a path or URL."""
    store, name = locate(url, config)
    store.write(name, data)


def _join(url: str, name: str) -> str:
    return url + ("" if url.endswith("/") else "/") + name


def _checked(name: str) -> str:
    if not name or name.startswith("/") or name.endswith("/") or {"", ".", ".."} & set(name.split("/")):
        raise InputError(f"storage name: got {name!r}, expected a relative name such as 'a/b.tar'")
    return name


_burst: dict[str, tuple[float, int]] = {}


def _log_burst(url: str, text: str, deadline_s: float) -> None:
    """Log a burst of failures: the first at once, then at most one line a minute with their number."""
    now = time.monotonic()
    last, count = _burst.get(url, (float("-inf"), 0))
    if now - last < 60.0:
        _burst[url] = (last, count + 1)
        return
    more = f" ({count} more since the last such line)" if count else ""
    log.warning("storage %s: %s; retrying for up to %.0f s%s", url, text, deadline_s, more)
    _burst[url] = (now, 0)
