"""Storage failures, and what a user can do about each."""

import errno
from collections.abc import Iterator

from pipeline.errors import UserError
from pipeline.masking import mask


class StorageError(UserError, OSError):
    """A storage operation failed permanently; the message tells the user what to do. `errno` is the cause's, if any."""


class DamagedError(StorageError):
    """The store holds something other than what was written."""


NO_CREATE = (
    "two attempts at a run could overwrite each other's checkpoints; use a store with create-if-absent, such as S3 with"
    " If-None-Match, or a disk"
)

_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, --storage.profile, or the machine's role"
_CERTIFICATE = (
    "the server's TLS certificate is not trusted here: name a file with its certificate authority in AWS_CA_BUNDLE"
    " (for stores other than S3, SSL_CERT_FILE), and check the address and this machine's clock"
)
_REFUSED = "the server refuses this request: check the endpoint, the region and the bucket"

# What a retry cannot fix, by S3's error code or HTTP status, the exception's type, or the name of its errno.
_ADVICE = {
    # The server's answers.
    "NoSuchBucket": "create the bucket, or check its name and the endpoint (--storage.endpoint-url)",
    "AccessDenied 403": f"permission denied: request access, or {_CREDENTIALS}",
    "InvalidAccessKeyId": f"the server does not know this access key: {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key is wrong: {_CREDENTIALS}",
    "ExpiredToken InvalidToken": "the credentials have expired: get new ones and run the same command again",
    "RequestTimeTooSkewed": "this machine's clock is wrong: correct it",
    "NotImplemented 501": f"the server does not offer this request: {NO_CREATE}",
    # The client's exceptions.
    "NoCredentialsError": f"no credentials were found: {_CREDENTIALS}",
    "PartialCredentialsError": f"incomplete credentials: {_CREDENTIALS}",
    "ProfileNotFound": "choose a profile defined in ~/.aws/config or ~/.aws/credentials",
    "ParamValidationError": "check the bucket's name",
    "UnauthorizedSSOTokenError SSOTokenLoadError": "log in again: aws sso login",
    "ConfigParseError InvalidConfigError": "fix ~/.aws/config or ~/.aws/credentials",
    # The disk.
    "ENOSPC": "the disk is full: free some space or choose another directory",
    "EDQUOT": "the disk quota is used up: free some space or choose another directory",
    "EROFS": "the file system is read-only: choose another directory",
    "EACCES": "no permission: check the owner and mode of the directory, or choose another",
    "EPERM": "not permitted here: check the directory's owner, and that its file system supports hard links",
    "ENOSYS ENOTSUP": "this file system has no hard links: choose another",
    "ENOTDIR EEXIST": "a part of the path is a file: choose another path",
    "EISDIR": "the path is a directory: choose another name",
    "ENAMETOOLONG": "choose a shorter path",
}
_ADVICE = {name: advice for names, advice in _ADVICE.items() for name in names.split()}

_TRANSIENT = {
    *("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"),
    *("IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
}


def advice(error: Exception) -> str | None:
    """Say what to do about an error that a retry cannot fix; None if a retry may help, or if something is missing."""
    causes = list(_chain(error))
    code, status = _reply(error)
    number = 0 if code else getattr(error, "errno", 0)  # s3fs makes up an errno for each code
    names = [*(type(cause).__name__ for cause in causes), code, errno.errorcode.get(number, "")]
    for name in names:
        if name in _ADVICE:
            return _ADVICE[name]
    if any("CERTIFICATE_VERIFY_FAILED" in str(cause) for cause in causes):
        return _CERTIFICATE
    lasting = status not in (404, 408, 409, 429) and code not in _TRANSIENT
    refused = 400 <= status < 500 and lasting
    return _REFUSED if refused or status in (301, 501) else None


def error_code(error: BaseException) -> str:
    """Return the S3 error code (else the HTTP status) that a server answered; "" if this error comes from none."""
    return _reply(error)[0]


def describe(error: BaseException) -> str:
    """Return an error's code and message on one line, masked."""
    code, text = error_code(error), str(error) or type(error).__name__
    if code not in text:
        text = f"{code}: {text}"
    return mask(" ".join(text.split()))[:300]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _reply(error: BaseException) -> tuple[str, int]:
    """Return the error code and the HTTP status that a server answered, from botocore's or aiohttp's exception."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response["Error"].get("Code")), status
        if isinstance(status := getattr(cause, "status", None), int):
            return str(status), status
    return "", 0
