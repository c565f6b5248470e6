"""Errors for the person who runs a program: printed as one message without a traceback. Any other is a bug."""


class UserError(Exception):
    """What happened, what was expected, and what to do about it."""


class PermanentError(UserError):
    """Starting the same command again would end in the same way, so no launcher retries it."""


class InputError(PermanentError, ValueError):
    """A flag, file or dataset is not as expected; the message names it, what was got and what was expected."""


class MissingPackage(PermanentError):
    """A package of an extra is not installed."""


EXTRAS = {
    **dict.fromkeys(("s3fs", "boto3"), "s3"),
    **dict.fromkeys(("mlflow", "psycopg"), "mlflow"),
    "ray": "ray",
    "mpi4py": "mpi",
    **dict.fromkeys(("torch_fidelity", "torchvision"), "metrics"),
    "matplotlib": "figures",
}
"""Packages that a laptop may lack, and the extra of pyproject.toml that installs each."""


def missing_package(error: BaseException) -> MissingPackage | None:
    """Explain a failed import, or an error that it caused, by the extra to install; None if it is something else."""
    while error.__cause__ is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError) and (package := error.name) in EXTRAS:
        return MissingPackage(f"{package} is not installed: pip install 'iddpm-pipeline[{EXTRAS[package]}]'")
    return None
