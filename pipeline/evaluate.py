"""Measure a trained model: `python -m pipeline.evaluate RUN --metrics nll,fid`."""

import csv
import io
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import tyro

from pipeline.cli import parse_flags
from pipeline.config import LaunchConfig, TrackingConfig, TrainConfig, check_metrics, record
from pipeline.data.cache import Cache
from pipeline.data.shards import ShardIndex, load_index
from pipeline.data.stream import Reader
from pipeline.distributed.world import World
from pipeline.drawing import Recipe, draw_batches
from pipeline.errors import InputError
from pipeline.evaluation.features import (
    CLASSIFIERS,
    Features,
    inception_features,
    torch_fidelity_features,
    trained_features,
)
from pipeline.evaluation.image_quality import (
    NEAR,
    Reference,
    dataset_reference,
    image_metrics,
    npz_reference,
    spread_images,
)
from pipeline.evaluation.measured import Measured
from pipeline.evaluation.nll import Nll, NllPlan, measure_nll
from pipeline.evaluation.resumable import Block, Blocks
from pipeline.model import Trained, load_trained
from pipeline.run.journal import Journal, put_evaluation, read_journal, run_name, statuses
from pipeline.sample import write_out
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store


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

    images: int = 1024
    """nll: maximum number of images, chosen at random from the split."""
    split: str = "val"
    """nll: split to evaluate on."""
    exact: bool = False
    """nll: compute all T terms of the bound, with T network evaluations per image, instead of sampling them."""
    draws: int = 16
    """nll: timesteps to draw per image."""
    target_se: float | None = None
    """nll: stop once the standard error (with --against, of the difference) is this small, in bits/dim."""
    chain: str | None = None
    """nll: bound of a chain of this many evenly spaced steps, e.g. 25, or of the best steps, by dynamic programming,
    e.g. best25. These are other quantities, named nll_strided25 and nll_best25."""
    against: str | None = None
    """nll: compare with this run (its newest checkpoint, or --against-step) on the same images, timesteps and noise."""
    against_step: int | None = None
    """nll: step of the checkpoint to compare with; without --against, of the same run."""
    images_per_call: int = 16
    """nll: images per forward pass, each at draws + 1 timesteps, or with --exact at `timesteps_per_call`."""
    timesteps_per_call: int = 32
    """nll: timesteps of each image per forward pass with --exact."""
    out: str | None = None
    """nll: with --exact or --chain, write the terms by timestep to this CSV file."""

    samples: int = 10_000
    """image metrics: images to draw. Values for different numbers of images are not comparable; IDDPM uses 50,000."""
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    """image metrics: IDDPM's own sampler, or DDIM."""
    steps: int | None = None
    """image metrics: steps of the strided chain; default: the run's --sample-steps."""
    eta: float = 0.0
    """image metrics: DDIM's η, 0 to 1."""
    batch_size: int = 64
    """image metrics: images drawn at a time."""
    features: str = "inception"
    """image metrics: inception; `trained`, a small network trained on the data's labels, whose metrics are named after
    the data (fd_digits); or the name of one of torch-fidelity's networks."""
    inception: str | None = None
    """image metrics: path or URL of torch-fidelity's weights-inception-2015-12-05-6726825d.pth."""
    download: bool = False
    """image metrics: allow downloading those weights from their publisher."""
    reference: str | None = None
    """image metrics: path or URL of a reference batch of the guided-diffusion evaluator (.npz), instead of the
    training images."""
    neighbours: int = 3
    """precision, recall: neighbours k (IDDPM uses 5)."""

    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        for name in ("images", "images_per_call", "timesteps_per_call", "samples", "batch_size", "neighbours"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected 1 or more")
        Recipe(self.sampler, 1 if self.steps is None else self.steps, self.eta, self.seed)
        self.wanted  # noqa: B018  # raises if invalid
        if self.out and not (self.exact or self.chain):
            raise InputError("--out: needs --exact or --chain")
        if "is" in self.wanted and self.features not in CLASSIFIERS:
            raise InputError(
                f"--metrics is: needs a classifier, got --features {self.features}; use inception or trained"
            )
        if self.wanted & {"precision", "recall"} and self.neighbours >= self.samples:
            raise InputError(f"--neighbours: got {self.neighbours}, expected less than --samples = {self.samples}")
        self.plan  # noqa: B018  # raises if invalid
        if (self.against or self.against_step is not None) and self.plan.best:
            raise InputError(
                "--chain best…: is optimised for one model; it cannot be combined with --against or --against-step"
            )

    @property
    def wanted(self) -> set[str]:
        return check_metrics(self.metrics, "--metrics")

    @property
    def plan(self) -> NllPlan:
        return NllPlan(
            self.images,
            self.seed,
            self.exact,
            self.draws,
            self.target_se,
            self.chain,
            self.images_per_call,
            self.timesteps_per_call,
        )

    def evaluations(self, run: TrainConfig) -> int:
        """Return the maximum number of forward passes of one image to evaluate one checkpoint of such a run."""
        nll = self.plan.evaluations(run.diffusion.timesteps) if "nll" in self.wanted else 0
        return nll + (self.samples * (self.steps or run.sample_steps) if self.wanted - {"nll"} else 0)


def main(config: EvaluateConfig, world: World) -> None:
    run = Store(config.run, config.storage)
    load = partial(load_trained, world=world, ema_rate=config.ema_rate, fuse=config.launch.compile)
    models = [load(run, step=config.step)]
    if config.against or config.against_step is not None:
        other = Store(config.against, config.storage) if config.against else run
        models.append(load(other, step=config.against_step))
    data = Store(config.data or models[0].config.data.url, config.storage)
    found = measure(models, config, data, world, run)

    def tell() -> None:
        for value in found:
            print(value)
        track(models[0], [value for value in found if not value.name.endswith("_difference")], run, config.tracking)

    world.only_on_rank0(tell)


def measure(
    models: Sequence[Trained], config: EvaluateConfig, data: Store, world: World, run: Store | None = None
) -> list[Measured]:
    """Return the values on rank 0, and an empty list on the others.

    With the first model's `run`, shows progress and saves partial results there, from which the same call resumes.
    """
    trained = models[0].config
    cache = Cache.of(trained.data)
    tools = None
    if config.wanted - {"nll"}:  # first, so that a missing input is reported before anything is measured
        recipe, index, features = image_tools(config, trained, data, world)
        reference = _reference(config, data, index, features, cache, world)
        tools = recipe, features, reference
    found: list[Measured] = []
    if "nll" in config.wanted:
        found += _nll(models, config, data, cache, world, run)
    if tools:
        found += _image_metrics(models[0], config, *tools, world, run)
    return found if world.rank == 0 else []


def _nll(
    models: Sequence[Trained], config: EvaluateConfig, data: Store, cache: Cache, world: World, run: Store | None
) -> list[Measured]:
    index = _index(data, config.split, [model.config for model in models])
    plan = config.plan
    reader = Reader(data, index, cache)
    with closing(reader):
        nll = measure_nll(
            models,
            plan,
            reader.read,
            index.num_samples,
            world,
            store=run,
            identity=[index.digest, [m.identity for m in models]],
            progress=run is not None,
        )
    if config.out:
        world.only_on_rank0(partial(write_out, config.out, _terms_csv(nll), config.storage))
    if world.rank != 0:
        return []
    shared = {"n": nll.total.shape[1], "split": config.split, "data": index.digest[:16], "seed": config.seed}
    found = []
    for i, model in enumerate(models):
        passport = {**shared, "estimator": plan.estimator, "T": model.config.diffusion.timesteps, "ema": model.ema_rate}
        found.append(Measured(plan.name, nll.mean(i), model.step, passport, nll.standard_error(i)))
    if run:
        print(report(nll))
    if len(models) > 1:
        value, error = nll.difference
        found.append(Measured(f"{plan.name}_difference", value, models[0].step, found[0].passport, error))
        verdict = "lower" if value < 0 else "higher"
        low, high = found[-1].interval
        clear = low > 0 or high < 0
        print(f"the first is {verdict}, {'clearly' if clear else 'but not significantly'} (95 %)")
    return found


def _image_metrics(
    trained: Trained,
    config: EvaluateConfig,
    recipe: Recipe,
    features: Features,
    reference: Reference,
    world: World,
    run: Store | None,
) -> list[Measured]:
    images = {"n": config.samples, "ema": trained.ema_rate, **asdict(recipe), "features": features.digest}
    blocks = Blocks(world, run, "images", [trained.identity, config.batch_size, images])

    def draw(number: int) -> Block:
        lo = number * config.batch_size
        hi = min(lo + config.batch_size, config.samples)
        (drawn,) = draw_batches(trained, recipe, lo, hi, device=world.device, batch_size=config.batch_size)
        return features.extract(drawn)

    blocks.extend(math.ceil(config.samples / config.batch_size), draw, progress="sampling" if run else None)

    def finish() -> dict[str, tuple[float, dict[str, Any]]]:
        values = image_metrics(blocks.found, reference, features, config.wanted - {"nll"}, config.neighbours)
        blocks.delete()  # about 12 KB per image
        return values

    values = world.on_rank0(finish)
    passport = images | {"reference": reference.digest}
    return [
        Measured(features.metric(name), value, trained.step, passport | more) for name, (value, more) in values.items()
    ]


def real_floor(config: EvaluateConfig, run: TrainConfig, data: Store, world: World) -> list[Measured]:
    """Compute the image metrics of real images instead of `config.samples` generated ones: a floor for any model.

    Uses validation images if there are enough; else training images, whose values are too low because they are part of
    the reference. The passport says which. Raises InputError if there are too few. For a single process.
    """
    cache = Cache.of(run.data)
    wanted = config.wanted - {"nll"}
    if not wanted:
        return []
    _, index, features = image_tools(config, run, data, world)
    reference = _reference(config, data, index, features, cache, world)
    try:
        real = _index(data, "val", [run])
    except FileNotFoundError:
        real = None
    if real is None or real.num_samples < config.samples:
        real = index or _index(data, "train", [run])
        wanted -= NEAR  # these would compare the images with themselves
        if real.num_samples <= config.samples:
            raise InputError(f"{data}: expected more than --samples = {config.samples} images; lower --samples")
    seen = [features.extract(images) for images in spread_images(data, real, cache, config.samples)]
    values = image_metrics(seen, reference, features, wanted, config.neighbours)
    n = sum(len(block["features"]) for block in seen)
    passport = {"n": n, "real": real.split, "features": features.digest, "reference": reference.digest}
    return [Measured(features.metric(name), value, 0, passport | more) for name, (value, more) in values.items()]


def _reference(
    config: EvaluateConfig, data: Store, index: ShardIndex | None, features: Features, cache: Cache, world: World
) -> Reference:
    if config.reference:
        reference = npz_reference(config.reference, config.storage, features, world)
        if reference.images is None and (near := config.wanted & NEAR):
            raise InputError(f"{', '.join(sorted(near))}: need real images; the reference has only moments")
        return reference
    assert index, "image_tools has it"
    return dataset_reference(data, index, features, world, cache)


def image_tools(
    config: EvaluateConfig, run: TrainConfig, data: Store, world: World
) -> tuple[Recipe, ShardIndex | None, Features]:
    """Return the sampling recipe, the reference dataset (None: only --reference) and the features of such a run.

    Raises InputError if any of them is unavailable.
    """
    recipe = Recipe(config.sampler, config.steps or run.sample_steps, config.eta, config.seed)
    recipe.chain(run.diffusion, world.device)  # raises if invalid, before anything slow
    index = _index(data, "train", [run]) if config.features == "trained" or not config.reference else None
    if index and config.features == "trained":
        return recipe, index, trained_features(data, index, world)
    if config.features == "inception":
        return recipe, index, inception_features(config.inception, config.download, config.storage, world.device)
    return recipe, index, torch_fidelity_features(config.features, None, world.device)


def _index(data: Store, split: str, runs: Sequence[TrainConfig]) -> ShardIndex:
    index = load_index(data, split)
    for run in runs:
        if index.shape != run.image_shape:
            shapes = f"got images of {index.shape} (channels, height, width), expected {run.image_shape}"
            raise InputError(f"{data}: {shapes}")
    return index


def track(trained: Trained, found: Sequence[Measured], run: Store, tracking: TrackingConfig) -> None:
    """Log values to the run's journal, and through it to MLflow; the run keeps its status there."""
    url, meta = trained.config.data.url, trained.meta
    dataset = {"url": url, "name": run_name(url), "digest": meta["dataset_digest"] or "unknown"}
    journal = Journal(run, tracking, uid=meta["uid"], config=record(trained.config), dataset=dataset)
    history = statuses(read_journal(journal.folder))
    line = journal.evaluation(trained.step, *logged(trained, found))
    if run.local is None:
        put_evaluation(run, line)
    journal.close(history[-1] if history else "FINISHED")


def logged(trained: Trained, found: Sequence[Measured]) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Return the metrics `eval/NAME`, `eval/NAME_se` if there is a standard error, and the training compute so far;
    and the passports by metric.
    """
    values = {"eval/train_flops": float(trained.meta["train_flops"])} if "train_flops" in trained.meta else {}
    passports: dict[str, dict[str, Any]] = {}
    for value in found:
        key = f"eval/{value.name}"
        if value.step == trained.step and key not in values:
            values[key], passports[key] = value.value, value.passport
            if value.standard_error is not None:
                values[f"{key}_se"] = value.standard_error
    return values, passports


def report(nll: Nll) -> str:
    """Format the total of each model, and its parts, as text."""
    lines = []
    count, steps = nll.total.shape[1], len(nll.timesteps)
    for i in range(len(nll.total)):
        lines += [
            f"bits/dim  {nll.mean(i):.4f} +- {nll.standard_error(i):.4f} (standard error over {count} images)",
            f"  prior       L_T    {nll.prior[i]:.6f}",
            f"  decoder     L_0    {nll.decoder[i]:.4f}",
        ]
        if nll.vb is not None and nll.mse is not None:
            edges = sorted({1, *(round(steps * q / 4) for q in (1, 2, 3, 4))})
            for lo, hi in pairwise(edges):
                label = f"t = {nll.timesteps[lo]}..{nll.timesteps[hi - 1]}"
                terms, mse = nll.vb[i, lo:hi].sum(), nll.mse[i, lo:hi].mean()
                lines.append(f"  {label:18s} {terms:.4f}   (noise mse {mse:.4f})")
    saved = f", {count * steps / nll.evaluations:.0f} times fewer than all" if nll.vb is None else ""
    return "\n".join([*lines, f"  {nll.evaluations:,} network evaluations{saved}"])


def _terms_csv(nll: Nll) -> bytes:
    assert nll.vb is not None
    assert nll.mse is not None
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["timestep", "vb_bits_per_dim", "eps_mse"])
    writer.writerows(zip(nll.timesteps, nll.vb[0].tolist(), nll.mse[0].tolist(), strict=True))
    return table.getvalue().encode()


if __name__ == "__main__":
    from pipeline.distributed.launch import run_main

    config = parse_flags(EvaluateConfig, sys.argv[1:], EvaluateConfig.__doc__ or "")
    run_main(lambda world: main(config, world), config.launch)
