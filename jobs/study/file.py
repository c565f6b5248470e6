"""The study file."""

import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from pipeline.cli import fail_usage, file_flags, parse_flags, parse_train
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
    values: tuple[str, ...]
    """The sizes: values of the axis, each with one or more runs."""
    budgets: tuple[float, ...]
    """Training FLOPs (forward and backward, 2 per MAC) at which to measure each size. Append later additions: with
    `separate`, a budget's position in the list determines its seeds."""
    axis: str = "model.channels"
    """Field of the network's configuration that `values` sets."""
    preset: str = "digits"
    """Preset of the runs."""
    seeds: tuple[int, ...] = (1,)
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
        if not self.values or len(set(self.values)) < len(self.values):
            raise InputError(f"values: got {self.values}, expected one or more distinct values")
        if not self.budgets or min(self.budgets) <= 0:
            raise InputError(f"budgets: got {self.budgets}, expected one or more positive FLOPs")
        if len({f"{budget:.3g}" for budget in self.budgets}) < len(self.budgets):  # runs are named after them
            raise InputError(f"budgets: got {self.budgets}, expected budgets that differ in their first three digits")
        if not self.separate and list(self.budgets) != sorted(self.budgets):
            raise InputError(
                f"budgets: got {self.budgets}, expected ascending budgets, which a run passes one after the other"
            )
        if not self.axis.startswith("model."):
            raise InputError(
                f"axis: got {self.axis!r}, expected a field that sets the network's size, such as model.channels"
            )
        for section, flags, own in (
            ("train", self.train, ("lr", "seed", "out", "horizon")),
            ("evaluate", self.evaluate, ("step", "against", "against-step", "out")),
        ):
            if given := {f"--{name}" for name in own} & set(flags):
                raise InputError(f"{section}: got {', '.join(sorted(given))}, which a study sets for each of its runs")
        if "--target-se" in self.evaluate:
            raise InputError(
                "evaluate.target_se: points with different numbers of images are not comparable; give `images` instead"
            )
        if len(self.seeds) not in (1, len(self.values)) or min(self.seeds) < 1:
            raise InputError(f"seeds: got {self.seeds}, expected one number, or one for each value, all 1 or more")

    @property
    def folder(self) -> str:
        """Folder or URL of the study."""
        return self.out or f"runs/{self.name}"

    @cached_property
    def store(self) -> Store:
        """Where the study's points and runs are."""
        return Store(self.folder, self.runs[0].config.storage)

    @cached_property
    def data(self) -> Store:
        """The dataset that the runs train on."""
        config = self.runs[0].config
        return Store(config.data.url, config.storage)

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
        from pipeline.evaluate import EvaluateConfig

        options = parse_flags(EvaluateConfig, [self.name, *self.evaluate], "The study's `evaluate:` section.")
        if any(map(carries_credentials, self.evaluate)):
            fail_usage(InputError("evaluate: a URL there carries credentials, which would be recorded"))
        if options.wanted - {"nll", "fid", "kid"}:
            fail_usage(InputError(f"evaluate.metrics: got {options.metrics!r}, expected comma-separated nll, fid, kid"))
        return replace(options, storage=self.runs[0].config.storage)

    @cached_property
    def runs(self) -> "list[Run]":
        """All runs, smallest first."""
        made = []
        seeds = self.seeds * (len(self.values) if len(self.seeds) == 1 else 1)
        groups = [(b,) for b in self.budgets] if self.separate else [self.budgets]
        for value, count in zip(self.values, seeds, strict=True):
            base = ["--preset", self.preset, *self.train, f"--{self.axis.replace('_', '-')}", *value.split()]
            config, _ = parse_train(base)
            lr = self.lr / math.sqrt(config.model.channels / 128)
            for (number, budgets), seed in product(enumerate(groups), range(count)):
                name = f"{value.replace(' ', 'x')}{f'-{budgets[0]:.3g}' if self.separate else ''}-{seed}"
                own: dict[str, Any] = {"out": f"{self.folder}/{name}", "seed": seed + 1000 * number, "lr": lr}
                shown: dict[str, Any] = {"experiment": self.name, "name": name, "parent": self.parent}
                flags = [*base, *(word for k, v in own.items() for word in (f"--{k}", str(v)))]
                flags += [word for k, v in shown.items() for word in (f"--tracking.{k}", v)]
                own["tracking"] = replace(config.tracking, **shown)
                made.append(Run(name, value, budgets, tuple(flags), replace(config, **own)))
        return made


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    name: str
    value: str
    budgets: tuple[float, ...]
    flags: tuple[str, ...]
    """Flags of pipeline.train, except the horizon."""
    config: TrainConfig

    @cached_property
    def store(self) -> Store:
        """The run's folder or URL."""
        return Store(self.config.out, self.config.storage)

    def at(self, budget: float) -> TrainConfig:
        return replace(self.config, horizon=f"{budget!r}flops")

    def command(self, budget: float) -> list[str]:
        return [sys.executable, "-m", "pipeline.train", *self.flags, "--horizon", f"{budget!r}flops"]

    def point(self, budget: float) -> str:
        """Return the name of its measurement in the study's store."""
        return f"points/{self.name}-{budget:.4g}.json"


def load_study(path: Path) -> Study:
    """Read a study file; on an invalid field, print a message and exit with status 2."""
    sections: dict[str, list[str]] = {"": [], "train": [], "evaluate": []}
    section = ""
    for word in file_flags(str(path)):
        if word.startswith("--"):
            section, _, name = word.removeprefix("--").partition(".")
            if name and section in sections:
                word = f"--{name.removeprefix('launch.')}"
            else:
                section = ""
        sections[section].append(word)
    study = parse_flags(Study, sections[""], f"{Study.__doc__} ({path})")
    try:
        return replace(study, train=tuple(sections["train"]), evaluate=tuple(sections["evaluate"]))
    except UserError as error:
        fail_usage(error)


@dataclass(frozen=True)
class OfStudy:
    """Options of every command."""

    study: tyro.conf.Positional[Path]
    """The study file."""
