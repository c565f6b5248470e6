"""Keep credentials out of whatever is printed, recorded or tagged."""

import re

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
