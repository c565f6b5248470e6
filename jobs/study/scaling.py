"""Scaling laws of a metric: power laws with an irreducible term, fitted with confidence intervals, or refused.

    L(C)    = E + A C^-a                  over the compute frontier: the best size at each budget
    L(N, D) = E + A N^-alpha + B D^-beta  over all points (Hoffmann et al. 2022, eq. 2)

C is the training FLOPs (2 per multiply-accumulate), N the number of parameters, D the number of images seen. Fits
minimise the Huber loss of the log residuals from a grid of initial values (Hoffmann et al. 2022, section 3.3); E is
fitted, never set by hand. Intervals are bootstrapped over runs, because the checkpoints of a run are not independent.
The minimiser is scipy's trust-region least squares (Branch, Coleman and Li 1999).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import ndtri, stdtrit

from pipeline.errors import InputError, UserError
from pipeline.evaluation.measured import Measured, check_comparable

Array = NDArray[np.float64]


DELTA = 1e-3
"""Huber threshold: larger log residuals count linearly, so that an outlier run does not distort the fit."""


RESAMPLES = 200
"""Bootstrap resamples of the runs."""


LEVEL = 0.95


PAPER = {"nll": (3.40, 3.0e-15, 0.17), "fid": (4.00, 2.5e-25, 0.22)}
"""IDDPM's published fits (section 6): E, k and a of E + (k C)^-a. E was set by hand, and C matches
multiply-accumulates, not FLOPs."""


@dataclass(frozen=True, kw_only=True)
class ComputePoint(Measured):
    """A measured value and its training cost."""

    run: str
    """Points of the same run are not independent."""
    parameters: float
    images: float
    flops: float
    """Training FLOPs spent up to the measurement."""
    budget: float
    """Nominal training FLOPs; points of the same budget are compared."""


def check_points(points: Sequence[ComputePoint]) -> None:
    """Raise InputError if the points are not comparable."""
    for point in points:
        if not (point.value > 0 and math.isfinite(point.value)):
            raise InputError(
                f"{point.run}: got the value {point.value}, expected a positive number; measure that run again, or take"
                " its point out of the study"
            )
        try:
            check_comparable(points[0], point)
        except UserError as error:
            raise InputError(f"{points[0].run} and {point.run}: {error}") from None


NAMES = {("C",): ("E", "A", "a"), ("N", "D"): ("E", "A", "B", "alpha", "beta")}
"""Names of a law's parameters, by its inputs."""


FIELDS = {"C": "flops", "N": "parameters", "D": "images"}
"""A point's field for each input."""


