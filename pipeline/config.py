"""A run's configuration: frozen dataclasses, parsed from the command line by tyro.

This module imports neither torch nor any client library, so `--help` answers at once.
Precedence: preset < YAML file (`--config`) < flags.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import tyro

from iddpm.bounds import NOT_EMPTY, Count, Fraction, Natural, NotNegative, Positive, as_flag, check_bounds
from iddpm.config import DiffusionConfig, UNetConfig
from pipeline.errors import InputError
from pipeline.storage.backends import StorageConfig

DEFAULT_URI = "sqlite:///mlflow.db"
"""Where MLflow keeps runs if nothing says otherwise: a file in the working directory."""


@dataclass(frozen=True)
class DataConfig:
    """Which images to train on, and how to stream them."""

    url: str = "data/digits"
    """Folder or URL (s3://bucket/prefix) of the shards that `python -m pipeline.prepare` wrote."""
    window: Count = 8
    """Shards shuffled together: more shards mix better but need a larger cache."""
    random_flip: bool = False
    """Mirror each image left-right with probability 1/2."""
    workers: Count = 1
    """Threads per rank that read and decode images."""
    cache_dir: str = "~/.cache/iddpm/shards"
    """Local folder for shards of a remote URL, shared by the ranks of a node."""
    cache_gb: Positive = 50.0
    """Maximum size of that cache, in GB (10^9 bytes)."""

    def __post_init__(self) -> None:
        check_bounds(self, "data.", InputError)


@dataclass(frozen=True)
class TrackingConfig:
    """Where to send the run's history; a local journal is always written as well."""

    uri: str | None = None
    """MLflow tracking URI; default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db. 'none': journal only."""
    experiment: str = "iddpm"
    """MLflow experiment; takes effect when the run begins."""
    name: str | None = None
    """Name of the run in MLflow; default: the last part of the run's folder or URL. Takes effect when the run begins.
    """
    parent: str | None = None
    """iddpm.uid of the parent MLflow run; set by studies. Takes effect when the run begins."""
    flush_s: NotNegative = 30.0
    """Longest time, in seconds, to wait for a slow tracking server at the end; the journal can be sent later."""

    def __post_init__(self) -> None:
        check_bounds(self, "tracking.", InputError)

    @property
    def mlflow_uri(self) -> str | None:
        """MLflow's URI: given, from the environment, or the default; None if the history goes only to the journal."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        return None if uri == "none" else uri


@dataclass(frozen=True)
class LaunchConfig:
    """How many processes run, who starts them, and how they compute."""

    launcher: Literal["auto", "local", "torchrun", "mpi", "slurm", "ray"] = "auto"
    """What starts the workers; 'auto' decides by the environment."""
    workers: Count | None = None
    """Number of workers (Ray only); default: one per GPU of the cluster, or one per CPU if it has no GPU."""
    min_workers: Count = 1
    """Fewest workers with which Ray may start, or continue after losing a node."""
    retries: int = 3
    """How often Ray restarts a failed worker group from the newest checkpoint."""
    timeout_s: Positive = 300.0
    """Seconds to wait for a hung rank before the others stop."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; 'auto' uses a GPU if there is one."""
    compile: bool = False
    """Fuse normalisation and activation with torch.compile (adds about 30 s at the first step)."""

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    out: str = "runs/digits"
    """Folder or URL for checkpoints and samples. Running the same command again resumes the run there."""
    horizon: str = "4000steps"
    """Where training ends: `4000steps`, `1e6images` or `2.5e18flops` (forward and backward, 2 per MAC)."""
    seed: Natural = 0
    """Seed of everything: weights, data order, timesteps, noise."""
    batch_size: Count = 128
    """Images per step, over all ranks."""
    microbatch: Count | None = None
    """Largest number of images per forward pass on one rank; default: its whole share (evaluation: as
    pipeline.evaluate)."""
    lr: Positive = 1e-4
    """AdamW's learning rate."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises linearly from 0."""
    ema_rates: Annotated[tuple[Fraction, ...], NOT_EMPTY] = (0.9999,)
    """Decay rates of the moving averages of the weights, one average per rate; the first draws the sample grids."""
    timestep_sampler: Literal["uniform", "loss-second-moment"] = "uniform"
    """Distribution of the training timesteps; loss-second-moment is the importance sampler for L_vlb (IDDPM eq. 18)."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Arithmetic of the network: bf16 is autocast over fp32 weights; fp64 is for testing."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: takes much less memory and about a third more time."""
    log_every: Count = 50
    """Steps between log lines."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    keep_last: Count = 3
    """How many of the newest checkpoints to keep."""
    keep_every: Count | None = None
    """Also keep checkpoints at multiples of this many steps."""
    sample_every: Natural = 1000
    """Steps between sample grids; 0: only at the end."""
    sample_count: Count = 64
    """Images in a sample grid."""
    sample_steps: Count = 100
    """Steps of the strided ancestral chain that draws the grid."""
    eval_every: Natural = 0
    """Steps between evaluations of the first moving average; 0: never."""
    eval_metrics: str = "nll"
    """Metrics to evaluate (see pipeline.evaluate --metrics); image metrics use `--features trained`."""
    eval_images: Count = 256
    """Validation images for nll, and images to draw for image metrics."""
    model: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)
        parse_horizon(self.horizon)
        self.metrics  # noqa: B018  # raises if invalid
        names = {f"{rate:g}" for rate in self.ema_rates}  # in a checkpoint
        if len(names) < len(self.ema_rates):
            raise InputError(f"--ema-rates: got {self.ema_rates}, expected rates that differ in their first six digits")
        if self.sample_steps > self.diffusion.timesteps:
            raise InputError(
                f"--sample-steps: got {self.sample_steps}, expected 1 to --diffusion.timesteps"
                f" = {self.diffusion.timesteps}"
            )

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of --eval-metrics."""
        return check_metrics(self.eval_metrics, "--eval-metrics")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.model.in_channels, self.model.image_size, self.model.image_size

    @property
    def out_channels(self) -> int:
        """Output channels of the network: a mean and, if it is learned, a variance."""
        return self.diffusion.out_channels(self.model.in_channels)


def parse_horizon(text: str) -> tuple[float, str]:
    """`"2.5e18flops"` -> (2.5e18, "flops"). Raises InputError unless it is a positive number with a unit."""
    for unit in ("steps", "images", "flops"):
        if text.endswith(unit):
            try:
                amount = float(text.removesuffix(unit))
            except ValueError:
                break
            if 0 < amount < math.inf:
                return amount, unit
    raise InputError(
        f"--horizon: got {text!r}, expected a positive number with a unit, such as 4000steps, 1e6images, 2.5e18flops"
    )


def horizon_steps(config: TrainConfig, train_flops_per_image: int) -> int:
    """Return the first step at which the horizon is reached or passed."""
    amount, unit = parse_horizon(config.horizon)
    per_step = {
        "steps": 1,
        "images": config.batch_size,
        "flops": config.batch_size * train_flops_per_image,
    }[unit]
    return math.ceil(amount / per_step)


METRICS = ("nll", "fid", "is", "kid", "precision", "recall")


def check_metrics(text: str, flag: str) -> tuple[str, ...]:
    """Parse a comma-separated list of metrics; return them in METRICS' order.

    Raises InputError for a name that is not there.
    """
    names = {name.strip() for name in text.split(",")} - {""}
    if not names or not names.issubset(METRICS):
        raise InputError(f"{flag}: got {text!r}, expected a comma-separated list of {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in names)


# How and where a run executes is not part of its identity: these may change when it resumes, and may hold secrets.
_UNRECORDED = ("storage", "launch", "tracking")

# Nor are these fields of what is recorded.
_MAY_CHANGE = {
    *("out", "horizon", "microbatch", "checkpoint_activations", "log_every", "checkpoint_every", "keep_last"),
    *("keep_every", "sample_every", "sample_count", "sample_steps", "eval_every", "eval_metrics", "eval_images"),
    *("data.url", "data.workers", "data.cache_dir", "data.cache_gb"),
}


def record(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as plain data for checkpoints, journal and MLflow, without endpoints or credentials."""
    content = dataclasses.asdict(config, dict_factory=_plain)
    return {name: value for name, value in content.items() if name not in _UNRECORDED}


def _plain(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return fields as JSON and YAML have them, with lists for tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}


def from_record(content: dict[str, Any]) -> TrainConfig:
    """Rebuild the configuration that `record` wrote. Raises InputError if a field is unknown or invalid."""
    return _build(TrainConfig, content, "")


def _build(kind: Any, content: dict[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for name, value in content.items():
        if name not in fields:
            raise InputError(f"recorded config: unknown field {prefix}{name}; written by a newer version?")
        section = fields[name].default_factory
        if isinstance(value, dict) and callable(section):
            value = _build(section, value, f"{prefix}{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except ValueError as error:
        raise InputError(f"recorded config: {error}") from error


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def check_same_run(recorded: dict[str, Any], config: TrainConfig) -> None:
    """Raise InputError, naming the fields, if `config` would not continue the recorded run."""
    old = flatten(record(from_record(recorded)))  # fields that it lacks get their defaults
    new = flatten(record(config))
    changed = [
        f"  {as_flag(name)}: the run has {old[name]}, got {new[name]}"
        for name in sorted(new.keys() - _MAY_CHANGE)
        if old[name] != new[name]
    ]
    if changed:
        raise InputError(
            f"--out {config.out} holds a run with another configuration:\n"
            + "\n".join(changed)
            + "\nGive the recorded values to resume it, or another --out to start a new run."
        )
