"""The training loop. `train` reads top to bottom: stop?, batch, step, EMA, log, checkpoint, samples, evaluation.

What a step computes depends on each sample's position in the run (one integer), never on the rank or microbatch that
processes it, so any number of workers trains the same run, except for dropout masks, which each rank draws itself.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm import tqdm

from pipeline.config import TrainConfig, horizon_steps
from pipeline.data.cache import Cache
from pipeline.data.order import finished_epochs, sum_digests
from pipeline.data.shards import ShardIndex, load_index
from pipeline.data.stream import Batch, stream
from pipeline.distributed.world import World
from pipeline.drawing import Recipe, draw
from pipeline.errors import InputError, UserError
from pipeline.evaluation.measure import EvaluationPlan, ImagePlan, logged, measure
from pipeline.evaluation.nll import NllPlan
from pipeline.hardware import device_name, peak_flops
from pipeline.images import grid_png
from pipeline.model import Trained, normalise_averages, with_weights
from pipeline.run.recorder import Recorder, load_newest, recording, unfinished
from pipeline.step import TrainState, learning_rate, train_step
from pipeline.storage.store import Store

DIGEST_EVERY = 100  # steps between comparisons of the ranks' timestep samplers


def train(config: TrainConfig, world: World, report: Callable[[int, dict[str, float]], None] | None = None) -> str:
    """Train, or resume the run at `config.out`, until the horizon ("finished") or a signal ("interrupted").

    Calls `report` with the step and its values at each log line, on every rank.
    Raises InputError for mistakes that the user can fix, StorageError, NonFinite, StaleAttempt.
    """
    # What there is: the data, the run's newest checkpoint, and how far it has to go.
    run = Store(config.out, config.storage)
    data = Store(config.data.url, config.storage)
    index = _load_data(config, data, world)
    state, meta = _resume(config, run, index, world)
    steps = horizon_steps(config, state.flops_per_image)
    start = f"resuming at step {state.step} of {steps}" if meta else f"starting, {steps} steps"
    devices = f"{world.size} x {device_name(world.device)}"
    world.say(f"{config.out}: {start}; launcher {world.launcher}, {devices}")
    if state.step > steps or (state.step == steps and not world.on_rank0(lambda: unfinished(run))):
        world.say(f"already complete at step {state.step}; extend --horizon to continue")
        return "finished"

    with recording(config, run, index, meta, world) as recorder:
        clock = Clock(state, peak=sum(world.gather(peak_flops(world.device, config.precision))))
        bar = tqdm(total=steps, initial=state.step, unit="step", disable=None if world.rank == 0 else True)
        batches = _batches(state, data, index, world)

        def due(every: int) -> bool:
            """Whether it is time for what happens every so many steps (0: never before the end) and at the end."""
            return state.step == steps or (every > 0 and state.step % every == 0)

        views = [("image", config.sample_every, partial(_draw_grid, state, recorder, world))]
        if config.eval_every:
            views.append(("evaluation", config.eval_every, partial(_evaluate, state, recorder, data, world)))

        def look(only_owed: bool = False) -> None:
            """Draw and evaluate if it is time; with `only_owed`, what an attempt that died has left to this one."""
            for kind, every, view in views:
                if due(every) and (not only_owed or world.broadcast_object(recorder.owes(kind, state.step))):
                    with _optional(kind, state, world):
                        view()

        with closing(bar), closing(batches):
            with clock.stopped():
                look(only_owed=True)
            while state.step < steps:
                # Is another attempt, a failed upload or a signal in the way?
                world.at(state.step)
                recorder.check()
                if world.stop_agreed():
                    _checkpoint(state, recorder, index, world)
                    world.only_on_rank0(partial(recorder.end, interrupted_at=state.step))
                    world.say(f"interrupted at step {state.step}, checkpointed; the same command resumes")
                    return "interrupted"

                # One step, on the next batch.
                batch = next(batches)
                train_step(state, batch, world)
                state.ema.update(state.params, state.step)
                state.count_samples(index, batch)
                bar.update()

                # Do the ranks still agree?
                if state.step % DIGEST_EVERY == 0 and state.sampler.needs_losses:
                    digests = world.gather(int(state.sampler.digest()))
                    assert len(set(digests)) == 1, f"step {state.step}: the timestep samplers differ: {digests}"

                # What a person looks at.
                if due(config.log_every):
                    state.means.check_finite(world)
                    values = state.means.read(world) | clock.read(state)
                    recorder.log(state.step, values)
                    _show(bar, state.step, steps, values, world)
                    if report:
                        report(state.step, values)

                # What the next start needs comes first: it does not depend on whether the rest succeeds.
                with clock.stopped():
                    if due(config.checkpoint_every):
                        _checkpoint(state, recorder, index, world)
                    look()
        world.only_on_rank0(recorder.end)
    world.say(f"finished at step {state.step}: {config.out}")
    return "finished"


def _load_data(config: TrainConfig, data: Store, world: World) -> ShardIndex:
    """Load the dataset's index. Raises InputError if dataset, model and evaluation do not fit together."""
    index = load_index(data, "train", check=world.local_rank == 0)
    if config.eval_every:  # report what cannot be measured before hours of training
        if "nll" in config.metrics:
            load_index(data, "val", check=world.local_rank == 0)
        if config.metrics != ("nll",) and index.num_classes < 2:
            raise InputError(
                f"--eval-metrics: got {config.eval_metrics}, expected nll: the data have no class labels, on which the"
                " network for image metrics is trained; use pipeline.evaluate for the others"
            )
    if index.shape != config.image_shape:
        raise InputError(
            f"--data.url {config.data.url}: its images are {index.shape} (channels, height, width), expected"
            f" {config.image_shape} by --model.in-channels and --model.image-size"
        )
    classes = config.model.num_classes
    if classes is not None and not index.num_classes:
        raise InputError(
            f"--model.num-classes: got {classes}, but the data have no labels; prepare them with class folders or"
            " --labels-from-names, or train an unconditional model"
        )
    if classes is not None and classes < index.num_classes:
        raise InputError(f"--model.num-classes: got {classes}, expected at least the {index.num_classes} of the data")
    if config.batch_size < world.size:
        raise InputError(f"--batch-size: got {config.batch_size}, expected at least one image for {world.size} ranks")
    return index


