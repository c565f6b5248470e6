"""Where a store's bytes are: a local directory, S3, or any other fsspec URL."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iddpm.bounds import Limit, check_bounds
from pipeline.errors import InputError
from pipeline.masking import carries_credentials, mask
from pipeline.storage.errors import StorageError, _code

CHUNK = 4 << 20  # bytes read at a time


PART = 16 << 20  # bytes per part of a multipart upload to S3, for objects larger than this


CREDENTIALS_S = 60.0  # time-out for the provider of credentials, possibly a program or a network service


STALE_S = 3600.0  # a temporary file untouched for this long belongs to a process that died


@dataclass(frozen=True)
class StorageConfig:
    """How to reach a store. Credentials come from the usual chain: environment, profile, instance role."""

    endpoint_url: str | None = None
    """Address of an S3-compatible server, e.g. http://127.0.0.1:8333; default: AWS."""
    profile: str | None = None
    """Profile of ~/.aws/credentials to use for s3:// URLs."""
    deadline_s: Limit = 300.0
    """Seconds for which to retry a failing operation."""

    def __post_init__(self) -> None:
        check_bounds(self, "storage.", InputError)
        if self.endpoint_url is not None:
            if not re.match(r"https?://[^/]", self.endpoint_url):
                got = mask(self.endpoint_url)
                raise InputError(f"--storage.endpoint-url: got {got!r}, expected http://host[:port] or https://…")
            if carries_credentials(self.endpoint_url):
                raise InputError(
                    f"--storage.endpoint-url: {mask(self.endpoint_url)} carries credentials; provide them in "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile, never in the address"
                )


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
            raise InputError(f"storage URL: {mask(url)!r}: {mask(str(error))}") from error
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
