"""What a study costs, before anything starts."""

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import horizon_steps
from pipeline.run.journal import journal_of

if TYPE_CHECKING:  # these import torch and scipy
    from pipeline.hardware import Cost
from jobs.study.file import OfStudy, Run, Study, load_study
from jobs.study.points import table
from pipeline.errors import InputError

HARDWARE: dict[str, tuple[dict[str, float], float]] = {
    "a100": ({"bf16": 312e12, "fp32": 19.5e12}, 1.8),
    "h100": ({"bf16": 989e12, "fp32": 67e12}, 3.0),
    "h200": ({"bf16": 989e12, "fp32": 67e12}, 3.8),
}
"""Peak dense FLOP/s by precision, from the vendor's data sheets, and a typical price in USD per hour."""


@dataclass(frozen=True)
class Plan(OfStudy):
    """Print the study's cost without training: each run's size, FLOPs, steps, memory, hours and price."""

    hardware: str = "h100"
    """Device: a100, h100, h200, or `here` to measure this machine's peak."""
    utilisation: float | None = None
    """Fraction of the peak that training reaches; default: 0.3, or with `here` what this study's runs have reached."""
    price: float | None = None
    """USD per device-hour; default: a typical price of the hardware, 0 for `here`."""

    def __post_init__(self) -> None:
        if self.hardware not in (*HARDWARE, "here"):
            raise InputError(f"--hardware: got {self.hardware!r}, expected one of {', '.join(HARDWARE)}, here")
        if self.utilisation is not None and not 0 < self.utilisation <= 1:
            raise InputError(f"--utilisation: got {self.utilisation}, expected a fraction of the peak, in (0, 1]")


def count_sizes(study: Study) -> "dict[str, Cost]":
    """Count each value's cost. Raises InputError if two have equally many parameters: fits would treat them as one."""
    from pipeline.hardware import count

    costs = {value: count(next(r for r in study.runs if r.value == value).config) for value in study.values}
    if len({cost.parameters for cost in costs.values()}) < len(costs):
        shown = ", ".join(f"{value}: {cost.parameters:,}" for value, cost in costs.items())
        raise InputError(f"values: got networks with equal numbers of parameters ({shown}), expected different sizes")
    return costs


def plan(options: Plan) -> None:
    study = load_study(options.study)
    costs = count_sizes(study)
    peak, price, source = _speed(options, study)
    images = _training_images(study)
    sizes = f"{len(study.runs)} runs of {len(study.values)} sizes ({study.axis})"
    print(f"{study.name}: {sizes}, at {len(study.budgets)} budgets")
    print(f"{options.hardware}, {source}: {peak / 1e12:.3g} TFLOP/s sustained")
    print("FLOPs count 2 per multiply-accumulate (MAC); training costs 3 forward passes; the papers count MACs.\n")
    rows = [["run", "lr", "parameters", "MACs fwd", "FLOPs train", "budget", "steps", "epochs", "memory"]]
    rows[0] += ["measuring", "hours", "USD"]
    training = measuring = 0.0
    warned: dict[str, list[str]] = {}
    for run in study.runs:
        cost, budget = costs[run.value], run.budgets[-1]
        steps = horizon_steps(run.at(budget), cost.train)
        flops = float(steps * run.config.batch_size * cost.train)
        epochs = f"{steps * run.config.batch_size / images:.2f}" if images else "-"
        points = float(len(run.budgets) * study.evaluation.evaluations(run.config) * cost.forward)
        training, measuring = training + flops, measuring + points
        hours = (flops + points) / peak / 3600
        rows.append([run.name, f"{run.config.lr:.3g}", f"{cost.parameters:,}", f"{cost.forward / 2e9:.4g}G"])
        rows[-1] += [f"{cost.train / 1e9:.4g}G", f"{budget:.3g}", f"{steps:,}", epochs]
        memory = sum(cost.memory.values()) / 2**30
        rows[-1] += [f"{memory:.2f} GiB", f"{points:.2g}", f"{hours:.3g}", f"{hours * price:.2f}"]
        first = horizon_steps(run.at(run.budgets[0]), cost.train)
        for line in _unequal(run, first, images):
            warned.setdefault(line, []).append(run.name)
    print(table(rows))
    hours = (training + measuring) / peak / 3600
    print(f"\n{training:.3e} FLOPs of training and {measuring:.2e} of measuring {study.evaluation.metrics}", end="")
    print(f": {hours:.3g} device-hours, {hours * price:.2f} USD")
    if len(study.values) < 3:
        warned["an isoFLOP parabola needs 3 or more"] = [f"{len(study.values)} sizes"]
    if len(study.budgets) < 5:
        warned["L(C) needs 4, and one more to hold out"] = [f"{len(study.budgets)} budgets"]
    if len(study.runs) < 6:
        warned["L(N, D) needs 6 or more, L(C) 4 at its frontier"] = [f"{len(study.runs)} runs"]
    for line, names in warned.items():
        print(f"warning: {line}: {', '.join(names)}")


def _unequal(run: Run, steps: int, images: int | None) -> list[str]:
    """Say why a run's first measurement, after `steps` steps, is not comparable with those of longer runs."""
    config, said = run.config, []
    if images and steps * config.batch_size < images:
        said.append("a horizon below one epoch")
    if config.warmup_steps > 0.1 * steps:
        said.append(f"unequal schedules, a warm-up of {config.warmup_steps} steps is over a tenth of the run")
    if (memory := 1 / (1 - config.ema_rates[0])) > 0.2 * steps:
        said.append(f"unequal schedules, a moving average over {memory:,.0f} steps is over a fifth of the run")
    return said


def _speed(options: Plan, study: Study) -> tuple[float, float, str]:
    """Return sustained FLOP/s, price, and the source of these values."""
    from pipeline.distributed.world import World, pick_device
    from pipeline.hardware import peak_flops

    precision = study.runs[0].config.precision
    price = options.price
    if options.hardware == "here":
        peak = peak_flops(World(device=pick_device("auto", 0)).device, precision)  # set up as for training
    else:
        peaks, usual = HARDWARE[options.hardware]
        if precision not in peaks:
            raise InputError(
                f"--hardware: the peak of {options.hardware} is not known for {precision}, expected {list(peaks)}"
            )
        peak, price = peaks[precision], usual if price is None else price
    runs = study.runs if options.hardware == "here" else []  # utilisation is relative to the peak measured there
    journals = (journal_of(run.store) for run in runs)
    seen = [r["metrics"]["compute/utilization"] for journal in journals for r in journal if r["kind"] == "metrics"]
    utilisation = options.utilisation or (statistics.median(seen) if seen else 0.3)
    how = "as given" if options.utilisation else "as measured" if seen else "assumed"
    return peak * utilisation, price or 0.0, f"{precision} at {utilisation:.1%} of {peak / 1e12:.3g} TFLOP/s ({how})"


def _training_images(study: Study) -> int | None:
    from pipeline.data.shards import load_index

    config = study.runs[0].config
    try:
        return load_index(study.data, "train").num_samples
    except OSError:
        print(f"(no data at {config.data.url} yet: epochs are unknown)")
        return None
