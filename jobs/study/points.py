"""What a study has so far: its points, one file for each run and budget, and its runs' progress."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from jobs.study.file import OfStudy, Run, Study, load_study
from pipeline.config import check_same_run, horizon_steps
from pipeline.run.journal import journal_of, statuses

if TYPE_CHECKING:  # this imports torch and scipy
    from jobs.study.scaling import ComputePoint


@dataclass(frozen=True)
class Status(OfStudy):
    """Show each run's progress."""

    watch: float = 0.0
    """Refresh interval in seconds; 0: once."""


def print_status(options: Status) -> None:
    study = load_study(options.study)
    while True:
        points = load_points(study)
        rows = [["run", "state", "step", "FLOPs", "of budget", "loss", "images/s", "seen", *points]]
        for run in study.runs:
            rows.append(_progress(run))
            for measured in points.values():
                values = {p.budget: f"{p.value:.4f}" for p in measured if p.run == run.name}
                rows[-1].append(" ".join(values.get(budget, "-") for budget in run.budgets))
        done = max(map(len, points.values()), default=0)
        print(("\033[2J\033[H" if options.watch else "") + table(rows))
        print(f"{done} of {sum(len(run.budgets) for run in study.runs)} points measured", flush=True)
        if not options.watch:
            return
        time.sleep(options.watch)


def _progress(run: Run) -> list[str]:
    records = journal_of(run.store)
    states = statuses(records)
    state = (states[-1] or "running").lower() if states else "waiting"
    seen = f"{time.time() - records[-1]['time']:.0f} s ago" if records else ""
    logged = [record for record in records if record["kind"] == "metrics"]
    if not logged:
        return [run.name, state, "", "0", "0%", "", "", seen]
    step, metrics = logged[-1]["step"], logged[-1]["metrics"]
    flops = metrics["compute/train_flops"]
    done = [str(step), f"{flops:.3g}", f"{flops / run.budgets[-1]:.0%}"]
    return [run.name, state, *done, f"{metrics['train/loss']:.4g}", f"{metrics['train/images_per_second']:.4g}", seen]


def missing(study: Study, run: Run) -> list[float]:
    """Return the budgets at which the run is not yet measured as the study says.

    Raises InputError if the measured run had another configuration.
    """
    return [budget for budget in run.budgets if not _read_point(study, run, budget)]


def load_points(study: Study) -> "dict[str, list[ComputePoint]]":
    """Return the measured points of the study's runs, by metric."""
    from jobs.study.scaling import ComputePoint

    points: dict[str, list[ComputePoint]] = {}
    for run in study.runs:
        for budget in run.budgets:
            for point in _read_point(study, run, budget):
                points.setdefault(point["name"], []).append(ComputePoint(**point))
    return points


def _read_point(study: Study, run: Run, budget: float) -> list[dict[str, Any]]:
    """Return a run's values at a budget, one for each metric; none unless it was measured as the study says.

    Raises InputError if the measured run had another configuration.
    """
    try:
        content = json.loads(study.store.read(run.point(budget)))
    except FileNotFoundError:
        return []
    check_same_run(content["config"], run.at(budget))
    return content["points"] if study.measures_like(content["evaluate"]) else []


def measure_point(study: Study, run: Run, budget: float) -> None:
    """Measure a run that has reached its budget; write the point to the study's store, the journal and MLflow."""
    from iddpm.flops import count_parameters, train_flops
    from jobs.study.scaling import ComputePoint
    from pipeline.distributed.world import World, pick_device
    from pipeline.evaluation import measure as evaluation
    from pipeline.model import load_trained

    config, options = run.config, study.evaluation
    world = World(device=pick_device(config.launch.device, 0))
    step = horizon_steps(run.at(budget), train_flops(config.model, config.out_channels))
    trained = load_trained(run.store, world, options.ema_rate, step)

    # What the values depend on beside their size and budget: only equal passports are compared.
    common = {"train_data": trained.meta["dataset_digest"], "batch_size": config.batch_size}
    common |= {"diffusion": asdict(config.diffusion), "precision": config.precision}
    data = study.evaluation_data
    values = evaluation.measure([trained], options.plan, data, world, run.store, lambda nll: print(nll.summary()))
    values = [replace(value, passport=value.passport | common) for value in values]
    evaluation.track(trained, values, run.store, config.tracking)

    parameters = count_parameters(config.model, config.out_channels)
    images, flops = trained.meta["images"], trained.meta["train_flops"]
    cost = {"run": run.name, "parameters": parameters, "images": images, "flops": flops, "budget": budget}
    points = [asdict(ComputePoint(**vars(value), **cost)) for value in values]
    content = {"points": points, "evaluate": study.evaluate, "config": trained.meta["config"]}
    study.store.write(run.point(budget), json.dumps(content, indent=1).encode())
    for value in values:
        print(f"{run.name}: {flops:.4e} FLOPs, {value}", flush=True)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a table: the first column left-aligned, the others right-aligned."""
    columns: list[list[str]] = []
    for cells in zip(*rows, strict=True):
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if columns else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
