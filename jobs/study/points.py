"""A study's measurements, one file for each run and budget."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pipeline.config import check_same_run, horizon_steps

if TYPE_CHECKING:  # these import torch and scipy
    from jobs.study.scaling import ComputePoint
from jobs.study.file import Run, Study


def missing(study: Study, run: Run) -> list[float]:
    """Return the budgets at which the run is not yet measured as the study says.

    Raises InputError if the measured run had another configuration.
    """
    return [budget for budget in run.budgets if not _point(study, run, budget)]


def _point(study: Study, run: Run, budget: float) -> dict[str, Any] | None:
    """Return a run's measurement at a budget, if it was made as the study says.

    Raises InputError if the measured run had another configuration.
    """
    try:
        content: dict[str, Any] = json.loads(study.store.read(run.point(budget)))
    except FileNotFoundError:
        return None
    check_same_run(content["config"], run.at(budget))
    return content if content["evaluate"] == list(study.evaluate) else None


def measure(study: Study, run: Run, budget: float) -> None:
    """Measure a run that has reached its budget; write the point to the study's store, the journal and MLflow."""
    from iddpm.flops import count_parameters, train_flops
    from jobs.study.scaling import ComputePoint
    from pipeline import evaluate
    from pipeline.distributed.world import World, pick_device
    from pipeline.model import load_trained

    config = run.config
    options = study.evaluation
    world = World(device=pick_device(config.launch.device, 0))
    last = horizon_steps(run.at(budget), train_flops(config.model, config.out_channels))
    trained = load_trained(run.store, world, options.ema_rate, last)
    flops = trained.meta["train_flops"]
    common = {"train_data": trained.meta["dataset_digest"], "batch_size": config.batch_size}
    common |= {"diffusion": asdict(config.diffusion), "precision": config.precision}
    found = evaluate.measure([trained], options, study.evaluation_data, world, run.store)
    found = [replace(value, passport=value.passport | common) for value in found]
    evaluate.track(trained, found, run.store, config.tracking)
    spent = {
        "run": run.name,
        "parameters": count_parameters(config.model, config.out_channels),
        "images": trained.meta["images"],
        "flops": flops,
        "budget": budget,
    }
    points = [asdict(ComputePoint(**vars(value), **spent)) for value in found]
    content = {"points": points, "evaluate": study.evaluate, "config": trained.meta["config"]}
    study.store.write(run.point(budget), json.dumps(content, indent=1).encode())
    for value in found:
        print(f"{run.name}: {flops:.4e} FLOPs, {value}", flush=True)


def load_points(study: Study) -> "dict[str, list[ComputePoint]]":
    """Return the measured points of the study's runs, by metric."""
    from jobs.study.scaling import ComputePoint

    found: dict[str, list[ComputePoint]] = {}
    for run in study.runs:
        for budget in run.budgets:
            for point in (_point(study, run, budget) or {"points": []})["points"]:
                found.setdefault(point["name"], []).append(ComputePoint(**point))
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a table: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
