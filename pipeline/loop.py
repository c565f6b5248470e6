"""The training loop. `train` reads top to bottom: stop?, batch, step, EMA, log, samples, evaluation, checkpoint.

What a step computes depends on each sample's position in the run (one integer), never on the rank or microbatch that
processes it, so any number of workers trains the same run, except for dropout masks, which each rank draws itself.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from pipeline.config import TrainConfig, horizon_steps
from pipeline.data.cache import Cache
from pipeline.data.shards import ShardIndex, load_index
from pipeline.data.stream import epoch_digests, expected_digest, stream
from pipeline.distributed.world import World
from pipeline.drawing import Recipe, draw
from pipeline.errors import InputError
from pipeline.evaluate import EvaluateConfig, log_measured, measure
from pipeline.hardware import device_name, peak_flops
from pipeline.images import grid_png
from pipeline.model import Trained, image_shape, with_weights
from pipeline.run.recorder import Recorder, load_newest, settle
from pipeline.step import TrainState, learning_rate, train_step
from pipeline.storage.store import Store

DIGEST_EVERY = 100  # steps between comparisons of the ranks' timestep samplers


def train(config: TrainConfig, world: World, report: Callable[[int, dict[str, float]], None] | None = None) -> str:
    """Train, or resume the run at `config.out`, until the horizon ("finished") or a signal ("interrupted").

    Calls `report` with the step and its values at each log line, on every rank.
    Raises InputError for mistakes that the user can fix, StorageError, NonFinite, StaleAttempt.
    """
    index = _data(config, world)
    found = world.only_on_rank0(lambda: load_newest(config, index))
    meta = world.broadcast_object(found[0] if found else None)
    state = TrainState(config, world)
    if meta:
        state.load(meta["step"], found[1] if found else None, world)
        found = None  # as large as the state
        if world.rank == 0:
            state.epoch_digests = {int(epoch): digest for epoch, digest in meta["epoch_digests"].items()}
    steps = horizon_steps(config, state.flops_per_image)
    world.say(
        f"{config.out}: {f'resuming at step {state.step} of {steps}' if meta else f'starting, {steps} steps'}"
        f"; launcher {world.launcher}, {world.size} x {device_name(world.device)}"
    )
    if state.step >= steps:
        if state.step == steps:
            world.only_on_rank0(lambda: settle(config, index, meta))
        world.say(f"already complete at step {state.step}; extend --horizon to continue")
        return "finished"

    with _recording(config, index, meta, world) as recorder:
        peak = sum(world.gather(peak_flops(world.device, config.precision)))
        clock = Clock(state, peak)
        bar = tqdm(total=steps, initial=state.step, unit="step", disable=None if world.rank == 0 else True)
        lo, hi = world.share(config.batch_size)
        batches = stream(
            Store(config.data.url, config.storage),
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

        with closing(bar), closing(batches):
            while state.step < steps:
                world.at(state.step)
                if recorder:
                    recorder.writer.check()
                if world.stop_agreed():
                    _checkpoint(state, recorder, index, world)
                    _end(recorder, world, state.step)
                    world.say(f"interrupted at step {state.step}, checkpointed; the same command resumes")
                    return "interrupted"

                batch = next(batches)
                train_step(state, batch, world)
                state.ema.update(state.params)
                for epoch, digest in epoch_digests(index, batch).items():
                    state.epoch_digests[epoch] = state.epoch_digests.get(epoch, 0) + digest
                bar.update()

                if state.step % DIGEST_EVERY == 0 and state.sampler.needs_losses:
                    digests = world.gather(int(state.sampler.digest()))
                    assert len(set(digests)) == 1, f"step {state.step}: the timestep samplers differ: {digests}"
                if state.step % config.log_every == 0 or state.step == steps:
                    state.metrics.check_finite(world)
                    values = state.metrics.read(world) | clock.read(state)
                    if recorder:
                        recorder.tracker.log(state.step, values)
                        _show(bar, state.step, steps, values)
                    if report:
                        report(state.step, values)
                if state.step == steps or (config.sample_every and state.step % config.sample_every == 0):
                    with clock.stopped():
                        _draw_grid(state, recorder, world)
                if config.eval_every and (state.step == steps or state.step % config.eval_every == 0):
                    with clock.stopped():
                        _evaluate(state, recorder, world)
                if state.step == steps or state.step % config.checkpoint_every == 0:
                    with clock.stopped():
                        _checkpoint(state, recorder, index, world)
        _end(recorder, world)
    world.say(f"finished at step {state.step}: {config.out}")
    return "finished"


def _data(config: TrainConfig, world: World) -> ShardIndex:
    """Load the dataset's index. Raises InputError if dataset, model and evaluation do not fit together."""
    data = Store(config.data.url, config.storage)
    index = load_index(data, "train")
    if config.eval_every:  # report what cannot be measured before hours of training
        if "nll" in config.metrics:
            load_index(data, "val")
        if config.metrics != ("nll",) and index.num_classes < 2:
            raise InputError(
                f"--eval-metrics: got {config.eval_metrics}, expected nll: the data have no class labels, on which the"
                " network for image metrics is trained; use pipeline.evaluate for the others"
            )
    model = config.model
    if index.shape != image_shape(config):
        raise InputError(
            f"--data.url {config.data.url}: its images are {index.shape} (channels, height, width), expected"
            f" {image_shape(config)} by --model.in-channels and --model.image-size"
        )
    if model.num_classes is not None and model.num_classes < index.num_classes:
        raise InputError(
            f"--model.num-classes: got {model.num_classes}, expected at least the {index.num_classes} of the data"
        )
    if config.batch_size < world.size:
        raise InputError(f"--batch-size: got {config.batch_size}, expected at least one image for {world.size} ranks")
    return index


