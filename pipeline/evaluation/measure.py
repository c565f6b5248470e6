"""Measure trained models: bits/dim and image metrics, as values with passports for a run's history."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

from iddpm.bounds import Count, check_bounds
from pipeline.config import TrackingConfig, TrainConfig, record
from pipeline.data.cache import Cache
from pipeline.data.shards import ShardIndex, load_index
from pipeline.data.stream import Reader
from pipeline.distributed.world import World
from pipeline.drawing import Recipe, draw_batches
from pipeline.errors import InputError
from pipeline.evaluation import image_quality
from pipeline.evaluation.features import CLASSIFIERS, pretrained_features, trained_features
from pipeline.evaluation.measured import Measured
from pipeline.evaluation.nll import Nll, NllPlan, measure_nll
from pipeline.evaluation.resumable import Block, Blocks
from pipeline.model import Trained
from pipeline.run.journal import Journal, put_evaluation, read_journal, run_name, statuses
from pipeline.storage.store import Store


@dataclass(frozen=True)
class ImagePlan:
    """How to measure image metrics, apart from the model and the seed."""

    samples: Count = 10_000
    """image metrics: images to draw. Values for different numbers of images are not comparable; IDDPM uses 50,000."""
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    """image metrics: IDDPM's own sampler, or DDIM."""
    steps: Count | None = None
    """image metrics: steps of the strided chain; default: the run's --sample-steps."""
    eta: float = 0.0
    """image metrics: DDIM's η, 0 to 1."""
    batch_size: Count = 64
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
    neighbours: Count = 3
    """precision, recall: neighbours k (IDDPM uses 5)."""

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)
        Recipe(self.sampler, 1 if self.steps is None else self.steps, self.eta, seed=0)  # raises if invalid


@dataclass(frozen=True)
class EvaluationPlan:
    """What to measure, apart from the models and the data."""

    metrics: tuple[str, ...]
    """Some of METRICS."""
    seed: int = 0
    """Seed of the choice of images, of timesteps and noise, and of the generated images."""
    nll: NllPlan = field(default_factory=NllPlan)
    images: ImagePlan = field(default_factory=ImagePlan)

    def __post_init__(self) -> None:
        features, samples, neighbours = self.images.features, self.images.samples, self.images.neighbours
        if "is" in self.metrics and features not in CLASSIFIERS:
            raise InputError(f"--metrics is: needs a classifier, got --features {features}; use inception or trained")
        if self.image_metrics & {"precision", "recall"} and neighbours >= samples:
            raise InputError(f"--neighbours: got {neighbours}, expected less than --samples = {samples}")

    @property
    def image_metrics(self) -> set[str]:
        """The metrics of generated images."""
        return set(self.metrics) - {"nll"}

    def evaluations(self, run: TrainConfig) -> int:
        """Return the maximum number of forward passes of one image to evaluate one checkpoint of such a run."""
        nll = self.nll.evaluations(run.diffusion.timesteps) if "nll" in self.metrics else 0
        images = self.images.samples * (self.images.steps or run.sample_steps) if self.image_metrics else 0
        return nll + images


def measure(
    models: Sequence[Trained],
    plan: EvaluationPlan,
    data: Store,
    world: World,
    run: Store | None = None,
    on_nll: Callable[[Nll], None] | None = None,
) -> list[Measured]:
    """Return the values on rank 0, and an empty list on the others.

    Image metrics are of the first model only. With its `run`, shows progress and saves partial results there, from
    which the same call resumes. Rank 0 calls `on_nll` with the parts of the bits/dim before it draws images.
    """
    # What image metrics need comes first, so that a missing input is reported before anything is measured.
    images = None
    if plan.image_metrics:
        images = ImageMetrics(plan, models[0].config, data, world)
        images.reference  # noqa: B018  # loads it

    values: list[Measured] = []
    if "nll" in plan.metrics:
        index = _load_index(data, plan.nll.split, [model.config for model in models], world)
        with closing(Reader(data, index, Cache.of(models[0].config.data))) as reader:
            nll = measure_nll(models, plan.nll, reader, world, seed=plan.seed, store=run)
        if on_nll:
            world.only_on_rank0(partial(on_nll, nll))
        values += _nll_values(models, plan, index, nll)
    if images:
        values += images.of_model(models[0], run)
    return values if world.rank == 0 else []


def _nll_values(models: Sequence[Trained], plan: EvaluationPlan, index: ShardIndex, nll: Nll) -> list[Measured]:
    name, estimator = plan.nll.name, plan.nll.estimator
    common = {"n": nll.total.shape[1], "split": index.split, "data": index.digest[:16], "seed": plan.seed}
    values = []
    for i, model in enumerate(models):
        passport = {**common, "estimator": estimator, "T": model.config.diffusion.timesteps, **model.weights}
        values.append(Measured(name, nll.mean(i), model.step, passport, nll.standard_error(i)))
    if len(models) > 1:
        difference, error = nll.difference
        values.append(Measured(f"{name}_difference", difference, models[0].step, values[0].passport, error))
    return values


