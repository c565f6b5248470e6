"""Scaling laws of a metric: power laws with an irreducible term, fitted with confidence intervals, or refused.

    L(C)    = E + A C^-a                  over the compute frontier: the best size at each budget
    L(N, D) = E + A N^-alpha + B D^-beta  over all points (Hoffmann et al. 2022, eq. 2)

C is the training FLOPs (2 per multiply-accumulate), N the number of parameters, D the number of images seen. Fits
minimise the Huber loss of the log residuals from a grid of initial values (Hoffmann et al. 2022, section 3.3); E is
fitted, never set by hand. Intervals are bootstrapped over runs, because the checkpoints of a run are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from pipeline.errors import InputError, UserError
from pipeline.evaluation.measured import Measured, check_comparable

Array = NDArray[np.float64]


DELTA = 1e-3
"""Huber threshold: larger log residuals count linearly, so that an outlier run does not distort the fit."""


RESAMPLES = 400


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
            raise InputError(f"{point.run}: got the value {point.value}, expected a positive number")
        try:
            check_comparable(points[0], point)
        except UserError as error:
            raise InputError(f"{points[0].run} and {point.run}: {error}") from None


NAMES = {("C",): ("E", "A", "a"), ("N", "D"): ("E", "A", "B", "alpha", "beta")}
"""Names of a law's parameters, by its inputs."""


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
    undetermined: tuple[str, ...] = ()
    """Parameters that ended at a bound of the fit: the points do not determine them."""

    @property
    def runs(self) -> int:
        """Independent runs behind it."""
        return len({point.run for point in self.points})

    def parameters(self) -> dict[str, tuple[float, float, float]]:
        """Return each parameter's value and the ends of its interval."""
        ends = np.stack([self.theta, *self.interval(self.theta, self.samples)])
        ends[:, : 1 + len(self.inputs)] = np.exp(ends[:, : 1 + len(self.inputs)])
        return {name: (v, low, high) for name, (v, low, high) in zip(NAMES[self.inputs], ends.T.tolist(), strict=True)}

    def predict(self, *x: Any) -> Array:
        """Evaluate the law at inputs of shape [m] each."""
        return np.exp(_law(self.theta[None], _columns(x))[0][0])

    def band(self, *x: Any, noise: bool = False) -> tuple[Array, Array]:
        """Return the law's interval at inputs of shape [m] each; with `noise`, that of a new measurement there."""
        log_x = _columns(x)
        logs = _law(self.samples, log_x)[0]
        if noise:
            logs = logs + np.random.default_rng(1).choice(self.residuals, logs.shape)
        low, high = self.interval(_law(self.theta[None], log_x)[0][0], logs)
        return np.exp(low), np.exp(high)

    def interval(self, value: Array, samples: Array) -> tuple[Array, Array]:
        """Return the interval's ends for a `value` [m] with bootstrap `samples` [resamples, m].

        The fitted parameters absorb part of the noise, so the residuals underestimate it; the interval is widened to
        compensate.
        """
        wide = value + (samples - value) * math.sqrt(self.runs / max(1, self.runs - len(self.theta)))
        tail = 50 * (1 - LEVEL)
        low, high = np.percentile(wide, [tail, 100 - tail], axis=0)
        return low, high


def fit_frontier(points: Sequence[ComputePoint], resamples: int = RESAMPLES) -> ScalingFit:
    """Fit L(C) to the best size at each budget. Raises InputError for fewer than 4 budgets or 4 runs there."""
    check_points(points)
    best = frontier(points)
    if len(best) < 4:
        raise InputError(f"frontier: got {len(best)} budgets, expected 4 or more for the 3 parameters of E + A C^-a")
    chosen = [p for p in points if any(p.budget == b.budget and p.parameters == b.parameters for b in best)]
    return _fit(("C",), np.log([[p.flops] for p in chosen]), chosen, 4, resamples)


