"""A run's configuration: frozen dataclasses, parsed from the command line by tyro.

This module imports neither torch nor any client library, so `--help` answers at once.
Precedence: preset < YAML file (`--config`) < flags.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from iddpm.config import DiffusionConfig, UNetConfig
from pipeline.errors import InputError
from pipeline.storage.backends import StorageConfig


@dataclass(frozen=True)
class DataConfig:
    """Which images to train on, and how to stream them."""

    url: str = "data/digits"
    """Folder or URL (s3://bucket/prefix) of the shards that `python -m pipeline.prepare` wrote."""
    window: int = 8
    """Shards shuffled together: more shards mix better but need a larger cache."""
    random_flip: bool = False
    """Mirror each image left-right with probability 1/2."""
    workers: int = 1
    """Threads per rank that read and decode images."""
    cache_dir: str = "~/.cache/iddpm/shards"
    """Local folder for shards of a remote URL, shared by the ranks of a node."""
    cache_gb: float = 50.0
    """Maximum size of that cache, in GB (10^9 bytes)."""

    def __post_init__(self) -> None:
        _positive(self, "data", "window", "workers", "cache_gb")


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
    flush_s: float = 30.0
    """Longest time, in seconds, to wait for a slow tracking server at the end; the journal can be sent later."""


@dataclass(frozen=True)
class LaunchConfig:
    """How many processes run, who starts them, and how they compute."""

    launcher: Literal["auto", "local", "torchrun", "mpi", "slurm", "ray"] = "auto"
    """What starts the workers; 'auto' decides by the environment."""
    workers: int | None = None
    """Number of workers (Ray only); default: one per GPU of the cluster, or one per CPU if it has no GPU."""
    min_workers: int = 1
    """Fewest workers with which Ray may start, or continue after losing a node."""
    retries: int = 3
    """How often Ray restarts a failed worker group from the newest checkpoint."""
    timeout_s: float = 300.0
    """Seconds to wait for a hung rank before the others stop."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; 'auto' uses a GPU if there is one."""
    compile: bool = False
    """Fuse normalisation and activation with torch.compile (adds about 30 s at the first step)."""

    def __post_init__(self) -> None:
        _positive(self, "", "timeout_s", "min_workers", "workers")


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    out: str = "runs/digits"
    """Folder or URL for checkpoints and samples. Running the same command again resumes the run there."""
    horizon: str = "4000steps"
    """Where training ends: `4000steps`, `1e6images` or `2.5e18flops` (forward and backward, 2 per MAC)."""
    seed: int = 0
    """Seed of everything: weights, data order, timesteps, noise."""
    batch_size: int = 128
    """Images per step, over all ranks."""
    microbatch: int | None = None
    """Largest number of images per forward pass on one rank; default: its whole share (evaluation: as
    pipeline.evaluate)."""
    lr: float = 1e-4
    """AdamW's learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    ema_rates: tuple[float, ...] = (0.9999,)
    """Decay rates of the moving averages of the weights, one average per rate; the first draws the sample grids."""
    timestep_sampler: Literal["uniform", "loss-second-moment"] = "uniform"
    """Distribution of the training timesteps; loss-second-moment is the importance sampler for L_vlb (IDDPM eq. 18)."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Arithmetic of the network: bf16 is autocast over fp32 weights; fp64 is for testing."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: takes much less memory and about a third more time."""
    log_every: int = 50
    """Steps between log lines."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_last: int = 3
    """How many of the newest checkpoints to keep."""
    keep_every: int | None = None
    """Also keep checkpoints at multiples of this many steps."""
    sample_every: int = 1000
    """Steps between sample grids; 0: only at the end."""
    sample_count: int = 64
    """Images in a sample grid."""
    sample_steps: int = 100
    """Steps of the strided ancestral chain that draws the grid."""
    eval_every: int = 0
    """Steps between evaluations of the first moving average; 0: never."""
    eval_metrics: str = "nll"
    """Metrics to evaluate (see pipeline.evaluate --metrics); image metrics use `--features trained`."""
    eval_images: int = 256
    """Validation images for nll, and images to draw for image metrics."""
    model: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        parse_horizon(self.horizon)
        _positive(
            self, "", "batch_size", "microbatch", "lr", "log_every", "checkpoint_every", "keep_last", "keep_every"
        )
        _positive(self, "", "sample_count", "eval_images")
        check_metrics(self.eval_metrics, "--eval-metrics")
        for name in ("weight_decay", "warmup_steps", "sample_every", "eval_every", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"--{_flag(name)}: got {getattr(self, name)}, expected 0 or more")
        if not self.ema_rates or any(not 0 <= rate < 1 for rate in self.ema_rates):
            raise InputError(f"--ema-rates: got {self.ema_rates}, expected one or more rates in [0, 1)")
        if len({f"{rate:g}" for rate in self.ema_rates}) < len(self.ema_rates):  # their names in a checkpoint
            raise InputError(f"--ema-rates: got {self.ema_rates}, expected rates that differ in their first six digits")
        if not 1 <= self.sample_steps <= self.diffusion.timesteps:
            raise InputError(
                f"--sample-steps: got {self.sample_steps}, expected 1 to --diffusion.timesteps"
                f" = {self.diffusion.timesteps}"
            )

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


def check_metrics(text: str, flag: str) -> set[str]:
    """Parse a comma-separated list of metrics. Raises InputError for a name that is not in METRICS."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    if not names or names - set(METRICS):
        raise InputError(f"{flag}: got {text!r}, expected a comma-separated list of {', '.join(METRICS)}")
    return names


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _positive(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            flag = _flag(f"{prefix}.{name}" if prefix else name)
            raise InputError(f"--{flag}: got {value}, expected a positive number")


# How and where a run executes is not part of its identity: these may change when it resumes, and may hold secrets.
_UNRECORDED = ("storage", "launch", "tracking")


_MAY_CHANGE = {
    *("out", "horizon", "microbatch", "checkpoint_activations", "log_every", "checkpoint_every", "keep_last"),
    *("keep_every", "sample_every", "sample_count", "sample_steps", "eval_every", "eval_metrics", "eval_images"),
    *("data.url", "data.workers", "data.cache_dir", "data.cache_gb"),
}


def record(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as plain data for checkpoints, journal and MLflow, without endpoints or credentials."""
    content = dataclasses.asdict(config)
    return {name: _plain(value) for name, value in content.items() if name not in _UNRECORDED}


def from_record(content: dict[str, Any]) -> TrainConfig:
    """Rebuild the configuration that `record` wrote. Raises InputError if a field is unknown or invalid."""
    return _build(TrainConfig, content, "")


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
    old, new = flatten(record(from_record(recorded))), flatten(record(config))  # new fields get their defaults
    changed = [
        f"  --{_flag(name)}: the run has {old.get(name)}, got {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _MAY_CHANGE
    ]
    if changed:
        raise InputError(
            f"--out {config.out} holds a run with another configuration:\n"
            + "\n".join(changed)
            + "\nGive the recorded values to resume it, or another --out to start a new run."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _build(kind: Any, content: dict[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(content.keys() - fields.keys()):
        raise InputError(f"recorded config: unknown field {prefix}{unknown[0]}; written by a newer version?")
    values = {}
    for name, value in content.items():
        default = fields[name].default_factory if callable(fields[name].default_factory) else None
        if isinstance(value, dict) and default is not None:
            value = _build(default, value, f"{prefix}{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
