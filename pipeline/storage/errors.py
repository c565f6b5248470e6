"""Storage failures, and what a user can do about each."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from pipeline.errors import UserError
from pipeline.masking import mask


class StorageError(UserError, OSError):
    """A storage operation failed permanently; the message tells the user what to do. `errno` is the cause's, if any."""


class DamagedError(StorageError):
    """The store holds something other than what was written."""


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