def _resume(config: TrainConfig, run: Store, index: ShardIndex, world: World) -> tuple[TrainState, dict[str, Any]]:
    """Build the state, as of the newest checkpoint if there is one; return the checkpoint's metadata with it."""
    meta, parts = world.only_on_rank0(lambda: load_newest(config, run, index)) or ({}, {})
    meta = world.broadcast_object(meta)
    state = TrainState(config, world)
    if meta:
        normalise_averages(parts, meta["step"], meta)
        state.load(meta["step"], parts, world)
        if world.rank == 0:
            state.epoch_digests = {int(epoch): digest for epoch, digest in meta["epoch_digests"].items()}
    return state, meta


def _batches(state: TrainState, data: Store, index: ShardIndex, world: World) -> Generator[Batch, None, None]:
    """Stream this rank's share of every batch from the run's position on."""
    config = state.config
    lo, hi = world.share(config.batch_size)
    return stream(
        data,
        index,
        seed=config.seed,
        position=state.images,
        batch_size=config.batch_size,
        lo=lo,
        hi=hi,
        window=config.data.window,
        workers=config.data.workers,
        cache=Cache.of(config.data),
    )


def _checkpoint(state: TrainState, recorder: Recorder, index: ShardIndex, world: World) -> None:
    """Save the state, which must be finite, and check that each finished epoch had each sample once."""
    state.means.check_finite(world)

    # Rank 0 collects what each rank has summed: metrics since the last log line, and epochs' digests.
    world.sum_(state.means.table)
    shares = world.gather(state.epoch_digests)
    if world.rank != 0:
        state.means.reset()
        state.epoch_digests = {}
    else:
        state.epoch_digests = sum_digests(shares)
        for epoch, digest in finished_epochs(state.epoch_digests, index, state.images):
            recorder.epoch(epoch, digest)
            del state.epoch_digests[epoch]

    progress = {"images": state.images, "train_flops": state.flops, "epoch_digests": state.epoch_digests}
    # The others wait for the upload of the checkpoint before.
    world.only_on_rank0(lambda: recorder.save(state.step, state.parts(), progress))


