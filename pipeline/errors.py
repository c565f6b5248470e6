"""Errors for the person who runs a program: printed as one message without a traceback. Any other is a bug."""


class UserError(Exception):
    """What happened, what was expected, and what to do about it."""


class PermanentError(UserError):
    """Starting the same command again would end in the same way, so no launcher retries it."""


class InputError(PermanentError, ValueError):
    """A flag, file or dataset is not as expected; the message names it, what was got and what was expected."""


EXTRAS = {
    **dict.fromkeys(("s3fs", "boto3"), "s3"),
    **dict.fromkeys(("mlflow", "psycopg"), "mlflow"),
    "ray": "ray",
    "mpi4py": "mpi",
    **dict.fromkeys(("torch_fidelity", "torchvision"), "metrics"),
    "matplotlib": "figures",
}
"""Packages that a laptop may lack, and the extra of pyproject.toml that installs each."""


def missing_package(name: str) -> str:
    """Say how to install a package of an extra."""
    return f"{name} is not installed: pip install 'iddpm-pipeline[{EXTRAS[name]}]'"


def message_for_user(error: BaseException) -> str | None:
    """Return what to print of an error instead of a traceback; None if it is a bug."""
    if isinstance(error, UserError | OSError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return missing_package(error.name)
    return None
