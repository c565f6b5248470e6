"""A study's fits as text, figures and one self-contained HTML file."""

import base64
import html
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.study.file import Study
from jobs.study.points import load_points, table
from jobs.study.scaling import (
    PAPER,
    ComputePoint,
    HeldOut,
    Optimum,
    ScalingFit,
    check_points,
    compute_optimal,
    fit_frontier,
    fit_size_data,
    frontier,
    hold_out,
    isoflop,
    warnings,
)
from pipeline.distributed.world import World, pick_device
from pipeline.errors import InputError, UserError
from pipeline.evaluate import real_floor
from pipeline.evaluation.measured import Measured
from pipeline.masking import mask
from pipeline.run.mlflow import connect, find_or_create_run, tracking_uri
from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LAWS = ("L(C)", "L(N, D)")


FORMULA = {"L(C)": "L(C) = E + A·C^-a", "L(N, D)": "L(N, D) = E + A·N^-alpha + B·D^-beta"}


class Findings:
    """All results that the points of one metric support; `refused` gives the reason for each missing result."""

    def __init__(self, points: Sequence[ComputePoint], floor: Measured | None = None) -> None:
        check_points(points)
        self.points = points
        self.floor = floor
        """The value that real images get, for image metrics."""
        self.name = points[0].name
        self.label = {"nll": "bits/dim", "fid": "FID"}.get(self.name, self.name)
        self.refused: dict[str, str] = {}
        self.fits: dict[str, ScalingFit] = {}
        self.held: dict[str, HeldOut] = {}
        self.optima: dict[float, tuple[Optimum, Optimum, Optimum]] = {}
        for law, fit in zip(LAWS, (fit_frontier, fit_size_data), strict=True):
            self._try(law, self.fits, law, partial(fit, points))
            self._try(f"{law} held out", self.held, law, partial(hold_out, points, law))
        self.last = max(p.budget for p in points)
        if size_data := self.fits.get("L(N, D)"):
            for budget in (self.last, 10 * self.last):
                self._try("optimum", self.optima, budget, partial(compute_optimal, size_data, points, budget))
        self.warnings = [
            f"{law}: the points do not determine {name}: {reason}"
            for law, fit in self.fits.items()
            for name, reason in fit.undetermined.items()
        ] + warnings(points)

    def _try(self, name: str, results: dict[Any, Any], key: Any, make: Callable[[], Any]) -> None:
        try:
            results[key] = make()
        except UserError as error:
            self.refused[name] = str(error)

    def text(self) -> str:
        """Format all findings for a terminal."""
        runs = len({p.run for p in self.points})
        lines = [f"{self.label}: {len(self.points)} points of {runs} runs; 95 % intervals over runs"]
        for law, fit in self.fits.items():
            lines += ["", f"{FORMULA[law]}   ({fit.runs} runs, residuals {fit.residuals.std():.2%})"]
            reasons = fit.undetermined
            for name, (value, lower, upper) in fit.parameters().items():
                words = f"  undetermined: {reasons[name]}" if name in reasons else ""
                lines.append(f"  {name:6s} {value:<12.6g}  [{lower:.6g}, {upper:.6g}]{words}")
        if self.floor:
            f = self.floor
            lines += [
                "",
                f"real images instead of generated ones: {f.value:.4f} ({f.passport['real']}, n {f.passport['n']})",
            ]
        lines += ["", "held out: the largest budget, predicted from the other budgets"]
        for law, held in self.held.items():
            lines.append(
                f"  {law:8s} {held.budget:.3g} FLOPs: predicted {held.predicted:.4f} [{held.low:.4f}, {held.high:.4f}],"
                f" measured {held.measured:.4f}: {'inside' if held.covered else 'OUTSIDE'} the interval"
            )
        for budget, (best, low, high) in self.optima.items():
            lines += ["", f"compute-optimal at {budget:.3g} FLOPs, by L(N, D)"]
            lines += [
                f"  {name}  {getattr(best, field):.4g}   [{getattr(low, field):.4g}, {getattr(high, field):.4g}]"
                for name, field in (("weights", "parameters"), ("images ", "images"), ("value  ", "value"))
            ]
        lines += [f"refused: {name}: {reason}" for name, reason in self.refused.items()]
        lines += [f"warning: {line}" for line in self.warnings]
        return "\n".join(lines)

    def plain(self) -> dict[str, Any]:
        """Return all findings as JSON-serialisable data."""
        return {
            "points": [vars(p) for p in self.points],
            "real_images": self.floor and vars(self.floor),
            "fits": {law: fit.parameters() for law, fit in self.fits.items()},
            "held_out": {law: vars(held) | {"covered": held.covered} for law, held in self.held.items()},
            "compute_optimal": {f"{b:.6g}": [vars(o) for o in optima] for b, optima in self.optima.items()},
            "refused": self.refused,
            "warnings": self.warnings,
        }


