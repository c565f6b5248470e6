"""The study file."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from iddpm.bounds import NOT_EMPTY, Count, Positive, as_flag, check_bounds
from pipeline.cli import fail_usage, file_fields, flags_of, parse_flags, parse_train, to_flags
from pipeline.config import TrainConfig
from pipeline.errors import InputError, UserError
from pipeline.masking import carries_credentials
from pipeline.storage.store import Store

if TYPE_CHECKING:  # these import torch and scipy
    from pipeline.evaluate import EvaluateConfig


@dataclass(frozen=True)
class Study:
    """A study file. Its sections `train:` and `evaluate:` hold flags of pipeline.train and pipeline.evaluate, like a
    --config file: what all runs have in common, and how to measure each at its budgets.
    """

    name: str
    """Name of the study and of its MLflow experiment; its runs are in runs/NAME unless `out` is given."""
    values: Annotated[tuple[str, ...], NOT_EMPTY]
    """The sizes: values of the axis, each with one or more runs."""
    budgets: Annotated[tuple[Positive, ...], NOT_EMPTY]
    """Training FLOPs (forward and backward, 2 per MAC) at which to measure each size. Append later additions: with
    `separate`, a budget's position in the list determines its seeds."""
    axis: str = "model.channels"
    """Field of the network's configuration that `values` sets."""
    preset: str = "digits"
    """Preset of the runs."""
    seeds: tuple[Count, ...] = (1,)
    """Number of runs, with different seeds, of each value at each budget: one number for all values, or one for each.
    """
    separate: bool = True
    """Whether each budget has its own runs and seeds, so that its points are independent of other budgets'. Otherwise
    one long run per seed is measured as it passes the budgets, which is about a third cheaper."""
    lr: float = 1e-4
    """Learning rate at 128 channels: a run with C channels uses lr / sqrt(C / 128) (IDDPM section 6)."""
    out: str = ""
    """Folder or URL of the study; default: runs/NAME."""
    train: tuple[str, ...] = ()
    """Flags of pipeline.train, from the file's section."""
    evaluate: tuple[str, ...] = ()
    """Flags of pipeline.evaluate, likewise. Allowed metrics: nll, fid and kid, for which lower is better."""

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)
        if len(set(self.values)) < len(self.values):
            raise InputError(f"values: got {self.values}, expected distinct values")
        if len({f"{budget:.3g}" for budget in self.budgets}) < len(self.budgets):  # runs are named after them
            raise InputError(f"budgets: got {self.budgets}, expected budgets that differ in their first three digits")
        if not self.separate and list(self.budgets) != sorted(self.budgets):
            raise InputError(f"budgets: got {self.budgets}, expected ascending budgets, as a run passes them in turn")
        if not self.axis.startswith("model."):
            raise InputError(f"axis: got {self.axis!r}, expected a field of the network, such as model.channels")
        for section, flags, reserved in (
            ("train", self.train, {"--lr", "--seed", "--out", "--horizon"}),
            ("evaluate", self.evaluate, {"--step", "--against", "--against-step", "--out"}),
        ):
            if given := sorted(reserved.intersection(flags)):
                raise InputError(f"{section}: got {', '.join(given)}, which a study sets for each of its runs")
        if "--target-se" in self.evaluate:
            raise InputError("evaluate.target_se: points with different numbers of images are not comparable")
        if len(self.seeds) not in (1, len(self.values)):
            raise InputError(f"seeds: got {self.seeds}, expected one number, or one for each value")

    @property
    def folder(self) -> str:
        """Folder or URL of the study."""
        return self.out or f"runs/{self.name}"

    @property
    def config(self) -> TrainConfig:
        """The first run's configuration, for what all runs have in common."""
        return self.runs[0].config

    @cached_property
    def store(self) -> Store:
        """Where the study's points and runs are."""
        return Store(self.folder, self.config.storage)

    @cached_property
    def data(self) -> Store:
        """The dataset that the runs train on."""
        return Store(self.config.data.url, self.config.storage)

    @cached_property
    def evaluation_data(self) -> Store:
        """The dataset that the runs are measured on."""
        url = self.evaluation.data
        return Store(url, self.data.config) if url else self.data

    @property
    def parent(self) -> str:
        """The iddpm.uid of the MLflow run that is the parent of the study's runs."""
        return sha256(f"{self.name} {self.out}".encode()).hexdigest()[:32]

    @cached_property
    def evaluation(self) -> "EvaluateConfig":
        """How to measure each point, apart from the run."""
        options = _parse_evaluation(self.evaluate)
        if any(map(carries_credentials, self.evaluate)):
            fail_usage(InputError("evaluate: a URL there carries credentials, which would be recorded"))
        if not {"nll", "fid", "kid"}.issuperset(options.plan.metrics):
            fail_usage(InputError(f"evaluate.metrics: got {options.metrics!r}, expected comma-separated nll, fid, kid"))
        return replace(options, storage=self.config.storage)

    def measures_like(self, flags: Sequence[str]) -> bool:
        """Whether recorded flags of pipeline.evaluate mean the same as the study's, in whatever order and words."""
        if list(flags) == list(self.evaluate):
            return True
        recorded, expected = _parse_evaluation(tuple(flags)), _parse_evaluation(self.evaluate)
        return (
            recorded.plan.metrics == expected.plan.metrics and replace(recorded, metrics=expected.metrics) == expected
        )

    @cached_property
    def runs(self) -> "list[Run]":
        """All runs, smallest first."""
        runs = []
        counts = self.seeds * len(self.values) if len(self.seeds) == 1 else self.seeds
        groups = [(budget,) for budget in self.budgets] if self.separate else [self.budgets]
        for value, count in zip(self.values, counts, strict=True):
            config = self._size(value)
            for (number, budgets), seed in product(enumerate(groups), range(count)):
                budget = f"-{budgets[0]:.3g}" if self.separate else ""
                name = f"{value.replace(' ', 'x')}{budget}-{seed}"
                tracking = replace(config.tracking, experiment=self.name, name=name, parent=self.parent)
                out = f"{self.folder}/{name}"
                run = replace(config, out=out, seed=seed + 1000 * number, tracking=tracking)
                runs.append(Run(name, value, budgets, run))
        return runs

    def _size(self, value: str) -> TrainConfig:
        """Return what all runs of a size have in common."""
        config, _ = parse_train(["--preset", self.preset, *self.train, as_flag(self.axis), *value.split()])
        return replace(config, lr=self.lr / math.sqrt(config.model.channels / 128))


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    name: str
    value: str
    budgets: tuple[float, ...]
    config: TrainConfig
    """Its configuration, apart from the horizon."""

    @cached_property
    def store(self) -> Store:
        """The run's folder or URL."""
        return Store(self.config.out, self.config.storage)

    def at(self, budget: float) -> TrainConfig:
        """Return the configuration with which it trains to a budget."""
        return replace(self.config, horizon=f"{budget!r}flops")

    def command(self, budget: float) -> list[str]:
        """Return the command that trains it to a budget."""
        return [sys.executable, "-m", "pipeline.train", *flags_of(self.at(budget))]

    def point(self, budget: float) -> str:
        """Return the name of its measurement in the study's store."""
        return f"points/{self.name}-{budget:.4g}.json"


@cache
def _parse_evaluation(flags: tuple[str, ...]) -> "EvaluateConfig":
    from pipeline.evaluate import EvaluateConfig

    return parse_flags(EvaluateConfig, ["study", *flags], "The study's `evaluate:` section.")


def load_study(path: Path) -> Study:
    """Read a study file; on an invalid field, print a message and exit with status 2."""
    sections: dict[str, dict[str, Any]] = {"": {}, "train": {}, "evaluate": {}}
    for name, value in file_fields(str(path)).items():
        section, _, field = name.partition(".")
        if field and section in sections:
            sections[section][field] = value
        else:
            sections[""][name] = value
    flags, train, evaluate = (tuple(to_flags(fields)) for fields in sections.values())
    study = parse_flags(Study, flags, f"{Study.__doc__} ({path})")
    try:
        return replace(study, train=train, evaluate=evaluate)
    except UserError as error:
        fail_usage(error)


@dataclass(frozen=True)
class OfStudy:
    """Options of every command."""

    study: tyro.conf.Positional[Path]
    """The study file."""
