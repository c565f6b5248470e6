"""A study's progress."""

import time
from dataclasses import dataclass
from typing import Any

from jobs.study.file import OfStudy, load_study
from jobs.study.points import load_points, table
from pipeline.run.journal import journal_of, statuses


@dataclass(frozen=True)
class Status(OfStudy):
    """Show each run's progress."""

    watch: float = 0.0
    """Refresh interval in seconds; 0: once."""


def status(options: Status) -> None:
    study = load_study(options.study)
    while True:
        measured = load_points(study)
        rows = [["run", "state", "step", "FLOPs", "of budget", "loss", "images/s", "seen", *measured]]
        for run in study.runs:
            records = journal_of(run.store)
            last: dict[str, Any] = next((r for r in reversed(records) if r["kind"] == "metrics"), {})
            told = statuses(records)
            state = (told[-1] or "running").lower() if told else "waiting"
            flops = last.get("metrics", {}).get("compute/train_flops", 0.0)
            rows.append([run.name, state, str(last.get("step", "")), f"{flops:.3g}", f"{flops / run.budgets[-1]:.0%}"])
            rows[-1] += [f"{last['metrics'][k]:.4g}" if last else "" for k in ("train/loss", "train/images_per_second")]
            rows[-1] += [f"{time.time() - records[-1]['time']:.0f} s ago" if records else ""]
            for points in measured.values():
                values = {p.budget: f"{p.value:.4f}" for p in points if p.run == run.name}
                rows[-1].append(" ".join(values.get(b, "-") for b in run.budgets))
        print(("\033[2J\033[H" if options.watch else "") + table(rows))
        done = max(map(len, measured.values()), default=0)
        print(f"{done} of {sum(len(run.budgets) for run in study.runs)} points measured", flush=True)
        if not options.watch:
            return
        time.sleep(options.watch)
