"""Where a store's bytes are: a local directory, S3, or any other fsspec URL."""

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
from typing import Any, NamedTuple

from iddpm.bounds import Limit, check_bounds
from pipeline.errors import InputError
from pipeline.masking import carries_credentials, mask
from pipeline.storage.errors import StorageError, error_code

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


class Content(NamedTuple):
    """An object opened for reading."""

    size: int | None
    md5: str | None
    """Hex; None if the backend does not give it. Some servers give something else."""
    chunks: Iterator[bytes]


def _chunks(file: Any) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK):
            yield chunk


# The backends below have the same methods. A missing key raises FileNotFoundError, and `create` raises FileExistsError
# if the key is taken; any other exception is the library's own, which `Store` retries or explains.


class Local:
    """A directory. Files appear by rename or link, so no reader sees a partial file."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> Content:
        file = (self.root / key).open("rb")
        return Content(os.fstat(file.fileno()).st_size, None, _chunks(file))

    def put(self, key: str, data: bytes | memoryview) -> None:
        with self._temporary(key, data) as temporary:
            os.replace(temporary, self.root / key)

    def create(self, key: str, data: bytes) -> None:
        with self._temporary(key, data) as temporary:
            os.link(temporary, self.root / key)

    def names(self, prefix: str) -> list[str]:
        parent, _, start = prefix.rpartition("/")
        top = self.root / parent
        names = []
        for folder, subfolders, files in os.walk(top, onerror=unless_missing):
            if Path(folder) == top:  # foreign folders, such as lost+found, may be unreadable
                subfolders[:] = [name for name in subfolders if name.startswith(start) and name != "lost+found"]
            relative = Path(folder).relative_to(self.root)
            names += [(relative / file).as_posix() for file in files]
        return names

    def probe(self) -> None:
        if not (self.root.is_dir() and os.access(self.root, os.R_OK | os.X_OK)):
            raise StorageError(f"{self.root} is not a readable directory: check its path and mode")

    def size(self, key: str) -> int:
        return (self.root / key).stat().st_size

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, key: str, data: bytes | memoryview) -> Iterator[Path]:
        """Yield a file with this content next to where it belongs; whatever the caller did with it, it is removed."""
        folder = (self.root / key).parent
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
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


def _sweep(folder: Path) -> None:
    """Remove the temporary files that dead processes left."""
    for path in folder.glob(f".{'[0-9a-f]' * 16}.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()


class Fsspec:
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

    def get(self, key: str) -> Content:
        file = self.fs.open(f"{self.root}/{key}", "rb")
        return Content(getattr(file, "size", None), None, _chunks(file))

    def put(self, key: str, data: bytes | memoryview, **options: str) -> None:
        path = f"{self.root}/{key}"
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(path, bytes(data), **options)

    def create(self, key: str, data: bytes) -> None:
        self.put(key, data, mode="create")

    def names(self, prefix: str) -> list[str]:
        self.fs.invalidate_cache()
        folder = f"{self.root}/{prefix.rpartition('/')[0]}".rstrip("/")
        paths = self.fs.find(folder)
        if not paths:  # or the folder is unreadable, in which case `ls` raises
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self.fs.ls(folder)
        return [path.removeprefix(self.root).lstrip("/") for path in paths]

    def probe(self) -> None:
        self.names("")

    def size(self, key: str) -> int:
        self.fs.invalidate_cache()
        return int(self.fs.size(f"{self.root}/{key}"))

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{key}")


class S3:
    """A prefix of a bucket, accessed by single requests of s3fs's client, so that a retry repeats only what failed."""

    def __init__(self, path: str, config: StorageConfig) -> None:
        self.bucket, _, self.prefix = path.partition("/")
        self.config = config
        # Seconds of silence before an attempt ends.
        self.patience = min(20.0, max(1.0, config.deadline_s / 6))

    @property
    def fs(self) -> Any:
        """This process's s3fs instance."""
        return s3_filesystem(os.getpid(), self.config.endpoint_url, self.config.profile, self.patience)

    def get(self, key: str) -> Content:
        response = self._call("get_object", key)
        body = response["Body"]

        def chunks() -> Iterator[bytes]:
            try:
                while chunk := self._run(body.read(CHUNK), 2 * self.patience):
                    yield chunk
            finally:
                self.fs.loop.call_soon_threadsafe(body.close)  # the body belongs to the loop's thread

        # The ETag is the object's MD5 if it was uploaded in one part and not encrypted with a customer's key.
        etag = response.get("ETag", "").strip('"')
        encrypted = "SSECustomerAlgorithm" in response or "SSEKMSKeyId" in response
        is_md5 = re.fullmatch("[0-9a-f]{32}", etag) and not encrypted
        return Content(response.get("ContentLength"), etag if is_md5 else None, chunks())

    def put(self, key: str, data: bytes | memoryview, **options: str) -> None:
        self._call("put_object", key, Body=bytes(data), **options)

    def put_in_parts(self, key: str, data: bytes | memoryview, retry: Callable[[Callable[[], Any]], Any]) -> None:
        """Upload in parts, each retried on its own: a large object would rarely get through in one request."""
        # Begin: S3 keeps the parts under an id until they are completed or aborted.
        upload = retry(lambda: self._call("create_multipart_upload", key))["UploadId"]

        def send(start: int) -> dict[str, Any]:
            number, part = start // PART + 1, bytes(data[start : start + PART])
            reply = retry(lambda: self._call("upload_part", key, UploadId=upload, PartNumber=number, Body=part))
            return {"PartNumber": number, "ETag": reply["ETag"]}

        try:
            # Send the parts, four at a time.
            with ThreadPoolExecutor(4) as pool:
                parts = {"Parts": list(pool.map(send, range(0, len(data), PART)))}
            # Complete: only now does the object appear, whole.
            retry(lambda: self._call("complete_multipart_upload", key, UploadId=upload, MultipartUpload=parts))
        except FileNotFoundError:  # completed, but the reply was lost; or someone has removed it
            raise ConnectionError("the upload has vanished") from None
        except BaseException:
            # Abort, so that the parts are not kept and paid for.
            with contextlib.suppress(Exception):  # report why the upload failed
                self._call("abort_multipart_upload", key, UploadId=upload)
            raise

    def create(self, key: str, data: bytes) -> None:
        try:
            self.put(key, data, IfNoneMatch="*")
        except OSError as error:
            if error_code(error) in ("PreconditionFailed", "412"):
                raise FileExistsError(key) from error
            raise

    def names(self, prefix: str) -> list[str]:
        names: list[str] = []
        token: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=self._path(prefix), **token)
            paths = [item["Key"] for item in page.get("Contents", [])]
            names += [path.removeprefix(self._path("")) for path in paths if not path.endswith("/")]
            if not page.get("IsTruncated"):
                return names
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def probe(self) -> None:
        self._call("list_objects_v2", Prefix=self._path(""), MaxKeys=1)

    def size(self, key: str) -> int:
        return int(self._call("head_object", key)["ContentLength"])

    def delete(self, key: str) -> None:
        self._call("delete_object", key)

    def _path(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _call(self, method: str, key: str | None = None, **arguments: Any) -> Any:
        """Send one request; with `key`, about that object."""
        if key is not None:
            arguments["Key"] = self._path(key)
        sent = len(arguments.get("Body", b""))
        self._run(_credentials(self.fs), CREDENTIALS_S)
        request = self.fs._call_s3(method, Bucket=self.bucket, **arguments)
        return self._run(request, 2 * self.patience + sent / 1e6)  # no slower than 1 MB/s

    def _run(self, coroutine: Any, seconds: float) -> Any:
        import asyncio

        bounded = asyncio.wait_for(coroutine, seconds)
        return asyncio.run_coroutine_threadsafe(bounded, self.fs.loop).result()


async def _credentials(fs: Any) -> None:
    """Fetch or renew the credentials if necessary; otherwise a request would do so within its own, short time-out."""
    await fs.set_session()
    if credentials := await fs.session.get_credentials():
        await credentials.get_frozen_credentials()


@functools.lru_cache(maxsize=32)
def s3_filesystem(
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
        profile=profile,
    )
    fs.retries = 1
    return fs
