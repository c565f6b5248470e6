"""Measured values with a passport of everything they depend on; values with different passports are not compared."""

import math
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError

NORMAL_95 = 1.959964  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class Measured:
    """One measured value of a checkpoint, and everything else that it depends on."""

    name: str
    value: float
    step: int
    """The checkpoint's training step; not in the passport, because comparisons are between checkpoints."""
    passport: dict[str, Any]
    standard_error: float | None = None
    """None if the estimator's standard error is unknown."""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval by the normal approximation; nan without a standard error."""
        half = NORMAL_95 * (math.nan if self.standard_error is None else self.standard_error)
        return self.value - half, self.value + half

    def __str__(self) -> str:
        text = f"{self.name:24s} {self.value:.4f}"
        if self.standard_error is not None:
            text += f" +- {self.standard_error:.4f} (95 %: {self.interval[0]:.4f} to {self.interval[1]:.4f})"
        return f"{text}   [{', '.join(f'{name} {value}' for name, value in self.passport.items())}]"


def check_comparable(a: Measured, b: Measured) -> None:
    """Raise InputError, naming the differing fields, unless both values come from the same measurement."""
    differ = [
        f"{name}: {a.passport.get(name)} and {b.passport.get(name)}"
        for name in sorted(a.passport.keys() | b.passport.keys())
        if a.passport.get(name) != b.passport.get(name)
    ]
    if a.name != b.name:
        differ.insert(0, f"{a.name} and {b.name}")
    if differ:
        raise InputError(f"{a.name} and {b.name} are not comparable: they differ in {'; '.join(differ)}")