@contextmanager
def _optional(kind: str, state: TrainState, world: World) -> Iterator[None]:
    """Make a failure of something that training does not need a warning, after which the run goes on.

    Of several ranks only one may have failed, and is then out of step with the others: there the run ends. It resumes
    after this step, whose checkpoint, if due, is already taken.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if world.size > 1:
            raise
        tqdm.write(f"warning: step {state.step} has no {kind}: {error}")


@contextmanager
def _average(state: TrainState) -> Iterator[Trained]:
    """The model with the first moving average, in eval mode and not compiled: other shapes would recompile it."""
    config, rate = state.config, state.config.ema_rates[0]
    state.model.eval().fuse(False)
    try:
        model = with_weights(state.model, state.ema.weights(rate))
        yield Trained(config, state.step, {"train_flops": state.flops}, rate, model)
    finally:
        state.model.train().fuse(config.launch.compile)


def _draw_grid(state: TrainState, recorder: Recorder, world: World) -> None:
    """Draw a grid of samples with the first moving average."""
    config = state.config
    recipe = Recipe("ancestral", config.sample_steps, 0.0, config.seed)
    with _average(state) as trained:
        images = draw(trained, recipe, config.sample_count, world, batch_size=config.microbatch or 64)
    png = grid_png(images.numpy()) if images is not None else b""  # on rank 0
    world.only_on_rank0(lambda: recorder.image(state.step, "samples", png))


def _evaluate(state: TrainState, recorder: Recorder, data: Store, world: World) -> None:
    """Evaluate the first moving average as `python -m pipeline.evaluate` would."""
    config = state.config
    nll = NllPlan(config.eval_images)
    images = ImagePlan(config.eval_images, features="trained")
    if config.microbatch:  # limits memory here too
        nll = replace(nll, images_per_call=max(1, config.microbatch // (nll.draws + 1)))
        images = replace(images, batch_size=config.microbatch)
    plan = EvaluationPlan(config.metrics, nll=nll, images=images)
    with _average(state) as trained:
        measured = measure([trained], plan, data, world)
    if measured:  # on rank 0
        recorder.evaluation(state.step, *logged(trained, measured))
    for value in measured:
        tqdm.write(f"step {state.step} {value}")


class Clock:
    """Throughput since the last `read`, excluding everything but training."""

    def __init__(self, state: TrainState, peak: float) -> None:
        self.images, self.peak = state.images, peak
        self.start = time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began

    def read(self, state: TrainState) -> dict[str, float]:
        now = time.perf_counter()
        rate = (state.images - self.images) / (now - self.start)
        self.start, self.images = now, state.images
        return {
            "train/lr": learning_rate(state.config, state.step - 1),
            "train/images": float(state.images),
            "train/images_per_second": rate,
            "compute/train_flops": float(state.flops),
            "compute/log10_train_flops": math.log10(state.flops),
            "compute/utilization": rate * state.flops_per_image / self.peak,
        }


def _show(bar: Any, step: int, steps: int, values: dict[str, float], world: World) -> None:
    """Show values in the progress bar in a terminal, or as a plain line in a log file."""
    shown = {name: f"{values[f'train/{name}']:.4f}" for name in ("loss", "mse", "vb")} | {
        "grad": f"{values['train/grad_norm']:.3f}",
        "img/s": f"{values['train/images_per_second']:.0f}",
        "util": f"{values['compute/utilization']:.1%}",
    }
    if bar.disable:
        world.say(f"step {step}/{steps} " + " ".join(f"{name} {value}" for name, value in shown.items()))
    else:
        bar.set_postfix(shown)
