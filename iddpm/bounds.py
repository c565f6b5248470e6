"""Bounds on the fields of a configuration: written as annotations, checked in one place.

    @dataclass(frozen=True)
    class Loader:
        workers: Count = 1

        def __post_init__(self) -> None:
            check_bounds(self)

Does not import torch, so that --help is fast.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bound:
    """A condition that a value must fulfil. Comparisons with NaN are false, so that ranges refuse it."""

    holds: Callable[[Any], bool]
    expected: str


Count = Annotated[int, Bound(lambda n: n >= 1, "1 or more")]
Natural = Annotated[int, Bound(lambda n: n >= 0, "0 or more")]
Positive = Annotated[float, Bound(lambda x: 0 < x < math.inf, "a positive number")]
NotNegative = Annotated[float, Bound(lambda x: 0 <= x < math.inf, "0 or more")]
Limit = Annotated[float, Bound(lambda x: x > 0, "a number above 0")]  # inf: no limit
Fraction = Annotated[float, Bound(lambda x: 0 <= x < 1, "a number in [0, 1)")]

NOT_EMPTY = Bound(bool, "one or more")  # of a tuple


def check_bounds(config: Any, prefix: str = "", error: type[ValueError] = ValueError) -> None:
    """Raise `error` unless every field of a dataclass has its annotated type and is within its bounds.

    The message names the field as a flag, what was got and what was expected. `prefix` goes before the field's name,
    as `model.` in --model.channels.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        expected = _unmet(hint, value)
        if expected:
            raise error(f"{as_flag(prefix + name)}: got {value!r}, expected {expected}")


def as_flag(field: str) -> str:
    """Return a field's flag: `model.num_heads` -> `--model.num-heads`."""
    return "--" + field.replace("_", "-")


def _unmet(hint: Any, value: Any) -> str | None:
    """Return what a type hint expects instead of this value, or None if the value is as expected."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, *marks = arguments
        bounds = [mark for mark in marks if isinstance(mark, Bound)]
        broken = (bound.expected for bound in bounds if not bound.holds(value))
        return _unmet(kind, value) or next(broken, None)  # a value of another type may not be comparable
    if origin is Literal:
        return None if value in arguments else "one of " + ", ".join(arguments)
    if origin in (Union, UnionType):
        unmet = [_unmet(kind, value) for kind in arguments]
        return None if None in unmet else unmet[0]
    if origin is tuple:  # of values of one kind
        if not isinstance(value, tuple):
            return "a tuple"
        unmet = [_unmet(arguments[0], item) for item in value]
        return next((f"each {expected}" for expected in unmet if expected), None)
    allowed = (int, float) if hint is float else hint
    return None if isinstance(value, allowed) else f"type {hint.__name__}"
