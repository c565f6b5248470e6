"""The figures of a study's report, each with a caption of what is in it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jobs.study.findings import Findings
from jobs.study.scaling import PAPER, frontier, isoflop


def draw_figures(findings: Findings) -> dict[str, tuple[Any, str]]:
    """Draw all figures that the findings allow; return each, a matplotlib Figure, with its caption."""
    drawings = {"frontier": _frontier}
    if isoflop(findings.points):
        drawings["isoflop"] = _isoflop
    if findings.fits:
        drawings["residuals"] = _residuals
    compute = findings.fits.get("L(C)")
    if compute and "E" not in compute.undetermined and findings.name in PAPER:
        drawings["papers"] = _papers
    return {name: _draw(drawing, findings) for name, drawing in drawings.items()}


def _draw(drawing: Callable[[Any, Findings], str], findings: Findings) -> tuple[Any, str]:
    """Call `drawing` with logarithmic axes; it returns the caption."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.set(xscale="log", yscale="log")
    axis.grid(alpha=0.25, which="both")
    axis.yaxis.set_major_formatter("{x:.4g}")
    axis.yaxis.set_minor_formatter("{x:.4g}")
    return figure, drawing(axis, findings)


def _colors(count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.9, count))


def _frontier(axis: Any, findings: Findings) -> str:
    points, best = findings.points, frontier(findings.points)
    title = f"{findings.label} over training compute"
    axis.set(title=title, xlabel="training compute, FLOPs", ylabel=findings.label)
    sizes = sorted({p.parameters for p in points})
    for size, color in zip(sizes, _colors(len(sizes)), strict=True):
        measured = [(p.flops, p.value) for p in points if p.parameters == size]
        axis.plot(*zip(*measured, strict=True), "o", color=color, ms=4, label=f"{size / 1e6:.3g}M")
    axis.plot([b.budget for b in best], [b.value for b in best], "o", ms=9, mfc="none", mec="black", label="frontier")
    caption = ["Points: runs, each measured at a budget; circles: the best size (mean over seeds) at each budget"]
    if fit := findings.fits.get("L(C)"):
        grid = np.geomspace(best[0].budget / 1.5, findings.last * 4, 100)
        exponent, _, _ = fit.parameters()["a"]
        axis.plot(grid, fit.predict(grid), color="crimson", lw=1.4, label=f"$E + A C^{{-a}}$, a = {exponent:.3f}")
        axis.fill_between(grid, *fit.band(grid), color="crimson", alpha=0.15, lw=0)
        caption.append("line and band: the fit and its 95 % interval, bootstrapped over runs")
    if held := findings.held.get("L(C)"):
        bars = [[max(0, held.predicted - held.low)], [max(0, held.high - held.predicted)]]
        x, y = [held.budget * 1.12], [held.predicted]
        axis.errorbar(x, y, bars, fmt="s", ms=4, capsize=3, color="tab:blue", label="held out")
        caption.append("square: the largest budget predicted without it, with the interval of a new measurement")
    if findings.floor:
        axis.axhline(findings.floor.value, color="black", ls=":", lw=1.2, label="real images")
        caption.append("dotted: the same number of real images")
    axis.legend(fontsize=8, ncols=2)
    return "; ".join(caption) + "."


def _isoflop(axis: Any, findings: Findings) -> str:
    from matplotlib.ticker import LogLocator

    curves = isoflop(findings.points)
    axis.set(title=f"{findings.label} over size, at equal compute", xlabel="weights", ylabel=findings.label)
    for curve, color in zip(curves, _colors(len(curves)), strict=True):
        points = [p for p in findings.points if p.budget == curve.budget]
        sizes = [p.parameters for p in points]
        grid = np.geomspace(min(sizes), max(sizes), 60)
        axis.plot(sizes, [p.value for p in points], "o", color=color, ms=4)
        axis.plot(grid, curve(grid), color=color, lw=1.2, label=f"{curve.budget:.2g} FLOPs")
        if curve.parameters:
            axis.plot([curve.parameters], [curve(curve.parameters)], "*", color=color, ms=11, mec="black", mew=0.5)
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # within a decade of sizes, more labels would overlap
    for set_formatter in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        set_formatter(lambda n, _: f"{n / 1e6:.3g}M")
    axis.legend(fontsize=8, ncols=2)
    caption = "A parabola in log N for each budget"
    if any(curve.parameters for curve in curves):
        caption += "; stars: minima within the sizes measured"
    if not all(curve.parameters for curve in curves):
        caption += ". A curve without a star shows no optimum"
    return caption + "."


def _residuals(axis: Any, findings: Findings) -> str:
    axis.set(title="Measured over fitted", xlabel="training compute, FLOPs", ylabel="log measured - log fitted")
    axis.set_yscale("linear")
    axis.yaxis.set_major_formatter("{x:+.1%}")
    styles = {"L(C)": ("o", "L(C), frontier"), "L(N, D)": ("x", "L(N, D)")}
    for law, fit in findings.fits.items():
        marker, label = styles[law]
        axis.plot([p.flops for p in fit.points], fit.residuals, marker, ms=5, label=label)
    axis.axhline(0, color="black", lw=0.8)
    axis.legend(fontsize=8)
    return "Residuals of the fitted laws: a trend over compute would mean that a law has the wrong form."


def _papers(axis: Any, findings: Findings) -> str:
    from matplotlib.ticker import NullFormatter

    fit, points = findings.fits["L(C)"], findings.points
    title, ylabel = "Reducible part, with IDDPM's fit", f"{findings.label} above the floor"
    axis.set(title=title, xlabel="training compute, MACs", ylabel=ylabel)
    axis.yaxis.set_minor_formatter(NullFormatter())  # too many decades for labels between them

    (e, _, _), (a, _, _) = (fit.parameters()[name] for name in ("E", "a"))
    budgets = [p.budget for p in points]
    macs = np.geomspace(min(budgets), max(budgets), 50) / 2
    axis.plot(macs, fit.predict(2 * macs) - e, color="crimson", label=f"this study: a = {a:.3f}")
    best = [b for b in frontier(points) if b.value > e]
    axis.plot([b.budget / 2 for b in best], [b.value - e for b in best], "o", color="crimson", ms=4)

    floor, k, exponent = PAPER[findings.name]
    macs = np.geomspace(1e17, 2e20, 50)
    label = f"IDDPM, ImageNet 64: {floor:.2f} + ({k:g} C)^-{exponent}"
    axis.plot(macs, (k * macs) ** -exponent, "--", color="black", lw=1.2, label=label)
    axis.legend(fontsize=8)
    return (
        "The part above the irreducible term over multiply-accumulates, which match the C printed in the paper."
        " Slopes are comparable, heights are not: the data differ, and the paper set its constants by hand."
    )