def report(study: Study, out: str | None) -> None:
    """Print the findings; unless `out` is None, write the report to that folder ("": the study's) and to MLflow."""
    every: list[Findings] = []
    measured = load_points(study)
    floors = _floors(study) if measured else {}
    for name, points in measured.items():
        try:
            every.append(Findings(points, floors.get(name)))
            print(every[-1].text() + "\n")
        except UserError as error:  # the other metrics may still be fitted
            print(f"refused: {name}: {error}")
    if not every:
        raise InputError("the study has no points to fit; `run` it first")
    if out is None:
        return
    folder = Path(out) if out else (study.store.local or Path("runs") / study.name) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fit.json").write_text(json.dumps({findings.name: findings.plain() for findings in every}, indent=1))
    (folder / "report.html").write_text(page(study, every, folder))
    print(folder / "report.html")
    tracking = study.runs[0].config.tracking
    if tracking.uri != "none":
        try:
            client = connect(tracking_uri(tracking))
            run_id = find_or_create_run(client, study.name, study.parent, study.name, {})
            text = "\n\n".join(findings.text() for findings in every)
            client.set_tag(run_id, "mlflow.note.content", f"```\n{text[:7900]}\n```")  # MLflow's limit is 8,000
            client.log_artifacts(run_id, str(folder), "report")
            client.set_terminated(run_id)
        except Exception as error:  # a tracking server must not make the report fail
            print(f"warning: MLflow did not take the report: {mask(str(error))}")


def _floors(study: Study) -> dict[str, Measured]:
    """Return the image metrics of real images by name; measured once and cached next to the points."""
    name, options = "floor.json", study.evaluation
    try:
        content = json.loads(study.store.read(name))
    except FileNotFoundError:
        content = {}
    if content.get("evaluate") != list(study.evaluate):
        try:
            found = real_floor(options, study.runs[0].config, World(device=pick_device("auto", 0)))
        except (UserError, OSError) as error:
            print(f"warning: cannot measure the metrics of real images: {error}")
            return {}
        content = {"evaluate": study.evaluate, "floors": [vars(value) for value in found]}
        with suppress(StorageError):  # a read-only study
            study.store.write(name, json.dumps(content).encode())
    return {floor["name"]: Measured(**floor) for floor in content["floors"]}


def figures(findings: Findings) -> "dict[str, tuple[Figure, str]]":
    """Draw all figures; return each with its caption."""
    import matplotlib

    matplotlib.use("agg")
    drawn = {"frontier": _frontier(findings)}
    if isoflop(findings.points):
        drawn["isoflop"] = _isoflop(findings)
    if findings.fits:
        drawn["residuals"] = _residuals(findings)
    compute = findings.fits.get("L(C)")
    if compute and "E" not in compute.undetermined and findings.name in PAPER:
        drawn["papers"] = _papers(findings)
    return drawn


