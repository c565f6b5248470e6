"""What the points of a study show: laws, their predictions and optima, or why there are none."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jobs.study import scaling
from jobs.study.scaling import ComputePoint
from pipeline.errors import UserError
from pipeline.evaluation.measured import Measured

FORMULA = {"L(C)": "L(C) = E + A·C^-a", "L(N, D)": "L(N, D) = E + A·N^-alpha + B·D^-beta"}


class Findings:
    """All results that the points of one metric support; `refused` gives the reason for each missing result."""

    def __init__(self, points: Sequence[ComputePoint], floor: Measured | None = None) -> None:
        scaling.check_points(points)
        self.points = points
        self.floor = floor
        """The value that real images get, for image metrics."""
        self.name = points[0].name
        self.label = {"nll": "bits/dim", "fid": "FID"}.get(self.name, self.name)
        self.last = max(point.budget for point in points)
        self.refused: dict[str, str] = {}

        # Each law, and how well it predicts the largest budget from the others.
        self.fits: dict[str, scaling.ScalingFit] = {}
        self.held: dict[str, scaling.HeldOut] = {}
        for law, fit in (("L(C)", scaling.fit_frontier), ("L(N, D)", scaling.fit_size_data)):
            self._try(law, self.fits, law, partial(fit, points))
            self._try(f"{law} held out", self.held, law, partial(scaling.hold_out, points, law))

        # The best size at the largest budget and beyond.
        self.optima: dict[float, tuple[scaling.Optimum, scaling.Optimum, scaling.Optimum]] = {}
        if size_data := self.fits.get("L(N, D)"):
            for budget in (self.last, 10 * self.last):
                self._try("optimum", self.optima, budget, partial(scaling.compute_optimal, size_data, points, budget))

        # What the points leave open.
        self.warnings = [
            f"{law}: the points do not determine {name}: {reason}"
            for law, fit in self.fits.items()
            for name, reason in fit.undetermined.items()
        ] + scaling.warnings(points)

    def _try(self, name: str, results: dict[Any, Any], key: Any, make: Callable[[], Any]) -> None:
        try:
            results[key] = make()
        except UserError as error:
            self.refused[name] = str(error)

    def text(self) -> str:
        """Format all findings for a terminal."""
        runs = len({point.run for point in self.points})
        lines = [f"{self.label}: {len(self.points)} points of {runs} runs; 95 % intervals over runs"]
        for law, fit in self.fits.items():
            lines += ["", f"{FORMULA[law]}   ({fit.runs} runs, residuals {fit.residuals.std():.2%})"]
            for name, (value, low, high) in fit.parameters().items():
                reason = fit.undetermined.get(name)
                remark = f"  undetermined: {reason}" if reason else ""
                lines.append(f"  {name:6s} {value:<12.6g}  [{low:.6g}, {high:.6g}]{remark}")
        if self.floor:
            value, passport = self.floor.value, self.floor.passport
            images = f"{passport['real']}, n {passport['n']}"
            lines += ["", f"real images instead of generated ones: {value:.4f} ({images})"]
        lines += ["", "held out: the largest budget, predicted from the other budgets"]
        for law, held in self.held.items():
            lines.append(
                f"  {law:8s} {held.budget:.3g} FLOPs: predicted {held.predicted:.4f} [{held.low:.4f}, {held.high:.4f}],"
                f" measured {held.measured:.4f}: {'inside' if held.covered else 'OUTSIDE'} the interval"
            )
        for budget, optimum in self.optima.items():
            lines += ["", f"compute-optimal at {budget:.3g} FLOPs, by L(N, D)"]
            for label, field in (("weights", "parameters"), ("images ", "images"), ("value  ", "value")):
                best, low, high = (getattr(end, field) for end in optimum)
                lines.append(f"  {label}  {best:.4g}   [{low:.4g}, {high:.4g}]")
        lines += [f"refused: {name}: {reason}" for name, reason in self.refused.items()]
        lines += [f"warning: {line}" for line in self.warnings]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """Return all findings as JSON-serialisable data."""
        return {
            "points": [vars(point) for point in self.points],
            "real_images": self.floor and vars(self.floor),
            "fits": {law: fit.parameters() for law, fit in self.fits.items()},
            "held_out": {law: vars(held) | {"covered": held.covered} for law, held in self.held.items()},
            "compute_optimal": {f"{b:.6g}": [vars(o) for o in optima] for b, optima in self.optima.items()},
            "refused": self.refused,
            "warnings": self.warnings,
        }