def fit_size_data(points: Sequence[ComputePoint], resamples: int = RESAMPLES) -> ScalingFit:
    """Fit L(N, D) to all points. Raises InputError for fewer than 3 sizes, 6 runs or 8 points."""
    check_points(points)
    sizes = {p.parameters for p in points}
    if len(sizes) < 3 or len(points) < 8:
        raise InputError(
            f"L(N, D): got {len(points)} points of {len(sizes)} sizes, expected 8 or more points of 3 or more sizes"
            " for its 5 parameters"
        )
    return _fit(("N", "D"), np.log([[p.parameters, p.images] for p in points]), points, 6, resamples)


def _fit(
    inputs: tuple[str, ...], log_x: Array, points: Sequence[ComputePoint], min_runs: int, resamples: int
) -> ScalingFit:
    log_y = np.log([p.value for p in points])
    names = sorted({p.run for p in points})
    if len(names) < min_runs:
        raise InputError(
            f"{'L(C)' if len(inputs) == 1 else 'L(N, D)'}: got {len(names)} runs, expected {min_runs} or more; add"
            " seeds, sizes or separate budgets (more checkpoints of the same runs do not help)"
        )
    # Centre the inputs, so that the initial values suit any scale and the parameters are nearly uncorrelated.
    centre = log_x.mean(0)
    x = log_x - centre
    theta = _minimise(_starts(x, log_y), x, log_y)
    bound = np.any(np.isclose(theta, _bounds(x, log_y)), axis=0)

    # Bootstrap over runs: each resample weights the runs (Rubin 1981), so that no size is ever dropped.
    rng = np.random.default_rng(0)
    weights = rng.standard_exponential((resamples, len(names)))
    weights *= len(names) / weights.sum(1, keepdims=True)
    run = np.searchsorted(names, [p.run for p in points])
    samples = _resample(theta, x, log_y, weights[:, run])
    residuals = log_y - _law(theta[None], x)[0][0]
    k = len(inputs)
    for t in (theta, samples.T):  # undo the centring
        t[1 : 1 + k] += (t[1 + k :].T * centre).T
    undetermined = tuple(name for name, at in zip(NAMES[inputs], bound, strict=True) if at)
    return ScalingFit(inputs, theta, samples, residuals, tuple(points), undetermined)


def _starts(log_x: Array, log_y: Array) -> Array:
    """Return initial thetas [starts, 1 + 2k]: an irreducible part of the value, equal shares of the rest, exponents."""
    k, y = log_x.shape[1], log_y.min()
    exponents = list(product((0.15, 0.4, 0.9), repeat=k))
    return np.array(
        [
            [y + math.log(part), *[y + math.log((1 - part) / k)] * k, *alphas]
            for part, alphas in product((0.2, 0.7, 0.95), exponents)
        ]
    )


def _minimise(starts: Array, log_x: Array, log_y: Array) -> Array:
    """Run L-BFGS from each start and return the best theta [1 + 2k]."""
    low, high = _bounds(log_x, log_y)

    def objective(theta: Array) -> tuple[float, Array]:
        law, jacobian = _law(theta[None], log_x)
        r = law[0] - log_y
        return _huber(r).sum() / DELTA, np.clip(r, -DELTA, DELTA) @ jacobian[0] / DELTA

    options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8}
    found = [
        minimize(
            objective, start, jac=True, method="L-BFGS-B", bounds=list(zip(low, high, strict=True)), options=options
        )
        for start in starts
    ]
    return min(found, key=lambda result: result.fun).x


def _resample(theta: Array, log_x: Array, log_y: Array, weights: Array, steps: int = 40) -> Array:
    """Minimise under each row of weights [resamples, n] in one batch; return theta [resamples, 1 + 2k].

    A tangent parabola bounds the Huber loss from above at every point. Levenberg-Marquardt on those parabolas, starting
    at the full fit, descends like L-BFGS but fifty times as fast, without a Python call per resample.
    """
    low, high = _bounds(log_x, log_y)
    thetas = np.repeat(theta[None], len(weights), 0)
    damping = np.full(len(weights), 1e-3)
    law, jacobian = _law(thetas, log_x)
    loss = (weights * _huber(law - log_y)).sum(1)
    for _ in range(steps):
        r = law - log_y
        curvature = weights * np.minimum(1, DELTA / np.maximum(np.abs(r), 1e-300))
        weighted = (curvature[..., None] * jacobian).swapaxes(1, 2)
        hessian = weighted @ jacobian
        diagonal = np.einsum("bii->bi", hessian)
        diagonal += damping[:, None] * diagonal + 1e-12
        trial = np.clip(thetas - np.linalg.solve(hessian, weighted @ r[..., None])[..., 0], low, high)
        trial_law, trial_jacobian = _law(trial, log_x)
        trial_loss = (weights * _huber(trial_law - log_y)).sum(1)
        better = trial_loss < loss
        thetas[better], law[better], jacobian[better] = trial[better], trial_law[better], trial_jacobian[better]
        loss = np.where(better, trial_loss, loss)
        damping = np.where(better, damping / 3, damping * 4)
    return thetas


