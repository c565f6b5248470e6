"""Known laws are recovered with intervals that cover as promised; data that cannot be fitted are refused."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from laws import ALPHA, BETA, BUDGETS, SIZES, A, B, E, grid, law, line

from jobs.study import scaling
from jobs.study.scaling import compute_optimal, fit_frontier, fit_size_data, frontier, hold_out, isoflop


def test_exact_points_give_the_exact_law() -> None:
    size_data = fit_size_data(grid())
    e, k, a = scaling.PAPER["nll"]
    compute = fit_frontier(line())
    for fit, true in (
        (size_data, {"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA}),
        (compute, {"E": e, "A": k**-a, "a": a}),
    ):
        for name, (value, low, high) in fit.parameters().items():
            assert value == pytest.approx(true[name], rel=1e-3), name
            assert low == pytest.approx(high, rel=1e-3), name
        assert fit.samples.shape == (scaling.RESAMPLES, len(true))
        assert not fit.undetermined


REPEATS, COVERED = 12, 10
"""Intervals that cover 95 % cover fewer than 10 of 12 twice in a hundred tests. docs/decisions.md has more repeats."""


@pytest.mark.slow
def test_intervals_cover_the_law_of_size_and_data() -> None:
    """Three sizes, five budgets, one seed each, 2 % noise: a small grid, whose floor is hard to find."""
    hits = Counter()
    for seed in range(REPEATS):
        parameters = fit_size_data(grid(0.02, seed, sizes=SIZES[::2])).parameters()
        for name, true in {"E": E, "alpha": ALPHA, "beta": BETA}.items():
            _, low, high = parameters[name]
            hits[name] += low <= true <= high
            if name != "E":
                assert high - low < true  # a wide enough interval would always cover
    assert min(hits.values()) >= COVERED, hits


@pytest.mark.slow
def test_intervals_cover_the_law_of_compute_and_the_next_budget() -> None:
    e, _, a = scaling.PAPER["nll"]
    hits = Counter()
    for seed in range(REPEATS):
        points = line(0.01, seed, budgets=5)
        parameters = fit_frontier(points).parameters()
        for name, true in {"E": e, "a": a}.items():
            _, low, high = parameters[name]
            hits[name] += low <= true <= high
        held = hold_out(points, "L(C)")
        hits["held out"] += held.covered
        assert held.high < 2 * held.low
    assert min(hits.values()) >= COVERED, hits


def test_a_weight_counts_as_repeated_points() -> None:
    points = grid(0.01)
    x = np.log([[p.parameters, p.images] for p in points])
    x -= x.mean(0)
    y = np.log([p.value for p in points])
    starts = scaling._starts(x, y)
    for weights in np.random.default_rng(3).integers(0, 3, (4, len(points))):
        weighted = scaling._minimise(starts, x, y, weights)
        x_repeated, y_repeated = np.repeat(x, weights, 0), np.repeat(y, weights)
        repeated = scaling._minimise(starts, x_repeated, y_repeated, np.ones(len(y_repeated)))
        assert weighted == pytest.approx(repeated, rel=1e-3)


def test_runs_not_checkpoints_are_resampled() -> None:
    """A seed shifts all checkpoints of a run together: treating them as independent would give too narrow intervals."""
    noise = np.random.default_rng(0).normal(0, 0.02, (len(SIZES), 3))
    runs = [
        dataclasses.replace(p, run=f"{size}-{seed}", value=p.value * math.exp(noise[size, seed]))
        for size, n in enumerate(SIZES)
        for seed in range(3)
        for p in grid(sizes=[n])
    ]
    apart = [dataclasses.replace(p, run=f"{p.run}-{p.budget:.3g}") for p in runs]
    fits = [fit_size_data(points) for points in (runs, apart)]
    assert [fit.runs for fit in fits] == [15, 75]
    bands = [fit.band(1e9, 1e9) for fit in fits]
    assert bands[0][1] - bands[0][0] > 1.2 * (bands[1][1] - bands[1][0])


def test_the_frontier_is_the_best_size_at_each_budget() -> None:
    points = grid(seeds=2)
    for best in frontier(points):
        assert best.value == pytest.approx(min(p.value for p in points if p.budget == best.budget))
    inside = [b for b in frontier(points) if not b.edge]
    assert inside
    assert all(SIZES[0] < b.parameters < SIZES[-1] for b in inside)


def test_parabolas() -> None:
    quadratic = [
        dataclasses.replace(p, value=math.exp(0.1 * (math.log(p.parameters) - math.log(2e6)) ** 2)) for p in grid()
    ]
    curve = isoflop(quadratic)[0]
    assert curve.parameters == pytest.approx(2e6)
    assert curve(2e6) == pytest.approx(1.0)
    falling = [dataclasses.replace(p, value=10 * p.parameters**-0.1) for p in grid()]
    assert all(c.parameters is None for c in isoflop(falling))
    beyond = [dataclasses.replace(p, value=math.exp(0.01 * math.log(p.parameters / 1e10) ** 2)) for p in grid()]
    assert all("beyond the largest size" in c.problem for c in isoflop(beyond))
    assert all(c.parameters is None for c in isoflop(beyond))
    warnings = scaling.warnings(beyond)
    assert sum("edge of the grid" in warning for warning in warnings) == len(BUDGETS)
    assert sum("isoFLOP" in warning for warning in warnings) == len(BUDGETS)


def test_the_compute_optimal_size_is_the_laws_minimum() -> None:
    points = grid(0.01)
    fit = fit_size_data(points)
    best, low, high = compute_optimal(fit, points, 1e18)
    sizes = np.geomspace(1e5, 1e10, 200_001)
    values = fit.predict(sizes, 1e18 / (6 * sizes))
    assert best.parameters == pytest.approx(sizes[values.argmin()], rel=1e-3)
    assert best.value == pytest.approx(values.min(), rel=1e-6)
    assert 6 * best.parameters * best.images == pytest.approx(1e18)
    assert low.value <= best.value <= high.value


def test_the_largest_budget_is_predicted_from_the_others() -> None:
    points = grid(0.01)
    held = hold_out(points, "L(N, D)")
    assert held.budget == BUDGETS[-1]
    assert held.measured == frontier(points)[-1].value
    assert held.covered
    surprising = [dataclasses.replace(p, value=p.value * (1.3 if p.budget == BUDGETS[-1] else 1)) for p in points]
    assert not hold_out(surprising, "L(N, D)").covered
    assert hold_out(line(0.002), "L(C)").predicted == pytest.approx(3.45, abs=0.1)


def test_few_runs_widen_the_intervals() -> None:
    """Student's t: 1.01 times the normal interval from 80 degrees of freedom, 6.5 times from one."""
    exact = fit_frontier(line())
    samples = exact.theta + np.random.default_rng(0).normal(0, 0.01, (100_000, 3))
    for runs, factor in ((4, 6.48), (5, 2.20), (16, 1.10)):
        fit = dataclasses.replace(exact, samples=samples, points=exact.points[:runs])
        low, high = fit.interval(fit.theta, samples)
        assert high - low == pytest.approx(2 * 1.96 * 0.01 * factor, rel=0.02)


