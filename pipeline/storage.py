"""One flat key space under a URL: a local directory, ``s3://bucket/prefix`` or any other fsspec URL.

Every operation either succeeds, if necessary after retries until the store's deadline, or fails with one
`StorageError` that says what to do. Writes are atomic for readers on local disks and S3; on other backends, as far as
fsspec's are.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import random
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK = 4 << 20  # bytes read at a time
PART = 16 << 20  # bytes per part of a multipart upload to S3, for objects larger than this
CREDENTIALS_S = 60.0  # time-out for the provider of credentials, possibly a program or a network service
STALE_S = 3600.0  # a temporary file untouched for this long belongs to a process that died


class StorageError(OSError):
    """A storage operation failed permanently; the message tells the user what to do. `errno` is the cause's, if any."""


class DamagedError(StorageError):
    """The store holds something other than what was written."""


@dataclass(frozen=True)
class StorageConfig:
    """How to reach a store. Credentials come from the usual chain: environment, profile, instance role."""

    endpoint_url: str | None = None
    """Address of an S3-compatible server, e.g. http://127.0.0.1:8333; default: AWS."""
    profile: str | None = None
    """Profile of ~/.aws/credentials to use for s3:// URLs."""
    deadline_s: float = 300.0
    """Seconds for which to retry a failing operation."""

    def __post_init__(self) -> None:
        if not self.deadline_s > 0:
            raise ValueError(f"storage.deadline_s: got {self.deadline_s}, expected seconds above 0")
        if self.endpoint_url is not None:
            if not re.match(r"https?://[^/]", self.endpoint_url):
                got = mask(self.endpoint_url)
                raise ValueError(f"storage.endpoint_url: got {got!r}, expected http://host[:port] or https://…")
            if carries_credentials(self.endpoint_url):
                raise ValueError(
                    f"storage.endpoint_url: {mask(self.endpoint_url)} carries credentials; provide them in "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile, never in the address"
                )


class Store:
    """Named byte strings under `url`.

    Names are relative, with "/" between parts; names whose last part starts with a dot are reserved for the store
    and never listed. Operations raise FileNotFoundError for a missing name and StorageError for every other failure.
    A Store may be used from several threads and after a fork.
    """

    def __init__(self, url: str | os.PathLike[str], config: StorageConfig = StorageConfig()) -> None:
        scheme, separator, rest = os.fspath(url).rpartition("://")
        self.url = scheme + separator + (rest.rstrip("/") or rest[:1])
        self.config = config
        self._backend: _Local | _S3 | _Fsspec
        if carries_credentials(self.url):
            raise ValueError(
                f"storage URL: {mask(self.url)} carries credentials, which would be recorded; provide them"
                " in the environment or the backend's own configuration"
            )
        if scheme in ("", "file", "local"):
            self._backend = _Local(Path(rest).expanduser())
        elif scheme in ("s3", "s3a"):
            if not rest.split("/")[0]:
                raise ValueError(f"storage URL: got {self.url!r}, expected s3://bucket/prefix")
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


def _join(url: str, name: str) -> str:
    return url + ("" if url.endswith("/") else "/") + name