def _bounds(log_x: Array, log_y: Array) -> tuple[Array, Array]:
    """Return bounds on theta beyond which no data could tell a value from an infinite one."""
    k = log_x.shape[1]
    y = log_y.min()
    return (
        np.array([y - 12, *[y - 12] * k, *[1e-3] * k]),
        np.array([log_y.max(), *[log_y.max() + 12] * k, *[5.0] * k]),
    )


def _law(thetas: Array, log_x: Array) -> tuple[Array, Array]:
    """Return log y [m, n] at inputs [n, k] for thetas [m, 1 + 2k], by a stable logsumexp, and d log y / d theta."""
    k = log_x.shape[1]
    powers = thetas[:, None, 1 : 1 + k] - thetas[:, None, 1 + k :] * log_x
    terms = np.concatenate([np.broadcast_to(thetas[:, None, :1], (*powers.shape[:2], 1)), powers], axis=2)
    largest = terms.max(2, keepdims=True)
    shares = np.exp(terms - largest)
    total = shares.sum(2, keepdims=True)
    shares /= total
    return (largest + np.log(total))[..., 0], np.concatenate([shares, -shares[..., 1:] * log_x], axis=2)


def _huber(r: Array) -> Array:
    a = np.abs(r)
    return np.where(a <= DELTA, a**2 / 2, DELTA * (a - DELTA / 2))


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
    found = []
    for budget, means in _means(points).items():
        parameters = min(means, key=lambda n: means[n])
        found.append(Best(budget, parameters, means[parameters], parameters in (min(means), max(means))))
    return found


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
    found = []
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
        found.append(Parabola(budget, (c0, c1, c2), None if problem else math.exp(optimum), problem))
    return found


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
    if open_ := [name for name in fit.undetermined if name != "E"]:  # the floor moves no optimum
        raise InputError(f"compute-optimal size: the points do not determine {', '.join(open_)} of L(N, D)")
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
            " points do not determine it; add seeds, sizes or budgets"
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


def hold_out(points: Sequence[ComputePoint], law: str, resamples: int = RESAMPLES) -> HeldOut:
    """Fit a law ("L(C)" or "L(N, D)") to all but the largest budget and predict a measurement at that budget.

    Raises InputError if the remaining points are too few to fit.
    """
    last = max(p.budget for p in points)
    rest = [p for p in points if p.budget < last]
    best = frontier(points)[-1]
    mean = [p for p in points if p.budget == last and p.parameters == best.parameters]
    if law == "L(C)":
        fit, x = fit_frontier(rest, resamples), [[p.flops for p in mean[:1]]]
    else:
        fit, x = fit_size_data(rest, resamples), [[best.parameters], [mean[0].images]]
    low, high = fit.band(*x, noise=True)
    return HeldOut(last, best.value, float(fit.predict(*x)[0]), float(low[0]), float(high[0]))


def warnings(points: Sequence[ComputePoint]) -> list[str]:
    """Return warnings about optima at the edge of, or outside, the measured sizes."""
    said = [
        f"budget {b.budget:.2g} FLOPs: the best size, {b.parameters:,.0f} weights, is at the edge of the grid; a better"
        " one may lie beyond it"
        for b in frontier(points)
        if b.edge
    ]
    said += [f"isoFLOP parabola at {c.budget:.2g} FLOPs: {c.problem}" for c in isoflop(points) if c.problem]
    return said


def _columns(x: Sequence[Any]) -> Array:
    return np.log(np.stack([np.atleast_1d(np.asarray(v, np.float64)) for v in x], axis=1))