def test_what_cannot_be_fitted_is_refused() -> None:
    points = grid(0.01)
    other = [dataclasses.replace(p, passport={"images": 64 if i else 32}) for i, p in enumerate(points)]
    for refused, says in (
        (lambda: fit_frontier([p for p in points if p.budget < BUDGETS[3]]), "3 budgets, expected 4 .* add budgets"),
        (lambda: fit_size_data([p for p in points if p.parameters < SIZES[2]]), "10 points of 2 sizes, .* add sizes"),
        (lambda: fit_frontier([dataclasses.replace(p, run="one") for p in line()]), "1 runs, expected 4 .* add seeds"),
        (lambda: fit_size_data([*points, dataclasses.replace(points[0], value=math.nan)]), "the value nan.* again"),
        (lambda: fit_size_data(other), "not comparable: they differ in images: 32 and 64"),
        (
            lambda: hold_out([p for p in points if p.budget < BUDGETS[4]], "L(C)"),
            r"without the largest budget, 1.78e\+16 FLOPs: .* 3 budgets, expected 4",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            refused()


@pytest.mark.slow
def test_a_term_that_vanishes_is_undetermined() -> None:
    flat = [dataclasses.replace(p, value=law(1e9, p.images)) for p in grid(sizes=SIZES[::2])]  # independent of size
    fit = fit_size_data(flat)
    assert fit.undetermined == dict.fromkeys(("A", "alpha"), "it ended at a bound of the fit")
    with pytest.raises(ValueError, match=r"do not determine A of L\(N, D\): it ended at a bound"):
        compute_optimal(fit, flat, 1e18)


def test_what_the_points_do_not_determine_is_refused() -> None:
    points = grid(0.01)
    noisy = fit_frontier(line(0.02, budgets=5, seeds=1))
    assert "reaches above the smallest measured value" in noisy.undetermined["E"]
    assert noisy.undetermined["a"] == "its interval spans more than a decade"
    with pytest.raises(ValueError, match=r"value predicted at 1e\+20 FLOPs is .* more than a decade.* add seeds"):
        hold_out(line(1.0, budgets=5, seeds=1), "L(C)")

    exact = fit_size_data(grid())

    def vague(*spreads: float) -> scaling.ScalingFit:
        noise = np.random.default_rng(0).normal(0, spreads, exact.samples.shape)
        return dataclasses.replace(exact, samples=exact.samples + noise)

    assert vague(0, 0, 0, 0.3, 0).undetermined == {"alpha": "its interval spans more than a decade"}
    with pytest.raises(ValueError, match=r"determine alpha .* more than a decade; add seeds"):
        compute_optimal(vague(0, 0, 0, 0.3, 0), points, 1e18)
    slow = vague(2, 0, 0, 0.11, 0)  # a slow power law and a floor look alike
    assert "stands in for the floor" in slow.undetermined["alpha"]
    assert "alpha" not in vague(0, 0, 0, 0.11, 0).undetermined
    assert not vague(0, 3, 0, 0, 0).undetermined  # decades of A alone say nothing
    with pytest.raises(ValueError, match=r"interval is .* weights; the points do not determine it"):
        compute_optimal(vague(0, 3, 0, 0, 0), points, 1e18)
    with pytest.raises(ValueError, match="show no optimum"):
        compute_optimal(exact, grid(sizes=SIZES[:3], budgets=BUDGETS[3:]), 1e18)