@dataclass(frozen=True)
class ScalingFit:
    """A fitted law of k inputs: log y = logsumexp(log E, log A_j - alpha_j log x_j)."""

    inputs: tuple[str, ...]
    """("C",) or ("N", "D")."""
    theta: Array
    """[1 + 2k]: log E, log A_j, alpha_j."""
    samples: Array
    """[resamples, 1 + 2k]: theta of each bootstrap resample."""
    residuals: Array
    """[n]: log measured - log fitted."""
    points: tuple[ComputePoint, ...]
    """[n]: those it was fitted to."""
    at_bound: tuple[str, ...] = ()
    """Parameters that ended at a bound of the fit, or in a term that vanished."""

    @property
    def runs(self) -> int:
        """Independent runs behind it."""
        return len({point.run for point in self.points})

    @property
    def undetermined(self) -> dict[str, str]:
        """Map each parameter that the points do not determine to the reason.

        A and B are the values of their terms at an input of 1, decades away from any point: the decades that their
        intervals span say no more than the intervals of the exponents, so only a bound counts against them. If the
        floor is undetermined, so is an exponent so small that its term does not even halve over the points: a slow
        power law and a floor then look alike, and the fit has only one of them.
        """
        reasons = dict.fromkeys(self.at_bound, "it ended at a bound of the fit")
        smallest = min(point.value for point in self.points)
        exponents = NAMES[self.inputs][1 + len(self.inputs) :]
        spans = dict(zip(exponents, np.ptp(_log_inputs(self.inputs, self.points), axis=0), strict=True))
        for name, (_, low, high) in self.parameters().items():  # E is the first
            if name == "E" and high > smallest:
                reasons[name] = f"its interval reaches above the smallest measured value, {smallest:.6g}"
            elif name not in ("A", "B") and high > 10 * low:
                reasons[name] = "its interval spans more than a decade"
            elif "E" in reasons and low * spans.get(name, math.inf) < math.log(2):
                reasons[name] = "its power law may be so slow that it stands in for the floor E"
        return reasons

    def parameters(self) -> dict[str, tuple[float, float, float]]:
        """Return each parameter's value and the ends of its interval."""
        ends = np.stack([self.theta, *self.interval(self.theta, self.samples)])
        logs = 1 + len(self.inputs)
        ends[:, :logs] = np.exp(ends[:, :logs])
        return dict(zip(NAMES[self.inputs], zip(*ends.tolist(), strict=True), strict=True))

    def predict(self, *x: Any) -> Array:
        """Evaluate the law at inputs of shape [m] each."""
        return np.exp(_law(self.theta[None], _columns(x))[0][0])

    def band(self, *x: Any, noise: bool = False) -> tuple[Array, Array]:
        """Return the law's interval at inputs of shape [m] each; with `noise`, that of a new measurement there."""
        log_x = _columns(x)
        value = _law(self.theta[None], log_x)[0][0]
        error = math.sqrt((self.residuals**2).mean() * self.runs / self.freedom) if noise else 0.0
        low, high = self.interval(value, _law(self.samples, log_x)[0], error)
        return np.exp(low), np.exp(high)

    def interval(self, value: Array, samples: Array, error: float = 0.0) -> tuple[Array, Array]:
        """Return the ends of the interval of a `value` [m] with bootstrap `samples` [resamples, m].

        They are percentiles, stretched by the quantile of Student's t over the normal one, because few runs give the
        spread only roughly. Weighting the runs allows for their leverage much as the jackknife does, so no factor is
        due for residuals that the fit has made too small (MacKinnon and White 1985). A new measurement's standard
        `error` adds noise that follows Student's t, too.
        """
        tail = (1 + LEVEL) / 2
        spread = (samples - value) * stdtrit(self.freedom, tail) / ndtri(tail)
        spread += error * np.random.default_rng(1).standard_t(self.freedom, spread.shape)
        low, high = value + np.quantile(spread, [1 - tail, tail], axis=0)
        # A full fit at a bound may lie outside all of its resamples.
        return np.minimum(low, value), np.maximum(high, value)

    @property
    def freedom(self) -> int:
        """Degrees of freedom that are left to estimate the noise."""
        return max(1, self.runs - len(self.theta))


def fit_frontier(points: Sequence[ComputePoint]) -> ScalingFit:
    """Fit L(C) to the best size at each budget. Raises InputError for fewer than 4 budgets or 4 runs there."""
    check_points(points)
    best = frontier(points)
    if len(best) < 4:
        raise InputError(
            f"L(C): got points of {len(best)} budgets, expected 4 or more for its 3 parameters; add budgets to the"
            " study"
        )
    sizes = {b.budget: b.parameters for b in best}
    chosen = [p for p in points if p.parameters == sizes[p.budget]]
    return _fit(("C",), chosen)


def fit_size_data(points: Sequence[ComputePoint]) -> ScalingFit:
    """Fit L(N, D) to all points. Raises InputError for fewer than 3 sizes, 6 runs or 8 points."""
    check_points(points)
    sizes = {p.parameters for p in points}
    if len(sizes) < 3 or len(points) < 8:
        raise InputError(
            f"L(N, D): got {len(points)} points of {len(sizes)} sizes, expected 8 or more points of 3 or more sizes"
            " for its 5 parameters; add sizes or budgets to the study"
        )
    return _fit(("N", "D"), points)


def _log_inputs(inputs: tuple[str, ...], points: Sequence[ComputePoint]) -> Array:
    return np.log([[getattr(p, FIELDS[name]) for name in inputs] for p in points])


