"""Measured values with a passport of everything they depend on; values with different passports are not compared."""

from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError

NORMAL_95 = 1.959964  # the normal distribution's 97.5 % quantile
NORMAL_FROM = 30  # images; for fewer, Student's t is noticeably wider


def quantile_95(n: int) -> float:
    """Return how many standard errors of a mean of n >= 2 values its 95 % interval reaches to each side."""
    if n >= NORMAL_FROM:
        return NORMAL_95
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.975))


@dataclass(frozen=True)
class Measured:
    """One measured value of a checkpoint, and everything else that it depends on."""

    name: str
    value: float
    step: int
    """The checkpoint's training step; not in the passport, because comparisons are between checkpoints."""
    passport: dict[str, Any]
    standard_error: float | None = None
    """None if the estimator's standard error is unknown, as it is for a single image."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, for fewer than 30 images by Student's t; None without a standard error."""
        if self.standard_error is None:
            return None
        half = quantile_95(self.passport["n"]) * self.standard_error
        return self.value - half, self.value + half

    def __str__(self) -> str:
        text = f"{self.name:24s} {self.value:.4f}"
        if self.interval:
            low, high = self.interval
            n = self.passport["n"]
            remark = "" if n >= NORMAL_FROM else f", by Student's t for {n} images"
            text += f" +- {self.standard_error:.4f} (95 %: {low:.4f} to {high:.4f}{remark})"
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