def _axes(title: str, x: str, y: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axis.grid(alpha=0.25, which="both")
    axis.yaxis.set_major_formatter("{x:.4g}")
    axis.yaxis.set_minor_formatter("{x:.4g}")
    return figure, axis


def _colors(sizes: Sequence[float]) -> dict[float, Any]:
    from matplotlib import colormaps

    return dict(zip(sizes, colormaps["viridis"](np.linspace(0, 0.9, len(sizes))), strict=True))


def _frontier(findings: Findings) -> "tuple[Figure, str]":
    points = findings.points
    figure, axis = _axes(f"{findings.label} over training compute", "training compute, FLOPs", findings.label)
    for size, color in _colors(sorted({p.parameters for p in points})).items():
        own = sorted((p for p in points if p.parameters == size), key=lambda p: p.flops)
        axis.plot([p.flops for p in own], [p.value for p in own], "o", color=color, ms=4, label=f"{size / 1e6:.3g}M")
    best = frontier(points)
    axis.plot([b.budget for b in best], [b.value for b in best], "o", ms=9, mfc="none", mec="black", label="frontier")
    if fit := findings.fits.get("L(C)"):
        grid = np.geomspace(best[0].budget / 1.5, findings.last * 4, 100)
        low, high = fit.band(grid)
        a = fit.parameters()["a"]
        axis.plot(grid, fit.predict(grid), color="crimson", lw=1.4, label=f"$E + A C^{{-a}}$, a = {a[0]:.3f}")
        axis.fill_between(grid, low, high, color="crimson", alpha=0.15, lw=0)
    if held := findings.held.get("L(C)"):
        bars = [[max(0, held.predicted - held.low)], [max(0, held.high - held.predicted)]]
        axis.errorbar(
            [held.budget * 1.12], [held.predicted], bars, fmt="s", ms=4, capsize=3, color="tab:blue", label="held out"
        )
    if findings.floor:
        axis.axhline(findings.floor.value, color="black", ls=":", lw=1.2, label="real images")
    axis.legend(fontsize=8, ncols=2)
    return figure, (
        "Points: runs, each measured at a budget; circles: the best size (mean over seeds) at each budget; line and"
        " band: the fit and its 95 % interval, bootstrapped over runs; square: the largest budget predicted without it,"
        " with the interval of a new measurement; dotted: the same number of real images."
    )


def _isoflop(findings: Findings) -> "tuple[Figure, str]":
    from matplotlib.ticker import LogLocator

    curves = isoflop(findings.points)
    figure, axis = _axes(f"{findings.label} over size, at equal compute", "weights", findings.label)
    for curve, color in zip(curves, _colors(range(len(curves))).values(), strict=True):
        own = [p for p in findings.points if p.budget == curve.budget]
        axis.plot([p.parameters for p in own], [p.value for p in own], "o", color=color, ms=4)
        grid = np.geomspace(min(p.parameters for p in own), max(p.parameters for p in own), 60)
        axis.plot(grid, curve(grid), color=color, lw=1.2, label=f"{curve.budget:.2g} FLOPs")
        if curve.parameters:
            axis.plot([curve.parameters], [curve(curve.parameters)], "*", color=color, ms=11, mec="black", mew=0.5)
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # within a decade of sizes, more labels would overlap
    for formatted in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        formatted(lambda n, _: f"{n / 1e6:.3g}M")
    axis.legend(fontsize=8, ncols=2)
    return figure, (
        "A parabola in log N for each budget; stars: minima within the sizes measured. A curve without a star shows"
        " no optimum."
    )


def _residuals(findings: Findings) -> "tuple[Figure, str]":
    figure, axis = _axes("Measured over fitted", "training compute, FLOPs", "log measured - log fitted")
    axis.set_yscale("linear")
    axis.yaxis.set_major_formatter("{x:+.1%}")
    for law, fit in findings.fits.items():
        axis.plot(
            [p.flops for p in fit.points],
            fit.residuals,
            "o" if law == "L(C)" else "x",
            ms=5,
            label=law + ", frontier" * (law == "L(C)"),
        )
    axis.axhline(0, color="black", lw=0.8)
    axis.legend(fontsize=8)
    return figure, "Residuals of the fitted laws: a trend over compute would mean that a law has the wrong form."


def _papers(findings: Findings) -> "tuple[Figure, str]":
    from matplotlib.ticker import NullFormatter

    fit, points = findings.fits["L(C)"], findings.points
    figure, axis = _axes(
        "Reducible part, with IDDPM's fit", "training compute, MACs", f"{findings.label} above the floor"
    )
    axis.yaxis.set_minor_formatter(NullFormatter())  # too many decades for labels between them
    macs = np.geomspace(min(p.budget for p in points), max(p.budget for p in points), 50) / 2
    e, _, _ = fit.parameters()["E"]
    a = fit.parameters()["a"]
    axis.plot(macs, fit.predict(2 * macs) - e, color="crimson", label=f"this study: a = {a[0]:.3f}")
    best = [b for b in frontier(points) if b.value > e]
    axis.plot([b.budget / 2 for b in best], [b.value - e for b in best], "o", color="crimson", ms=4)
    floor, k, exponent = PAPER[findings.name]
    there = np.geomspace(1e17, 2e20, 50)
    label = f"IDDPM, ImageNet 64: {floor:.2f} + ({k:g} C)^-{exponent}"
    axis.plot(there, (k * there) ** -exponent, "--", color="black", lw=1.2, label=label)
    axis.legend(fontsize=8)
    return figure, (
        "The part above the irreducible term over multiply-accumulates, which match the C printed in the paper."
        " Slopes are comparable, heights are not: the data differ, and the paper set its constants by hand."
    )


def page(study: Study, every: Sequence[Findings], folder: Path) -> str:
    """Return the report as HTML with embedded figures; the figures are also written to the folder."""
    sections: list[str] = []
    rows: dict[tuple[str, float], list[str]] = {}
    for column, findings in enumerate(every):
        sections.append(f"<h2>{findings.label}</h2>")
        for name, (figure, caption) in figures(findings).items():
            path = folder / f"{findings.name}-{name}.png"
            figure.savefig(path, dpi=150)
            sections.append(_figure(path.read_bytes(), caption))
        passport = "; ".join(f"{k} = {v}" for k, v in findings.points[0].passport.items())
        sections.append(f"<pre>{html.escape(findings.text())}</pre>")
        sections.append(f"<figcaption>Passport of all points: {html.escape(passport)}.</figcaption>")
        for p in findings.points:
            cost = [p.run, f"{p.parameters:,.0f}", f"{p.images:,.0f}", f"{p.flops:.4e}", f"{p.budget:.3g}"]
            rows.setdefault((p.run, p.budget), cost + ["-"] * len(every))[len(cost) + column] = f"{p.value:.4f}"
    header = ["run", "parameters", "images", "FLOPs", "budget", *(findings.label for findings in every)]
    return f"""<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(study.name)}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
img{{max-width:100%}}figure{{display:inline-block;margin:.5rem;max-width:28rem;vertical-align:top}}
figcaption{{color:#555;font-size:.85em}}pre{{background:#f6f6f6;padding:1rem;overflow-x:auto;font-size:.8em}}</style>
<h1>{html.escape(study.name)}</h1>
<p>FLOPs count 2 per multiply-accumulate, forward and backward. Laws are fitted to log values with the Huber loss;
intervals are 95 %, bootstrapped over runs.</p>
{"".join(sections)}
<h2>Samples</h2>{_samples(study)}
<h2>Points</h2><pre>{html.escape(table([header, *rows.values()]))}</pre></html>
"""


def _samples(study: Study) -> str:
    """Show the last sample grid of the longest run of each size."""
    shown = []
    for value in study.values:
        for run in sorted((r for r in study.runs if r.value == value), key=lambda r: -r.budgets[-1]):
            store = Store(run.config.out, run.config.storage)
            if grids := sorted(store.list("samples/")):
                shown.append(_figure(store.read(grids[-1]), f"{study.axis} {value}"))
                break
    return "".join(shown) or "<p>No sample grids.</p>"


def _figure(png: bytes, caption: str) -> str:
    image = f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
