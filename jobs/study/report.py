"""A study's findings as text, figures and one self-contained HTML file."""

import base64
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from jobs.study.figures import draw_figures
from jobs.study.file import Study
from jobs.study.findings import Findings
from jobs.study.points import load_points, table
from pipeline.distributed.world import World, pick_device
from pipeline.errors import InputError, UserError
from pipeline.evaluation.measure import real_floor
from pipeline.evaluation.measured import Measured
from pipeline.run.mlflow import update_parent
from pipeline.storage.errors import StorageError

NOTE = """\
FLOPs count 2 per multiply-accumulate, forward and backward. Laws are fitted to log values with the Huber loss;
intervals are 95 %, bootstrapped over runs."""
STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
img{max-width:100%}figure{display:inline-block;margin:.5rem;max-width:28rem;vertical-align:top}
figcaption{color:#555;font-size:.85em}pre{background:#f6f6f6;padding:1rem;overflow-x:auto;font-size:.8em}"""


def write_report(study: Study, out: str | None) -> None:
    """Print the findings; unless `out` is None, write the report to that folder ("": the study's) and to MLflow."""
    # The findings of each metric; where one cannot be fitted, the others may.
    metrics: list[Findings] = []
    measured = load_points(study)
    floors = _floors(study) if measured else {}
    for name, points in measured.items():
        try:
            findings = Findings(points, floors.get(name))
            metrics.append(findings)
            print(findings.text() + "\n")
        except UserError as error:
            print(f"refused: {name}: {error}")
    if not metrics:
        raise InputError("the study has no points to fit; `run` it first")
    if out is None:
        return

    # The same as files.
    folder = Path(out) if out else (study.store.local or Path("runs") / study.name) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    fits = {findings.name: findings.record() for findings in metrics}
    (folder / "fit.json").write_text(json.dumps(fits, indent=1))
    (folder / "report.html").write_text(_page(study, metrics, folder))
    print(folder / "report.html")

    # And as a note and artifacts of the study's run in MLflow.
    text = "\n\n".join(findings.text() for findings in metrics)

    def send(client: Any, run_id: str) -> None:
        client.set_tag(run_id, "mlflow.note.content", f"```\n{text[:7900]}\n```")  # MLflow's limit is 8,000
        client.log_artifacts(run_id, str(folder), "report")
        client.set_terminated(run_id)

    if problem := update_parent(study.config.tracking.mlflow_uri, study.name, study.parent, send):
        print(f"warning: MLflow did not take the report: {problem}")


def _floors(study: Study) -> dict[str, Measured]:
    """Return the image metrics of real images by name; measured once and cached next to the points."""
    name = "floor.json"
    with suppress(FileNotFoundError):
        content = json.loads(study.store.read(name))
        if study.measures_like(content["evaluate"]):
            return {floor["name"]: Measured(**floor) for floor in content["floors"]}
    try:
        world = World(device=pick_device("auto", 0))
        floors = real_floor(study.evaluation.plan, study.config, study.evaluation_data, world)
    except (UserError, OSError) as error:
        print(f"warning: cannot measure the metrics of real images: {error}")
        return {}
    content = {"evaluate": study.evaluate, "floors": [vars(floor) for floor in floors]}
    with suppress(StorageError):  # a read-only study
        study.store.write(name, json.dumps(content).encode())
    return {floor.name: floor for floor in floors}


def _page(study: Study, metrics: Sequence[Findings], folder: Path) -> str:
    """Return the report as HTML with embedded figures; the figures are also written to the folder."""
    body = [_tag("h1", study.name), _tag("p", NOTE)]
    for findings in metrics:
        body.append(_tag("h2", findings.label))
        for name, (figure, caption) in draw_figures(findings).items():
            metric = re.sub(r"[^\w.-]", "_", findings.name)  # it may come from a file of the store
            path = folder / f"{metric}-{name}.png"
            figure.savefig(path, dpi=150)
            body.append(_figure(path.read_bytes(), caption))
        passport = "; ".join(f"{k} = {v}" for k, v in findings.points[0].passport.items())
        body.append(_tag("pre", findings.text()))
        body.append(_tag("figcaption", f"Passport of all points: {passport}."))
    body += [_tag("h2", "Samples"), *_samples(study)]
    body += [_tag("h2", "Points"), _tag("pre", _points(metrics))]
    head = f"<!doctype html><html lang=en><meta charset=utf-8>{_tag('title', study.name)}<style>{STYLE}</style>"
    return "\n".join([head, *body, "</html>\n"])


def _points(metrics: Sequence[Findings]) -> str:
    """Format all points as a table: the runs' costs, and a column for each metric."""
    header = ["run", "parameters", "images", "FLOPs", "budget"]
    rows: dict[tuple[str, float], list[str]] = {}
    for column, findings in enumerate(metrics, start=len(header)):
        for p in findings.points:
            cost = [p.run, f"{p.parameters:,.0f}", f"{p.images:,.0f}", f"{p.flops:.4e}", f"{p.budget:.3g}"]
            row = rows.setdefault((p.run, p.budget), cost + ["-"] * len(metrics))
            row[column] = f"{p.value:.4f}"
    return table([header + [findings.label for findings in metrics], *rows.values()])


def _samples(study: Study) -> list[str]:
    """Show the last sample grid of the longest run of each size."""
    figures: dict[str, str] = {}
    for run in sorted(study.runs, key=lambda run: -run.budgets[-1]):
        if run.value not in figures and (grids := sorted(run.store.list("samples/"))):
            figures[run.value] = _figure(run.store.read(grids[-1]), f"{study.axis} {run.value}")
    return [figures[value] for value in study.values if value in figures] or ["<p>No sample grids.</p>"]


def _figure(png: bytes, caption: str) -> str:
    image = f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<figure>{image}{_tag('figcaption', caption)}</figure>"


def _tag(name: str, text: str) -> str:
    """Put a text into an HTML element. All text comes through here, since labels and names come from files."""
    return f"<{name}>{escape(text)}</{name}>"
