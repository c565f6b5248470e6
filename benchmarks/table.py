"""The table that all benchmarks print: a measurement, its reference, their ratio, and the ratio's goal."""

import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.prepare import prepare_digits


class Row(NamedTuple):
    what: str
    ours: str
    against: str
    """The peer or limit, measured in the same run."""
    ratio: float
    goal: float | None = None
    at_most: bool = False
    """Whether the goal is an upper bound."""

    @property
    def missed(self) -> bool:
        if self.goal is None:
            return False
        return self.ratio > self.goal if self.at_most else self.ratio < self.goal


def show(rows: list[Row]) -> str:
    """Format aligned columns; a ratio that misses its goal is marked at the end of its line."""
    cells = [("", "ours", "against", "ratio", "goal", "")]
    for row in rows:
        goal = "" if row.goal is None else f"{'<=' if row.at_most else '>='} {row.goal:g}"
        cells.append((row.what, row.ours, row.against, f"{row.ratio:.3g}", goal, "  MISSED" if row.missed else ""))
    widths = [max(len(line[i]) for line in cells) for i in range(6)]
    return "\n".join(
        f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e:>{widths[4]}}{f}".rstrip()
        for a, b, c, d, e, f in cells
    )


def show_with_digits(rows: Callable[[Path], list[Row]]) -> None:
    """Measure in a temporary folder that has the digits' shards in digits/, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_digits(f"{folder}/digits")
        print(show(rows(Path(folder))))


def here() -> str:
    """Describe the date, commit and machine."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{date.today()}, {commit}, {processor}, {cores} cores, {threads} threads, torch {torch.__version__}"


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each function in each round, after a warm-up round. They alternate, so that other load on
    the machine affects all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(over: list[float], under: list[float]) -> float:
    """Return the median of the per-round ratios, which is less noisy than the ratio of medians."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
