"""One flat key space under a URL: a local directory, ``s3://bucket/prefix`` or any other fsspec URL.

Every operation either succeeds, if necessary after retries until the store's deadline, or fails with one
`StorageError` that says what to do. Writes are atomic for readers on local disks and S3; on other backends, as far as
fsspec's are.
"""

import contextlib
import hashlib
import io
import logging
import os
import random
import re
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, TypeVar

from pipeline.errors import InputError
from pipeline.masking import carries_credentials, mask
from pipeline.storage.backends import PART, S3, Fsspec, Local, StorageConfig
from pipeline.storage.errors import NO_CREATE, DamagedError, StorageError, advice, describe

log = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULTS = StorageConfig()
BUGS = (TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError)


class Store:
    """Named byte strings under `url`.

    Names are relative, with "/" between parts; names whose last part starts with a dot are reserved for the store
    and never listed. Operations raise FileNotFoundError for a missing name and StorageError for every other failure.
    A Store may be used from several threads and after a fork.
    """

    def __init__(self, url: str | os.PathLike[str], config: StorageConfig = DEFAULTS) -> None:
        self.url = _checked_url(os.fspath(url))
        self.config = config
        scheme, _, path = self.url.rpartition("://")
        self.backend: Local | S3 | Fsspec
        if scheme in ("", "file", "local"):
            self.backend = Local(Path(path).expanduser())
        elif scheme in ("s3", "s3a"):
            self.backend = S3(path, config)
        else:
            self.backend = Fsspec(self.url)

    def __str__(self) -> str:
        return mask(self.url)

    @property
    def local(self) -> Path | None:
        """The directory, if this store is one on this machine; else None."""
        return self.backend.root if isinstance(self.backend, Local) else None

    def child(self, name: str) -> "Store":
        """Return the store of a folder in this one."""
        return Store(_join(self.url, _checked_name(name)), self.config)

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """Read an object. With `sha256` (hex), retries after damage in transit; raises DamagedError if it persists."""
        buffer = io.BytesIO()
        self._fetch(name, buffer, sha256)
        return buffer.getvalue()

    def download(self, name: str, local_path: str | os.PathLike[str], sha256: str | None = None) -> None:
        """Copy an object to a local file with a few MB of memory; `sha256` as in `read`. Not atomic."""
        with Path(local_path).open("wb") as file:
            self._fetch(name, file, sha256)

    def open(self, name: str) -> io.BufferedReader | io.BufferedRandom:
        """Open an object as a seekable file; a remote one is first copied to a local file that `close` removes."""
        if self.local:
            path = self.local / _checked_name(name)
            return self._retry("open", name, lambda: path.open("rb"))
        with contextlib.ExitStack() as stack:  # closes the copy if it fails
            file = stack.enter_context(tempfile.TemporaryFile())
            self._fetch(name, file, None)
            file.seek(0)
            stack.pop_all()
        return file

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write an object; readers see the old or the new one, never a part."""
        key, backend = _checked_name(name), self.backend

        def retry(attempt: Callable[[], T]) -> T:
            return self._retry("write", name, attempt)

        if isinstance(backend, S3) and len(data) > PART:
            retry(lambda: backend.put_in_parts(key, data, retry))
        else:
            retry(lambda: backend.put(key, data))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object if none exists: True if it now holds `data`, False if it holds other bytes.

        Of several writers with different bytes, exactly one gets True. A successful put whose reply was lost is
        recognised by reading back, so racing writers must write different bytes, e.g. with a random token.
        """
        key = _checked_name(name)

        def attempt() -> bool:
            with contextlib.suppress(FileExistsError):
                self.backend.create(key, data)
                return True
            return False

        for _ in range(8):
            if self._retry("create", name, attempt):
                return True
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile: try again
                return self.read(name) == data
        raise StorageError(f"{self._where(name)} keeps appearing and vanishing: another process deletes it")

    def list(self, prefix: str = "") -> list[str]:
        """List all names that start with `prefix`, sorted; never from a cache."""
        names = self._retry("list", prefix, lambda: self.backend.names(prefix))
        return sorted(n for n in names if n.startswith(prefix) and not n.rpartition("/")[2].startswith("."))

    def exists(self, name: str) -> bool:
        key = _checked_name(name)
        try:
            self._retry("find", name, lambda: self.backend.size(key))
        except FileNotFoundError:
            return False
        return True

    def delete(self, name: str) -> None:
        """Delete an object; it need not exist."""
        key = _checked_name(name)
        self._retry("delete", name, lambda: self.backend.delete(key))

    def check(self, write: bool, once: bool = False) -> None:
        """Fail within seconds, with advice, if this store cannot be read (or written, if `write`).

        With `once`, also fail if it does not support `create`, which keeps two attempts at a run apart.
        """
        quick = Store(self.url, replace(self.config, deadline_s=min(self.config.deadline_s, 8.0)))
        if not (write and self.local):  # some servers create a missing bucket on write: list first
            quick._retry("list", "", quick.backend.probe)
        if write:
            name = f".write-check-{secrets.token_hex(8)}"
            try:
                if once and (quick.create(name, b"1"), quick.create(name, b"2")) != (True, False):
                    raise StorageError(f"{self}: this store overwrites what must be created once: {NO_CREATE}")
                quick.write(name, b"")
            except BaseException:
                with contextlib.suppress(Exception):  # report the first failure
                    quick.delete(name)
                raise
            quick.delete(name)

    def _where(self, name: str) -> str:
        return mask(_join(self.url, name))

    def _fetch(self, name: str, file: IO[bytes], sha256: str | None) -> None:
        """Copy an object to a file, which each attempt overwrites."""
        key = _checked_name(name)
        wrong: set[tuple[int, str]] = set()  # size and hash of each body that was not as expected

        def attempt() -> None:
            # Copy the body, hashing it if there is anything to compare it with.
            file.seek(0)
            file.truncate()
            content = self.backend.get(key)
            expected = sha256 or content.md5
            digest = hashlib.new("sha256" if sha256 else "md5", usedforsecurity=False)
            for chunk in content.chunks:
                if expected:
                    digest.update(chunk)
                file.write(chunk)

            # Is it whole, and is it what was written?
            size = file.tell()
            if content.size is not None and size != content.size:
                raise ConnectionError(f"got {size} of {content.size} bytes")
            if expected is None or digest.hexdigest() == expected:
                return

            # Damage in transit hardly repeats itself: two equal bodies are what the store holds.
            body = (size, digest.hexdigest())
            if body not in wrong or size != self.backend.size(key):
                wrong.add(body)
                raise ConnectionError(f"got {size} bytes with a wrong checksum")
            if sha256:  # an MD5 proves nothing: some servers' ETags are something else
                raise DamagedError(
                    f"{self._where(name)} is damaged in the store: its sha256 is {body[1][:16]}…, expected "
                    f"{sha256[:16]}…; restore the object or rewrite it"
                )

        self._retry("read", name, attempt)

    def _retry(self, verb: str, name: str, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it succeeds, fails permanently, or the deadline has passed."""
        start, tries = time.monotonic(), 0
        while True:
            try:
                return attempt()
            except StorageError:
                raise
            except Exception as error:
                # Is it a failure that no retry can fix, an answer, or a bug?
                hint = advice(error)
                if hint is None and isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(f"{self._where(name)} does not exist") from error
                if hint is None and isinstance(error, BUGS):
                    raise

                # Is there time for another attempt? The waits double, to spare a busy server, and are random, so that
                # many ranks do not return at once.
                tries += 1
                wait = min(0.1 * 2 ** min(tries, 8), 10.0) * random.uniform(0.5, 1.0)
                spent = time.monotonic() - start
                if hint is None and spent + wait >= self.config.deadline_s:
                    cause = "check the disk" if self.local else "check that the server is up and its address correct"
                    hint = f"gave up after {tries} tries in {spent:.0f} s; {cause}"
                if hint:
                    failure = StorageError(f"cannot {verb} {self._where(name)}: {describe(error)}; {hint}")
                    failure.errno = getattr(error, "errno", None)
                    raise failure from error
                _log_burst(str(self), mask(f"{verb} {name}: {describe(error)}"), self.config.deadline_s)
                time.sleep(wait)


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


def _checked_url(url: str) -> str:
    """Return a store's URL with single slashes and none at its end. Raises InputError if it is not one."""
    scheme, separator, path = url.rpartition("://")
    path = re.sub("/+", "/", path)
    bucket_missing = scheme in ("s3", "s3a") and path.startswith("/")
    slash_missing = not separator and re.match(r"s3a?:|[a-zA-Z][\w+.-]+:/", path)
    if bucket_missing or slash_missing or (not path and scheme != "memory"):
        raise InputError(f"storage URL: got {mask(url)!r}, expected a directory or a URL such as s3://bucket/prefix")
    if carries_credentials(url):
        raise InputError(
            f"storage URL: {mask(url)} carries credentials, which would be recorded; provide them in the environment"
            " or the backend's own configuration"
        )
    return scheme + separator + (path.rstrip("/") or path)


def _checked_name(name: str) -> str:
    if not name or name.startswith("/") or name.endswith("/") or {"", ".", ".."} & set(name.split("/")):
        raise InputError(f"storage name: got {name!r}, expected a relative name such as 'a/b.tar'")
    return name


_logged: dict[str, float] = {}  # by URL: when a failure was last logged


def _log_burst(url: str, text: str, deadline_s: float) -> None:
    """Log the first of a burst of failures at once, then at most one a minute."""
    now = time.monotonic()
    if now - _logged.get(url, float("-inf")) >= 60.0:
        _logged[url] = now
        log.warning("storage %s: %s; retrying for up to %.0f s", url, text, deadline_s)