def _fit(inputs: tuple[str, ...], points: Sequence[ComputePoint]) -> ScalingFit:
    log_x = _log_inputs(inputs, points)
    log_y = np.log([p.value for p in points])
    names = sorted({p.run for p in points})
    if len(names) <= len(NAMES[inputs]):
        raise InputError(
            f"L({', '.join(inputs)}): got points of {len(names)} runs, expected {len(NAMES[inputs]) + 1} or more, one"
            " more than parameters; add seeds, sizes or budgets with runs of their own (more checkpoints of the same"
            " runs do not count)"
        )
    # Centre the inputs, so that the initial values suit any scale and the parameters are nearly uncorrelated.
    centre = log_x.mean(0)
    x = log_x - centre
    starts = _starts(x, log_y)
    theta = _minimise(starts, x, log_y, np.ones(len(points)))
    (law,), (slopes,) = _law(theta[None], x)
    at_bound = np.isclose(theta, _bounds(x, log_y), rtol=0, atol=1e-3).any(0)
    at_bound |= np.abs(slopes).max(0) < DELTA

    # Bootstrap over runs: each resample weights the runs (Rubin 1981), so that no size is ever dropped. The start
    # is the full fit, but with no term or exponent so small that the loss does not depend on it and it cannot return.
    # After 200 evaluations, only valleys too flat to determine anything have a thousandth of the loss left to gain.
    weights = np.random.default_rng(0).standard_exponential((RESAMPLES, len(names)))
    weights *= len(names) / weights.sum(1, keepdims=True)
    run = np.searchsorted(names, [p.run for p in points])
    start = np.maximum(theta, starts.min(0))
    samples = np.stack([_minimise([start], x, log_y, w, 200) for w in weights[:, run]])

    k = len(inputs)
    for thetas in (theta[None], samples):  # undo the centring
        thetas[:, 1 : 1 + k] += thetas[:, 1 + k :] * centre
    return ScalingFit(inputs, theta, samples, log_y - law, tuple(points), tuple(compress(NAMES[inputs], at_bound)))


def _starts(log_x: Array, log_y: Array) -> Array:
    """Return initial thetas [starts, 1 + 2k]: an irreducible part of the value, equal shares of the rest, exponents."""
    k, y = log_x.shape[1], log_y.min()
    starts = product((0.3, 0.9), *[(0.2, 0.6)] * k)
    return np.array([[y + math.log(part), *[y + math.log((1 - part) / k)] * k, *alphas] for part, *alphas in starts])


def _minimise(
    starts: Iterable[Array], log_x: Array, log_y: Array, weights: Array, evaluations: int | None = None
) -> Array:
    """Return the theta [1 + 2k] of the least Huber loss of the log residuals, the best of all starts.

    A weight [n] multiplies its point's loss, not its residual, which would move the Huber threshold.
    """

    def loss(z: Array) -> Array:
        """Return the loss and its first two derivatives [3, n] by the squared residual z [n] in units of DELTA^2."""
        root = np.sqrt(np.maximum(z, 1))
        outlier = z > 1
        return weights * np.stack([np.where(outlier, 2 * root - 1, z), 1 / root, outlier * -0.5 / root**3])

    def residuals(theta: Array) -> Array:
        return _law(theta[None], log_x)[0][0] - log_y

    def jacobian(theta: Array) -> Array:
        return _law(theta[None], log_x)[1][0]

    options = {"bounds": _bounds(log_x, log_y), "loss": loss, "f_scale": DELTA, "max_nfev": evaluations}
    fits = [least_squares(residuals, start, jacobian, **options) for start in starts]
    return min(fits, key=lambda fit: fit.cost).x


def _bounds(log_x: Array, log_y: Array) -> tuple[Array, Array]:
    """Return bounds on theta beyond which no data could tell a value from an infinite one."""
    k = log_x.shape[1]
    lowest, highest = log_y.min(), log_y.max()
    low = [lowest - 12] * (1 + k) + [1e-3] * k
    high = [highest] + [highest + 12] * k + [5.0] * k
    return np.array(low), np.array(high)