def unless_missing(error: Exception) -> None:
    """Raise unless a folder is missing. For `os.walk`, which otherwise treats an unreadable folder as empty."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _pieces(file: Any) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK):
            yield chunk


class _Local:
    """A directory. Files appear by rename or link, so no reader sees a partial file."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def chunks(self, key: str) -> tuple[tuple[int | None, str | None], Iterator[bytes]]:
        file = (self.root / key).open("rb")
        return (os.fstat(file.fileno()).st_size, None), _pieces(file)

    def put(self, key: str, data: bytes | memoryview) -> None:
        with self._temporary(key, data) as temporary:
            os.replace(temporary, self.root / key)

    def create(self, key: str, data: bytes) -> bool:
        with self._temporary(key, data) as temporary:
            try:
                os.link(temporary, self.root / key)
            except FileExistsError:
                return False
        return True

    def names(self, prefix: str) -> list[str]:
        found, (above, _, start) = [], prefix.rpartition("/")
        for folder, folders, files in os.walk(self.root / above, onerror=unless_missing):
            if Path(folder) == self.root / above:  # foreign folders, such as lost+found, may be unreadable
                folders[:] = [name for name in folders if name.startswith(start) and name != "lost+found"]
            found += [str((Path(folder) / file).relative_to(self.root).as_posix()) for file in files]
        return found

    def probe(self) -> None:
        if not (self.root.is_dir() and os.access(self.root, os.R_OK | os.X_OK)):
            raise StorageError(f"{self.root} is not a readable directory: check its path and mode")

    def size(self, key: str) -> int:
        return (self.root / key).stat().st_size

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, key: str, data: bytes | memoryview) -> Iterator[Path]:
        folder = (self.root / key).parent
        folder.mkdir(parents=True, exist_ok=True)
        with os.scandir(folder) as entries:
            for entry in entries:
                if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", entry.name):  # ours
                    with contextlib.suppress(FileNotFoundError):
                        if time.time() - entry.stat().st_mtime > STALE_S:
                            os.unlink(entry.path)
        temporary = folder / f".{secrets.token_hex(8)}.tmp"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # so that the name also survives a power cut
        finally:
            os.close(descriptor)


class _Fsspec:
    """Any other fsspec backend; atomicity of writes is up to the backend."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            _, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"storage URL: {mask(url)!r}: {mask(str(error))}") from error
        self.url = url

    @property
    def fs(self) -> Any:
        """This process's fsspec instance; instances do not survive a fork."""
        import fsspec

        return fsspec.core.url_to_fs(self.url)[0]

    def chunks(self, key: str) -> tuple[tuple[int | None, str | None], Iterator[bytes]]:
        file = self.fs.open(f"{self.root}/{key}", "rb")
        return (getattr(file, "size", None), None), _pieces(file)

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = f"{self.root}/{key}"
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(path, bytes(data))

    def create(self, key: str, data: bytes) -> bool:
        path = f"{self.root}/{key}"
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            self.fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    def names(self, prefix: str) -> list[str]:
        self.fs.invalidate_cache()
        folder = f"{self.root}/{prefix.rpartition('/')[0]}".rstrip("/")
        found = self.fs.find(folder)
        if not found:  # or the folder is unreadable, in which case `ls` raises
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self.fs.ls(folder)
        return [path.removeprefix(self.root).lstrip("/") for path in found]

    def probe(self) -> None:
        self.names("")

    def size(self, key: str) -> int:
        self.fs.invalidate_cache()
        return int(self.fs.size(f"{self.root}/{key}"))

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{key}")


