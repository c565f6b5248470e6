"""Measure a trained model: `python -m pipeline.evaluate RUN --metrics nll,fid`."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from pipeline.cli import parse_flags
from pipeline.config import LaunchConfig, TrackingConfig, check_metrics
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.evaluation.measure import EvaluationPlan, ImagePlan, measure, track
from pipeline.evaluation.measured import quantile_95
from pipeline.evaluation.nll import Nll, NllPlan
from pipeline.model import load_trained
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store, write_file


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a trained model. Values are printed with what they depend on, and logged to the journal and MLflow.

    nll: bits/dim of validation images, an unbiased estimate from draws + 1 network evaluations per image.
    Image metrics (fid, is, kid, precision, recall): compare generated images with the training images.
    """

    run: tyro.conf.Positional[str]
    """The run: the --out of its training, a folder or URL."""
    metrics: str = "nll"
    """Comma-separated: nll, fid, is, kid, precision, recall."""
    seed: int = 0
    """Seed of the choice of images, of timesteps and noise, and of the generated images."""
    ema_rate: float | None = None
    """Decay rate of the moving average to use; default: the run's first; 0: the weights themselves."""
    step: int | None = None
    """Training step of the checkpoint; default: the newest."""
    data: str | None = None
    """Folder or URL of the shards; default: the run's --data.url."""

    nll: Annotated[NllPlan, tyro.conf.arg(name="")] = field(default_factory=NllPlan)
    against: str | None = None
    """nll: compare with this run (its newest checkpoint, or --against-step) on the same images, timesteps and noise."""
    against_step: int | None = None
    """nll: step of the checkpoint to compare with; without --against, of the same run."""
    out: str | None = None
    """nll: with --exact or --chain, write the terms by timestep to this CSV file."""

    images: Annotated[ImagePlan, tyro.conf.arg(name="")] = field(default_factory=ImagePlan)
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        self.plan  # noqa: B018  # raises if invalid
        if self.out and not self.nll.all_terms:
            raise InputError("--out: needs --exact or --chain")
        if self.compares and self.nll.best:
            raise InputError(
                "--chain best…: is optimised for one model; it cannot be combined with --against or --against-step"
            )

    @property  # not cached: Ray pickles this class by value, as it does all of a program's, and a cache holds a lock
    def plan(self) -> EvaluationPlan:
        """What to measure."""
        metrics = check_metrics(self.metrics, "--metrics")
        return EvaluationPlan(metrics, self.seed, self.nll, self.images)

    @property
    def compares(self) -> bool:
        """Whether there is a second model."""
        return bool(self.against) or self.against_step is not None


def main(config: EvaluateConfig, world: World) -> None:
    run = Store(config.run, config.storage)
    fuse = config.launch.compile
    models = [load_trained(run, world, config.ema_rate, config.step, fuse=fuse)]
    if config.compares:
        other = Store(config.against, config.storage) if config.against else run
        models.append(load_trained(other, world, config.ema_rate, config.against_step, fuse=fuse))
    data = Store(config.data or models[0].config.data.url, config.storage)

    def show_nll(nll: Nll) -> None:
        if config.out:
            write_file(config.out, _terms_csv(nll), config.storage)
        print(nll.summary())
        if config.compares:
            print(_verdict(*nll.difference, n=nll.total.shape[1]))

    values = measure(models, config.plan, data, world, run, show_nll)

    def show_and_track() -> None:
        for value in values:
            print(value)
        of_model = [value for value in values if not value.name.endswith("_difference")]
        track(models[0], of_model, run, config.tracking)

    world.only_on_rank0(show_and_track)


def _verdict(difference: float, standard_error: float | None, n: int) -> str:
    lower = "lower" if difference < 0 else "higher"
    if standard_error is None:
        return f"the first is {lower} for this one image, which says nothing of others"
    clear = abs(difference) > quantile_95(n) * standard_error
    return f"the first is {lower}, {'clearly' if clear else 'but not significantly'} (95 %)"


def _terms_csv(nll: Nll) -> bytes:
    rows = zip(nll.timesteps, nll.vb[0].tolist(), nll.mse[0].tolist(), strict=True)
    lines = ["timestep,vb_bits_per_dim,eps_mse"]
    lines += [f"{timestep},{vb},{mse}" for timestep, vb, mse in rows]
    return "\n".join([*lines, ""]).encode()


if __name__ == "__main__":
    from pipeline.distributed.launch import run_main

    config = parse_flags(EvaluateConfig, sys.argv[1:], EvaluateConfig.__doc__ or "")
    run_main(lambda world: main(config, world), config.launch)