@contextmanager
def _recording(config: TrainConfig, index: ShardIndex, meta: dict[str, Any], world: World) -> Iterator[Recorder | None]:
    """Open rank 0's recorder; the other ranks have none. Closes it on an error only."""
    recorder = world.only_on_rank0(lambda: Recorder(config, index, meta, world))
    try:
        yield recorder
    except BaseException as error:
        world.leaving()
        if recorder:
            recorder.fail(error)
        raise


def _end(recorder: Recorder | None, world: World, interrupted_at: int | None = None) -> None:
    def end() -> None:
        assert recorder, "rank 0 has one"
        recorder.end(interrupted_at)

    world.only_on_rank0(end)


def _checkpoint(state: TrainState, recorder: Recorder | None, index: ShardIndex, world: World) -> None:
    """Save the state, which must be finite, and check that each finished epoch had each sample once."""
    state.metrics.check_finite(world)
    # Rank 0 collects the others' sums: metrics since the last log line, and digests.
    world.sum_(state.metrics.table)
    shares = world.gather(state.epoch_digests)
    if not recorder:
        state.metrics.reset()
        state.epoch_digests = {}
        world.only_on_rank0(lambda: None)  # rank 0 may be waiting for an upload
        return
    epochs = sorted({epoch for share in shares for epoch in share})
    state.epoch_digests = {epoch: _int64(sum(share.get(epoch, 0) for share in shares)) for epoch in epochs}
    for epoch in [e for e in epochs if (e + 1) * index.num_samples <= state.images]:
        digest = state.epoch_digests.pop(epoch)
        expected = expected_digest(index, epoch)
        assert digest == expected, f"epoch {epoch} missed or repeated samples: got digest {digest}, expected {expected}"
        recorder.tracker.epoch(epoch, digest)
    meta = {
        "images": state.images,
        "train_flops": state.flops,
        "dataset_digest": index.digest,
        "epoch_digests": state.epoch_digests,
        "world_size": world.size,
        "torch": torch.__version__,
    }
    world.only_on_rank0(partial(recorder.save, state.step, state.parts(), meta))


def _int64(value: int) -> int:
    """Wrap a number as a sum of int64 would."""
    return (value + 2**63) % 2**64 - 2**63


@contextmanager
def _average(state: TrainState) -> Iterator[Trained]:
    """The model with the first moving average, in eval mode and not compiled: other shapes would recompile it."""
    config, rate = state.config, state.config.ema_rates[0]
    state.model.eval().fuse(False)
    model = with_weights(state.model, state.ema.weights(rate))
    yield Trained(config, state.step, {"train_flops": state.flops}, rate, model)
    state.model.train().fuse(state.config.launch.compile)


def _draw_grid(state: TrainState, recorder: Recorder | None, world: World) -> None:
    """Draw a grid of samples with the first moving average."""
    config = state.config
    recipe = Recipe("ancestral", config.sample_steps, 0.0, config.seed)
    with _average(state) as trained:
        images = draw(trained, recipe, config.sample_count, world, batch_size=config.microbatch or 64)

    def show() -> None:
        assert recorder
        assert images is not None, "rank 0 has them"
        recorder.image(state.step, "samples", grid_png(images))

    world.only_on_rank0(show)


def _evaluate(state: TrainState, recorder: Recorder | None, world: World) -> None:
    """Evaluate the first moving average as `python -m pipeline.evaluate` would."""
    config = state.config
    plan = EvaluateConfig(
        config.out,
        config.eval_metrics,
        images=config.eval_images,
        samples=config.eval_images,
        features="trained",
        storage=config.storage,
    )
    if config.microbatch:  # limits memory here too
        calls = max(1, config.microbatch // (plan.draws + 1))
        plan = replace(plan, images_per_call=calls, batch_size=config.microbatch)
    with _average(state) as trained:
        found = measure([trained], plan, world, keep=False)
    if recorder:
        log_measured(recorder.tracker, trained, found)
        for value in found:
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


def _show(bar: Any, step: int, steps: int, values: dict[str, float]) -> None:
    """Show values in the progress bar in a terminal, or as a plain line in a log file."""
    shown = {
        "loss": f"{values['train/loss']:.4f}",
        "mse": f"{values['train/mse']:.4f}",
        "vb": f"{values['train/vb']:.4f}",
        "grad": f"{values['train/grad_norm']:.3f}",
        "img/s": f"{values['train/images_per_second']:.0f}",
        "util": f"{values['compute/utilization']:.1%}",
    }
    if bar.disable:
        print(f"step {step}/{steps} " + " ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    else:
        bar.set_postfix(shown)