class _S3:
    """A prefix of a bucket, accessed by single requests of s3fs's client, so that a retry repeats only what failed."""

    def __init__(self, path: str, config: StorageConfig) -> None:
        self.bucket, _, self.prefix = path.partition("/")
        self.config = config
        # Seconds of silence before an attempt ends.
        self.patience = min(20.0, max(1.0, config.deadline_s / 6))

    def chunks(self, key: str) -> tuple[tuple[int | None, str | None], Iterator[bytes]]:
        response = self._call("get_object", Key=self._key(key))
        body, etag = response["Body"], response.get("ETag", "").strip('"')
        # The ETag is the object's MD5 if it was uploaded in one part and not encrypted with a customer's key.
        own_key = "SSECustomerAlgorithm" in response or "SSEKMSKeyId" in response
        md5 = etag if not own_key and re.fullmatch("[0-9a-f]{32}", etag) else None

        def parts() -> Iterator[bytes]:
            try:
                while chunk := self._run(body.read(CHUNK), 2 * self.patience):
                    yield chunk
            finally:
                self._fs().loop.call_soon_threadsafe(body.close)  # the body belongs to the loop's thread

        return (response.get("ContentLength"), md5), parts()

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._call("put_object", Key=self._key(key), Body=bytes(data))

    def put_in_parts(self, key: str, data: bytes | memoryview, retry: Callable[[Callable[[], Any]], Any]) -> None:
        """Upload in parts, each retried on its own: a large object would rarely get through in one request."""
        where = {"Key": self._key(key)}
        where["UploadId"] = retry(lambda: self._call("create_multipart_upload", **where))["UploadId"]

        def send(number: int) -> dict[str, Any]:
            body = bytes(data[(number - 1) * PART : number * PART])
            reply = retry(lambda: self._call("upload_part", PartNumber=number, Body=body, **where))
            return {"PartNumber": number, "ETag": reply["ETag"]}

        try:
            with ThreadPoolExecutor(4) as pool:
                parts = list(pool.map(send, range(1, -(-len(data) // PART) + 1)))
            retry(lambda: self._call("complete_multipart_upload", MultipartUpload={"Parts": parts}, **where))
        except FileNotFoundError:  # completed, but the reply was lost; or someone has removed it
            raise ConnectionError("the upload has vanished") from None
        except BaseException:
            with contextlib.suppress(Exception):  # report why the upload failed
                self._call("abort_multipart_upload", **where)
            raise

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._call("put_object", Key=self._key(key), Body=data, IfNoneMatch="*")
        except FileExistsError:
            return False
        except OSError as error:
            if _code(error) not in ("PreconditionFailed", "412"):
                raise
            return False
        return True

    def names(self, prefix: str) -> list[str]:
        found: list[str] = []
        token: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=self._key(prefix), **token)
            found += [item["Key"] for item in page.get("Contents", [])]
            if not page.get("IsTruncated"):
                return [key[len(self._key("")) :] for key in found if not key.endswith("/")]
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def probe(self) -> None:
        self._call("list_objects_v2", Prefix=self._key(""), MaxKeys=1)

    def size(self, key: str) -> int:
        return int(self._call("head_object", Key=self._key(key))["ContentLength"])

    def delete(self, key: str) -> None:
        self._call("delete_object", Key=self._key(key))

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _fs(self) -> Any:
        return _s3_filesystem(os.getpid(), self.config.endpoint_url, self.config.profile, self.patience)

    def _call(self, method: str, **arguments: Any) -> Any:
        fs, sent = self._fs(), len(arguments.get("Body", b""))
        self._run(_credentials(fs), CREDENTIALS_S)
        request = fs._call_s3(method, Bucket=self.bucket, **arguments)
        return self._run(request, 2 * self.patience + sent / 1e6)  # no slower than 1 MB/s

    def _run(self, coroutine: Any, seconds: float) -> Any:
        import asyncio

        bounded = asyncio.wait_for(coroutine, seconds)
        return asyncio.run_coroutine_threadsafe(bounded, self._fs().loop).result()


async def _credentials(fs: Any) -> None:
    """Fetch or renew the credentials if necessary; otherwise a request would do so within its own, short time-out."""
    await fs.set_session()
    if credentials := await fs.session.get_credentials():
        await credentials.get_frozen_credentials()


@functools.lru_cache(maxsize=32)
def _s3_filesystem(
    pid: int,  # noqa: ARG001 - part of the cache's key
    endpoint_url: str | None,
    profile: str | None,
    patience: float,
) -> Any:
    """One s3fs instance per process (instances do not survive a fork), without retries: ours have the deadline."""
    import s3fs

    custom = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    fs = s3fs.S3FileSystem(
        endpoint_url=endpoint_url,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": min(5.0, patience),
            "read_timeout": patience,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "max_pool_connections": 32,
            **({"s3": {"addressing_style": "path"}} if custom else {}),
        },
        **({"profile": profile} if profile else {}),
    )
    fs.retries = 1
    return fs


# --- what an error means ---

_NO_CREATE = (
    "two attempts at a run could overwrite each other's checkpoints; use a store with create-if-absent, such as S3 with"
    " If-None-Match, or a disk"
)
_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, --storage.profile, or the machine's role"
_ADVICE = {
    "NoSuchBucket": "create the bucket, or check its name and the endpoint (--storage.endpoint-url)",
    "AccessDenied": f"permission denied: request access, or {_CREDENTIALS}",
    "InvalidAccessKeyId": f"the server does not know this access key: {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key is wrong: {_CREDENTIALS}",
    "ExpiredToken": "the credentials have expired: get new ones and run the same command again",
    "RequestTimeTooSkewed": "this machine's clock is wrong: correct it",
    "NoCredentialsError": f"no credentials were found: {_CREDENTIALS}",
    "PartialCredentialsError": f"incomplete credentials: {_CREDENTIALS}",
    "ProfileNotFound": "choose a profile defined in ~/.aws/config or ~/.aws/credentials",
    "ParamValidationError": "check the bucket's name",
    "UnauthorizedSSOTokenError": "log in again: aws sso login",
    "ConfigParseError": "fix ~/.aws/config or ~/.aws/credentials",
    "NotImplemented": _NO_CREATE,
}
_ADVICE |= {
    "403": _ADVICE["AccessDenied"],
    "501": _ADVICE["NotImplemented"],
    "InvalidToken": _ADVICE["ExpiredToken"],
    "SSOTokenLoadError": _ADVICE["UnauthorizedSSOTokenError"],
    "InvalidConfigError": _ADVICE["ConfigParseError"],
}
_ERRNO_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or choose another directory",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another directory",
    errno.EROFS: "the file system is read-only: choose another directory",
    errno.EACCES: "no permission: check the owner and mode of the directory, or choose another",
    errno.EPERM: "not permitted here: check the directory's owner, and that its file system supports hard links",
    **dict.fromkeys((errno.ENOSYS, errno.EOPNOTSUPP), "this file system has no hard links: choose another"),
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EEXIST: "a part of the path is a file: choose another path",
    errno.EISDIR: "the path is a directory: choose another name",
    errno.ENAMETOOLONG: "choose a shorter path",
}
_TRANSIENT = {
    *("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"),
    *("IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _code(error: BaseException) -> str | None:
    """Return the S3 error code behind an exception, if there is one."""
    for cause in _chain(error):
        if isinstance(response := getattr(cause, "response", None), dict) and "Error" in response:
            return str(response["Error"].get("Code"))
    return None


def _advice(error: Exception) -> str | None:
    """Say what to do about an error that a retry cannot fix; None if a retry may help."""
    for cause in _chain(error):
        if type(cause).__name__ in _ADVICE:
            return _ADVICE[type(cause).__name__]
        if isinstance(response := getattr(cause, "response", None), dict) and "Error" in response:
            code, status = _code(cause), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in _ADVICE:
                return _ADVICE[str(code)]
            if status in (301, 501) or (
                400 <= status < 500 and status not in (408, 409, 429) and code not in _TRANSIENT
            ):
                return "the server refuses this request: check the endpoint, the region and the bucket"
            return None
    if isinstance(error, OSError) and error.errno in _ERRNO_ADVICE:
        return _ERRNO_ADVICE[error.errno]
    if isinstance(error, (TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError)):
        raise error  # a bug, not a storage failure
    return None


def _describe(error: BaseException) -> str:
    code = _code(error)
    text = f"{code}: {error}" if code and code not in str(error) else str(error) or type(error).__name__
    return mask(" ".join(text.split()))[:300]


# A password may contain "/", which some servers accept; what looks like a port and a path is not a password.
_USER = re.compile(
    r"""(?<=://)(?:[^/\s"']*:[^/\s"']*|[^/\s"':@]*:(?!\d{1,5}/)[^\s"'@]*)@|(?<=http://)[^/\s"']+@|(?<=https://)[^/\s"']+@"""
)
_KEY = re.compile(r"""(?i)((?:signature|token|credential|secret|password|pwd|[?&]sig)[\w-]*=)[^&\s"']+""")


def mask(text: str) -> str:
    """Hide credentials in a text: user:password@ in addresses (for http also user@, which may be a token), and
    signatures and passwords in queries.
    """
    return _KEY.sub(r"\1***", _USER.sub("***@", text))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, masked, or its type if it has none."""
    return mask((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


def carries_credentials(url: str) -> bool:
    """Whether a URL contains credentials; abfs://container@account and a path containing token=1 do not."""
    return bool(_USER.search(url) or _KEY.search(url[url.find("?") :] if "?" in url else ""))


def _checked(name: str) -> str:
    if not name or name.startswith("/") or name.endswith("/") or {"", ".", ".."} & set(name.split("/")):
        raise ValueError(f"storage name: got {name!r}, expected a relative name such as 'a/b.tar'")
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
