"""Command lines and YAML files -> configurations. Precedence: preset < YAML file (`--config`) < flags."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
import yaml

from iddpm.bounds import as_flag
from pipeline.config import TrainConfig, flatten
from pipeline.errors import InputError, UserError, message_for_user
from pipeline.presets import PRESETS

T = TypeVar("T")


def parse_train(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """Parse the command line; return its TrainConfig and whether `--dry-run` was given.

    On an invalid flag or value, prints a message and exits with status 2, as argument parsers do.
    """
    parser = argparse.ArgumentParser(_program(), "%(prog)s [--help] [flags]", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--config")
    parser.add_argument("--dry-run", action="store_true")
    options, flags = parser.parse_known_args(argv)
    if options.config:
        try:
            flags = file_flags(options.config) + flags
        except UserError as error:
            fail_usage(error)
    for word in flags:  # tyro knows only the fields
        if not word.startswith("--"):  # a value, such as an --out named config
            continue
        if close := get_close_matches(word.partition("=")[0], ("--preset", "--config", "--dry-run"), 1, 0.85):
            fail_usage(InputError(f"{word}: no such flag; did you mean {close[0]}?"))
    config = parse_flags(TrainConfig, flags, _description(options.preset), PRESETS[options.preset])
    return config, options.dry_run


def parse_flags(kind: type[T], argv: Sequence[str], description: str, default: T | None = None) -> T:
    """Parse `argv` into the dataclass `kind`; on an invalid flag or value, print a message and exit with status 2."""
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    try:
        return tyro.cli(kind, args=list(argv), description=description, prog=_program(), **defaults)
    except InputError as error:  # tyro reports them, but not those of a nested dataclass without a prefix
        fail_usage(error)


def fail_usage(error: Exception) -> NoReturn:
    """Print an error in what the user typed, and exit with status 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def errors_exit() -> Iterator[None]:
    """Print an error for the user and exit with status 1, or with 130 after Ctrl-C; a bug gets its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        message = message_for_user(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None


def flags_of(config: TrainConfig) -> list[str]:
    """Return the flags with which `parse_train` gives exactly this configuration: those that differ from its default's.

    A text that begins with "-" cannot be given as a flag's value, nor can "None" where a field may be empty.
    """
    default = flatten(asdict(PRESETS["digits"]))
    fields = flatten(asdict(config))
    return to_flags({name: value for name, value in fields.items() if value != default[name]})


def file_flags(path: str) -> list[str]:
    """Convert a YAML file to flags, so that one parser validates both."""
    return to_flags(file_fields(path))


def file_fields(path: str) -> dict[str, Any]:
    """Read the fields of a YAML file, by dotted name."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of fields to values, got {type(content).__name__}")
    return flatten(content)


def to_flags(fields: dict[str, Any]) -> list[str]:
    """Convert fields by dotted name to flags."""
    flags = []
    for name, value in fields.items():
        flags += _as_words(name.removeprefix("launch."), value)
    return flags


def _as_words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        section, dot, last = name.rpartition(".")
        return [as_flag(f"{section}{dot}{'' if value else 'no-'}{last}")]
    values = value if isinstance(value, list | tuple) else [value]
    return [as_flag(name), *map(str, values)]


def _program() -> str | None:
    """Return the command that started the program, for its messages."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None


def _description(preset: str) -> str:
    return (
        "Train an Improved DDPM, on one machine or under torchrun, mpirun, srun or Ray.\n\n"
        f"--preset NAME chooses the defaults: {', '.join(PRESETS)} (shown below: {preset}). "
        "--config FILE.yaml overrides them, and flags override both. "
        "--dry-run prints the resolved configuration, its parameters, FLOPs and memory, and starts nothing. "
        "Running the same command again resumes the run. "
        "Exit status: 0 finished, 75 interrupted by a signal and checkpointed (run again), 1 failed, 2 bad usage."
    )