def _law(thetas: Array, log_x: Array) -> tuple[Array, Array]:
    """Return log y [m, n] at inputs [n, k] for thetas [m, 1 + 2k], and d log y / d theta [m, n, 1 + 2k]."""
    k = log_x.shape[1]
    floor = np.broadcast_to(thetas[:, None, :1], (len(thetas), len(log_x), 1))
    powers = thetas[:, None, 1 : 1 + k] - thetas[:, None, 1 + k :] * log_x
    terms = np.concatenate([floor, powers], axis=2)
    log_y = np.logaddexp.reduce(terms, axis=2)
    shares = np.exp(terms - log_y[..., None])
    return log_y, np.concatenate([shares, -shares[..., 1:] * log_x], axis=2)


@dataclass(frozen=True)
class Best:
    """The best size at one budget."""

    budget: float
    parameters: float
    value: float
    edge: bool
    """Whether it is the smallest or largest size measured, so that a better one may lie outside."""


def frontier(points: Sequence[ComputePoint]) -> list[Best]:
    """Return the size with the lowest mean over seeds at each budget, in order of budget."""
    best = []
    for budget, means in _means(points).items():
        parameters = min(means, key=lambda n: means[n])
        edge = parameters in (min(means), max(means))
        best.append(Best(budget, parameters, means[parameters], edge))
    return best


def _means(points: Sequence[ComputePoint]) -> dict[float, dict[float, float]]:
    """Map budget -> size -> geometric mean of the values."""
    logs: dict[float, dict[float, list[float]]] = {}
    for p in sorted(points, key=lambda p: (p.budget, p.parameters)):
        logs.setdefault(p.budget, {}).setdefault(p.parameters, []).append(math.log(p.value))
    return {c: {n: math.exp(sum(v) / len(v)) for n, v in sizes.items()} for c, sizes in logs.items()}


@dataclass(frozen=True)
class Parabola:
    """log value = c0 + c1 log N + c2 (log N)^2 at one budget (Hoffmann et al. 2022, approach 2)."""

    budget: float
    coefficients: tuple[float, float, float]
    parameters: float | None
    """Size at the minimum; None if the minimum is outside the sizes measured."""
    problem: str = ""
    """Why `parameters` is None."""

    def __call__(self, parameters: Any) -> Any:
        return np.exp(np.polynomial.Polynomial(self.coefficients)(np.log(parameters)))


def isoflop(points: Sequence[ComputePoint]) -> list[Parabola]:
    """Fit a parabola at each budget with 3 or more sizes. A minimum outside them gives no optimum."""
    check_points(points)
    curves = []
    for budget, means in _means(points).items():
        if len(means) < 3:
            continue
        chosen = [p for p in points if p.budget == budget]
        log_n = np.log([p.parameters for p in chosen])
        c2, c1, c0 = map(float, np.polyfit(log_n, np.log([p.value for p in chosen]), 2))
        optimum = -c1 / (2 * c2) if c2 > 0 else math.nan
        problem = ""
        if not c2 > 0:
            problem = "it has no minimum"
        elif not log_n.min() < optimum < log_n.max():
            side = "smallest" if optimum <= log_n.min() else "largest"
            problem = f"its minimum lies beyond the {side} size"
        curves.append(Parabola(budget, (c0, c1, c2), None if problem else math.exp(optimum), problem))
    return curves


@dataclass(frozen=True)
class Optimum:
    """The optimal size and number of images for a budget by L(N, D)."""

    parameters: float
    images: float
    value: float


