"""Draw the learning curves of training runs from their journals."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import errors_exit
from pipeline.errors import InputError
from pipeline.run.journal import journal_of, run_name
from pipeline.storage.store import Store

PANELS = {
    "train/loss": "loss",
    "train/mse": "$L_{simple}$",
    "train/vb": "$L_{vlb}$ term",
    "train/grad_norm": "gradient norm",
}


def draw(runs: Sequence[str], out: Path) -> None:
    """Plot the loss, its parts and the gradient norm over images seen, one panel each with one line per run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(6.4, 5.6), layout="constrained")
    axes = grid.flatten()
    for run in runs:
        rows = [r["metrics"] for r in journal_of(Store(run)) if r["kind"] == "metrics"]
        if not rows:
            raise InputError(f"{run}: no journal with metrics; expected the --out of a training run")
        for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
            points = [(row["train/images"], row[name]) for row in rows if row[name] > 0]
            axis.plot(*zip(*points, strict=True), label=run_name(run), linewidth=1.2)
            axis.set(title=title, xlabel="images", xscale="log", yscale="log")
            axis.grid(alpha=0.3, which="both")
    if len(runs) > 1:
        axes[0].legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m jobs.curves", description=__doc__)
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("runs", nargs="+", help="training runs: their --out, folders or URLs")
    args = parser.parse_args()
    with errors_exit():
        draw(args.runs, args.out)
