"""What a study costs, before anything starts."""

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from iddpm.bounds import Bound, check_bounds
from jobs.study.file import OfStudy, Run, Study, load_study
from jobs.study.points import table
from pipeline.config import horizon_steps
from pipeline.errors import InputError
from pipeline.run.journal import journal_of

if TYPE_CHECKING:  # this imports torch
    from pipeline.hardware import Cost

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
    utilisation: Annotated[float, Bound(lambda x: 0 < x <= 1, "a fraction of the peak, in (0, 1]")] | None = None
    """Fraction of the peak that training reaches; default: 0.3, or with `here` what this study's runs have reached."""
    price: float | None = None
    """USD per device-hour; default: a typical price of the hardware, 0 for `here`."""

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)
        if self.hardware.lower() not in (*HARDWARE, "here"):
            raise InputError(f"--hardware: got {self.hardware!r}, expected one of {', '.join(HARDWARE)}, here")


def count_sizes(study: Study) -> "dict[str, Cost]":
    """Count each value's cost. Raises InputError if two have equally many parameters: fits would treat them as one."""
    from pipeline.hardware import count

    sizes = {run.value: run.config for run in study.runs}
    costs = {value: count(config) for value, config in sizes.items()}
    if len({cost.parameters for cost in costs.values()}) < len(costs):
        shown = ", ".join(f"{value}: {cost.parameters:,}" for value, cost in costs.items())
        raise InputError(f"values: got networks with equal numbers of parameters ({shown}), expected different sizes")
    return costs


def print_plan(options: Plan) -> None:
    # What the study is, and how fast the hardware is.
    study = load_study(options.study)
    costs = count_sizes(study)
    speed, usd, source = _speed(options, study)
    images = _training_images(study)
    sizes = f"{len(study.runs)} runs of {len(study.values)} sizes ({study.axis})"
    print(f"{study.name}: {sizes}, at {len(study.budgets)} budgets")
    print(f"{options.hardware}, {source}: {speed / 1e12:.3g} TFLOP/s sustained")
    print("FLOPs count 2 per multiply-accumulate (MAC); training costs 3 forward passes; the papers count MACs.\n")

    # What each run costs, up to its last budget.
    rows = [["run", "lr", "parameters", "MACs fwd", "FLOPs train", "budget", "steps", "epochs", "memory"]]
    rows[0] += ["measuring", "hours", "USD"]
    training = measuring = 0.0
    unequal: dict[str, list[str]] = {}
    for run in study.runs:
        cost, budget = costs[run.value], run.budgets[-1]
        steps = horizon_steps(run.at(budget), cost.train)
        seen = steps * run.config.batch_size
        flops = float(seen * cost.train)
        points = float(len(run.budgets) * study.evaluation.plan.evaluations(run.config) * cost.forward)
        training += flops
        measuring += points
        hours = (flops + points) / speed / 3600
        epochs = f"{seen / images:.2f}" if images else "-"
        memory = f"{sum(cost.memory.values()) / 2**30:.2f} GiB"
        size = [f"{cost.parameters:,}", f"{cost.forward / 2e9:.4g}G", f"{cost.train / 1e9:.4g}G"]
        length = [f"{budget:.3g}", f"{steps:,}", epochs, memory]
        price = [f"{points:.2g}", f"{hours:.3g}", f"{hours * usd:.2f}"]
        rows.append([run.name, f"{run.config.lr:.3g}", *size, *length, *price])
        for problem in _unequal(run, horizon_steps(run.at(run.budgets[0]), cost.train), images):
            unequal.setdefault(problem, []).append(run.name)
    print(table(rows))
    hours = (training + measuring) / speed / 3600
    print(f"\n{training:.3e} FLOPs of training and {measuring:.2e} of measuring {study.evaluation.metrics}", end="")
    print(f": {hours:.3g} device-hours, {hours * usd:.2f} USD")

    # What will keep its points from being compared or fitted.
    for problem, names in unequal.items():
        print(f"warning: {problem}: {', '.join(names)}")
    if len(study.values) < 3:
        print(f"warning: an isoFLOP parabola needs 3 or more sizes; the study has {len(study.values)}")
    if len(study.budgets) < 5:
        print(f"warning: L(C) needs 4 budgets, and one more to hold out; the study has {len(study.budgets)}")
    if len(study.runs) < 6:
        print(f"warning: L(N, D) needs 6 or more runs, L(C) 4 at its frontier; the study has {len(study.runs)}")


def _unequal(run: Run, steps: int, images: int | None) -> list[str]:
    """Say why a run's first measurement, after `steps` steps, is not comparable with those of longer runs."""
    config, problems = run.config, []
    if images and steps * config.batch_size < images:
        problems.append("a horizon below one epoch")
    if config.warmup_steps > 0.1 * steps:
        problems.append(f"unequal schedules, a warm-up of {config.warmup_steps} steps is over a tenth of the run")
    memory = 1 / (1 - config.ema_rates[0])
    if memory > 0.2 * steps:
        problems.append(f"unequal schedules, a moving average over {memory:,.0f} steps is over a fifth of the run")
    return problems


def _speed(options: Plan, study: Study) -> tuple[float, float, str]:
    """Return sustained FLOP/s, price, and the source of these values."""
    from pipeline.distributed.world import World, pick_device
    from pipeline.hardware import peak_flops

    precision, hardware = study.config.precision, options.hardware.lower()
    utilisation, how = 0.3, "assumed"
    if hardware == "here":
        peak, price = peak_flops(World(device=pick_device("auto", 0)).device, precision), 0.0  # set up as for training
        # What runs have recorded is relative to this peak.
        records = [record for run in study.runs for record in journal_of(run.store)]
        measured = [r["metrics"]["compute/utilization"] for r in records if r["kind"] == "metrics"]
        if measured:
            utilisation, how = statistics.median(measured), "as measured"
    else:
        peaks, price = HARDWARE[hardware]
        if precision not in peaks:
            raise InputError(f"--hardware: the peak of {hardware} is not known for {precision}, expected {list(peaks)}")
        peak = peaks[precision]
    if options.utilisation:
        utilisation, how = options.utilisation, "as given"
    if options.price is not None:
        price = options.price
    return peak * utilisation, price, f"{precision} at {utilisation:.1%} of {peak / 1e12:.3g} TFLOP/s ({how})"


def _training_images(study: Study) -> int | None:
    from pipeline.data.shards import load_index

    try:
        return load_index(study.data, "train").num_samples
    except OSError:
        print(f"(no data at {study.config.data.url} yet: epochs are unknown)")
        return None