def compute_optimal(fit: ScalingFit, points: Sequence[ComputePoint], flops: float) -> tuple[Optimum, Optimum, Optimum]:
    """Return the optimum for a budget, and the lower and upper ends of its intervals.

    FLOPs per image are fitted as a power of N, C = k N^kappa D. With B D^-beta as a power of N, dL/dN = 0 then has a
    closed-form solution. Raises InputError if the points bracket no optimum at any budget or do not determine it.
    """
    assert fit.inputs == ("N", "D")
    for name, reason in fit.undetermined.items():
        if name != "E":  # the floor moves no optimum
            raise InputError(
                f"compute-optimal size: the points do not determine {name} of L(N, D): {reason}; add seeds, sizes or"
                " budgets to the study"
            )
    if all(b.edge for b in frontier(points)):
        raise InputError(
            "compute-optimal size: at every budget the best size is the smallest or largest measured, so the points"
            " show no optimum; add sizes beyond that edge, or budgets whose best size lies inside"
        )
    log_n = np.log([p.parameters for p in points])
    kappa, log_k = np.polyfit(log_n, np.log([p.flops / p.images for p in points]), 1)

    def solve(thetas: Array) -> Array:
        """Logs of N, D and the value, [m, 3]."""
        e, a, b, alpha, beta = thetas.T
        b_of_n = b + beta * (log_k - math.log(flops))  # B D^-beta = exp(b_of_n) N^(kappa beta)
        n = (np.log(alpha / (kappa * beta)) + a - b_of_n) / (alpha + kappa * beta)
        d = math.log(flops) - log_k - kappa * n
        value = np.exp(e) + np.exp(a - alpha * n) + np.exp(b - beta * d)
        return np.stack([n, d, np.log(value)], axis=1)

    best_logs = solve(fit.theta[None])[0]
    low, high = fit.interval(best_logs, solve(fit.samples))
    if high[0] - low[0] > math.log(1e3):
        raise InputError(
            f"compute-optimal size: its interval is {math.exp(low[0]):.2g} to {math.exp(high[0]):.2g} weights; the"
            " points do not determine it; add seeds, sizes or budgets to the study"
        )
    return Optimum(*np.exp(best_logs).tolist()), Optimum(*np.exp(low).tolist()), Optimum(*np.exp(high).tolist())


@dataclass(frozen=True)
class HeldOut:
    """The best value at the largest budget, and its prediction by a law fitted without that budget."""

    budget: float
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def covered(self) -> bool:
        return self.low <= self.measured <= self.high


def hold_out(points: Sequence[ComputePoint], law: str) -> HeldOut:
    """Fit a law ("L(C)" or "L(N, D)") to all but the largest budget and predict a measurement at that budget.

    Raises InputError if the remaining points are too few to fit, or if the prediction spans more than a decade.
    """
    last = max(p.budget for p in points)
    rest = [p for p in points if p.budget < last]
    best = frontier(points)[-1]
    target = next(p for p in points if p.budget == last and p.parameters == best.parameters)
    try:
        fit = (fit_frontier if law == "L(C)" else fit_size_data)(rest)
    except InputError as error:
        raise InputError(f"without the largest budget, {last:.3g} FLOPs: {error}") from None
    x = [getattr(target, FIELDS[name]) for name in fit.inputs]
    (predicted,) = fit.predict(*x).tolist()
    (low,), (high,) = fit.band(*x, noise=True)
    if high > 10 * low:
        raise InputError(
            f"the value predicted at {last:.3g} FLOPs is {low:.3g} to {high:.3g}, more than a decade: the other budgets"
            " do not determine it; add seeds, sizes or budgets to the study"
        )
    return HeldOut(last, best.value, predicted, float(low), float(high))


def warnings(points: Sequence[ComputePoint]) -> list[str]:
    """Return warnings about optima at the edge of, or outside, the measured sizes."""
    lines = [
        f"budget {b.budget:.2g} FLOPs: the best size, {b.parameters:,.0f} weights, is at the edge of the grid; a better"
        " one may lie beyond it"
        for b in frontier(points)
        if b.edge
    ]
    lines += [f"isoFLOP parabola at {c.budget:.2g} FLOPs: {c.problem}" for c in isoflop(points) if c.problem]
    return lines


def _columns(x: Sequence[Any]) -> Array:
    return np.log(np.stack([np.atleast_1d(np.asarray(v, np.float64)) for v in x], axis=1))