class ImageMetrics:
    """The image metrics of a run's models: how to draw images, in which features to compare them, and with which."""

    def __init__(self, plan: EvaluationPlan, run: TrainConfig, data: Store, world: World) -> None:
        """Raises InputError or OSError if anything but the reference is unavailable."""
        settings, device = plan.images, world.device
        self.plan, self.metrics = settings, plan.image_metrics
        self.run, self.data, self.world = run, data, world
        self.cache = Cache.of(run.data)

        # Cheap checks come before a network is downloaded or trained.
        self.recipe = Recipe(settings.sampler, settings.steps or run.sample_steps, settings.eta, plan.seed)
        self.chain = self.recipe.chain(run.diffusion, device)
        if not settings.reference:
            self.train  # noqa: B018  # loads it
        if settings.features == "trained":
            self.features = trained_features(data, self.train, world)
        else:
            self.features = pretrained_features(
                settings.features, settings.inception, settings.download, data.config, device
            )

    @cached_property
    def train(self) -> ShardIndex:
        """The training images, from which features and reference come."""
        return _load_index(self.data, "train", [self.run], self.world)

    @cached_property
    def reference(self) -> image_quality.Reference:
        """The images to compare with; all ranks load it, or compute its moments, together."""
        if not self.plan.reference:
            return image_quality.dataset_reference(self.data, self.train, self.features, self.world, self.cache)
        reference = image_quality.npz_reference(
            self.plan.reference, self.data.config, self.features, self.run.image_shape, self.world
        )
        near = sorted(self.metrics & image_quality.NEAR)
        if near and reference.images is None:
            raise InputError(f"{', '.join(near)}: need real images; the reference has only moments")
        return reference

    def of_model(self, trained: Trained, run: Store | None) -> list[Measured]:
        """Draw images in blocks, which are resumable in `run`, and measure them."""
        plan, recipe = self.plan, self.recipe
        passport = {
            "n": plan.samples,
            **trained.weights,
            "sampler": recipe.sampler,
            "steps": recipe.steps,
            "eta": recipe.eta,
            "seed": recipe.seed,
            "features": self.features.digest,
        }
        blocks = Blocks(self.world, run, "images", [trained.identity, plan.batch_size, passport])

        def draw(number: int) -> Block:
            lo = number * plan.batch_size
            hi = min(lo + plan.batch_size, plan.samples)
            (images,) = draw_batches(trained, recipe, self.chain, lo, hi, batch_size=plan.batch_size)
            return self.features.extract(images)

        def finish() -> list[Measured]:
            values = self.of_blocks(blocks.computed, self.metrics, trained.step, passport)
            blocks.delete()  # about 12 KB per image
            return values

        blocks.extend(math.ceil(plan.samples / plan.batch_size), draw, label="sampling")
        return self.world.on_rank0(finish)

    def of_blocks(self, blocks: list[Block], metrics: set[str], step: int, passport: dict[str, Any]) -> list[Measured]:
        """Measure images of which `Features.extract` has made these blocks."""
        values = image_quality.image_metrics(blocks, self.reference, self.features, metrics, self.plan.neighbours)
        passport = passport | {"reference": self.reference.digest}
        return [
            Measured(self.features.metric(name), value, step, passport | details)
            for name, (value, details) in values.items()
        ]


def real_floor(plan: EvaluationPlan, run: TrainConfig, data: Store, world: World) -> list[Measured]:
    """Compute the image metrics of real images instead of `plan.images.samples` generated ones: a floor for any model.

    Uses validation images if there are enough; else training images, whose values are too low because they are part of
    the reference. The passport says which. Raises InputError if there are too few. For a single process.
    """
    if not plan.image_metrics:
        return []
    images = ImageMetrics(plan, run, data, world)
    metrics, count = plan.image_metrics, plan.images.samples

    # Which images, and what they can be compared in.
    try:
        real = _load_index(data, "val", [run], world)
    except FileNotFoundError:
        real = None
    if real is None or real.num_samples < count:
        real = images.train
        metrics -= image_quality.NEAR  # these would compare the images with themselves
        if real.num_samples <= count:
            raise InputError(f"{data}: expected more than --samples = {count} images; lower --samples")

    # As if a model had drawn them.
    batches = image_quality.spread_images(data, real, images.cache, count)
    blocks = [images.features.extract(batch) for batch in batches]
    passport = {"n": count, "real": real.split, "features": images.features.digest}
    return images.of_blocks(blocks, metrics, 0, passport)


def _load_index(data: Store, split: str, runs: Sequence[TrainConfig], world: World) -> ShardIndex:
    """Load a split's index. Raises InputError unless its images have the shape of the runs'."""
    index = load_index(data, split, check=world.local_rank == 0)
    for run in runs:
        if index.shape != run.image_shape:
            raise InputError(
                f"{data}: got images of {index.shape} (channels, height, width), expected {run.image_shape}"
            )
        classes = run.model.num_classes
        if classes is not None and not 1 <= index.num_classes <= classes:
            raise InputError(f"{data}: got data of {index.num_classes} classes, expected 1 to the model's {classes}")
    return index


def track(trained: Trained, values: Sequence[Measured], run: Store, tracking: TrackingConfig) -> None:
    """Log values to the run's journal, and through it to MLflow; the run keeps its status there."""
    url, meta = trained.config.data.url, trained.meta
    dataset = {"url": url, "name": run_name(url), "digest": meta["dataset_digest"] or "unknown"}
    journal = Journal(run, tracking, uid=meta["uid"], config=record(trained.config), dataset=dataset)
    history = statuses(read_journal(journal.folder))
    line = journal.evaluation(trained.step, *logged(trained, values))
    if run.local is None:
        put_evaluation(run, line)
    journal.close(history[-1] if history else "FINISHED")


def logged(trained: Trained, values: Sequence[Measured]) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Return the metrics `eval/NAME`, `eval/NAME_se` if there is a standard error, and the training compute so far;
    and the passports by metric. Of several values with one name, the first is the model's.
    """
    metrics: dict[str, float] = {}
    passports: dict[str, dict[str, Any]] = {}
    if "train_flops" in trained.meta:
        metrics["eval/train_flops"] = float(trained.meta["train_flops"])
    for value in values:
        key = f"eval/{value.name}"
        if key in metrics:
            continue
        metrics[key], passports[key] = value.value, value.passport
        if value.standard_error is not None:
            metrics[f"{key}_se"] = value.standard_error
    return metrics, passports
