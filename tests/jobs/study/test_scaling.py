"""Known laws are recovered with intervals that cover as promised; data that cannot be fitted are refused."""

import dataclasses
import math

import numpy as np
import pytest
from laws import ALPHA, BETA, BUDGETS, SIZES, A, B, E, grid, law, line

from jobs.study import scaling
from jobs.study.scaling import compute_optimal, fit_frontier, fit_size_data, frontier, hold_out, isoflop


def test_exact_points_give_the_exact_law() -> None:
    found = fit_size_data(grid(), 20).parameters()
    for name, true in {"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA}.items():
        assert found[name][0] == pytest.approx(true, rel=1e-2), name
    e, k, a = scaling.PAPER["nll"]
    found = fit_frontier(line(), 20).parameters()
    for name, true in {"E": e, "A": k**-a, "a": a}.items():
        assert found[name][0] == pytest.approx(true, rel=1e-2), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["L(C)", "L(N, D)"])
def test_true_exponents_lie_in_their_intervals(kind: str) -> None:
    """At least 90 of 100 nominal 95 % intervals cover the true value."""
    hits = dict.fromkeys(("a",) if kind == "L(C)" else ("alpha", "beta"), 0)
    true = {"a": scaling.PAPER["nll"][2], "alpha": ALPHA, "beta": BETA}
    for seed in range(100):
        if kind == "L(C)":
            found = fit_frontier(line(0.005, seed), 200).parameters()
        else:
            found = fit_size_data(grid(0.01, seed), 200).parameters()
        for name in hits:
            _, low, high = found[name]
            hits[name] += low <= true[name] <= high
            assert high - low < true[name]  # a wide enough interval would always cover
    assert min(hits.values()) >= 90, hits


def test_the_bootstrap_finds_what_the_fit_would_find() -> None:
    """A weight of 2 equals a repeated point, so the two minimisers must agree."""
    points = grid(0.01)
    log_x = np.log([[p.parameters, p.images] for p in points])
    log_x -= log_x.mean(0)
    log_y = np.log([p.value for p in points])
    start = scaling._minimise(scaling._starts(log_x, log_y), log_x, log_y)
    twice = np.random.default_rng(3).integers(0, 3, (4, len(points)))
    batch = scaling._resample(start, log_x, log_y, twice.astype(float), steps=200)
    for weights, theta in zip(twice, batch, strict=True):
        x, y = np.repeat(log_x, weights, 0), np.repeat(log_y, weights)
        alone = scaling._minimise(scaling._starts(x, y), x, y)
        loss = [scaling._huber(scaling._law(t[None], x)[0][0] - y).sum() for t in (theta, alone)]
        assert loss[0] == pytest.approx(loss[1], rel=1e-3)


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
    fits = [fit_size_data(points, 200) for points in (runs, apart)]
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
    said = scaling.warnings(beyond)
    assert sum("edge of the grid" in line for line in said) == sum("isoFLOP" in line for line in said) == len(BUDGETS)


def test_the_compute_optimal_size_is_the_laws_minimum() -> None:
    points = grid(0.01)
    fit = fit_size_data(points, 50)
    found, low, high = compute_optimal(fit, points, 1e18)
    sizes = np.geomspace(1e5, 1e10, 200_001)
    values = fit.predict(sizes, 1e18 / (6 * sizes))
    assert found.parameters == pytest.approx(sizes[values.argmin()], rel=1e-3)
    assert found.value == pytest.approx(values.min(), rel=1e-6)
    assert 6 * found.parameters * found.images == pytest.approx(1e18)
    assert low.value <= found.value <= high.value


def test_the_largest_budget_is_predicted_from_the_others() -> None:
    covered = 0
    for seed in range(10):
        points = grid(0.01, seed)
        held = hold_out(points, "L(N, D)", 100)
        assert held.budget == BUDGETS[-1]
        assert held.measured == frontier(points)[-1].value
        covered += held.covered
    assert covered >= 8
    surprised = [dataclasses.replace(p, value=p.value * (1.3 if p.budget == BUDGETS[-1] else 1)) for p in grid(0.01)]
    assert not hold_out(surprised, "L(N, D)", 100).covered
    assert hold_out(line(0.002), "L(C)", 100).predicted == pytest.approx(3.45, abs=0.1)


def test_what_cannot_be_fitted_is_refused() -> None:
    points = grid(0.01)
    for refused, says in (
        (lambda: fit_frontier([p for p in points if p.budget < BUDGETS[3]]), "3 budgets, expected 4"),
        (lambda: fit_size_data([p for p in points if p.parameters < SIZES[2]]), "10 points of 2 sizes"),
        (lambda: fit_frontier([dataclasses.replace(p, run="one") for p in line()]), "got 1 runs"),
        (lambda: fit_size_data([*points, dataclasses.replace(points[0], value=math.nan)]), "the value nan"),
        (
            lambda: fit_size_data(
                [dataclasses.replace(p, passport={"images": 64 if i else 32}) for i, p in enumerate(points)]
            ),
            r"not comparable: they differ in images: 32 and 64",
        ),
        (
            lambda: hold_out([p for p in points if p.budget < BUDGETS[4]], "L(C)"),
            "3 budgets",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            refused()
    small = [p for p in grid(sizes=SIZES[:3]) if p.budget > BUDGETS[2]]
    flat = [dataclasses.replace(p, value=law(1e9, p.images)) for p in points]  # independent of size
    fit = fit_size_data(flat, 20)
    assert "alpha" in fit.undetermined or "A" in fit.undetermined
    with pytest.raises(ValueError, match=r"do not determine .* of L\(N, D\)"):
        compute_optimal(fit, flat, 1e18)
    noisy = grid(0.6)
    with pytest.raises(ValueError, match=r"interval is .* weights; the points do not determine it"):
        compute_optimal(fit_size_data(noisy, 100), noisy, 1e18)
    with pytest.raises(ValueError, match="show no optimum"):
        compute_optimal(fit_size_data(grid(sizes=SIZES[:3]), 20), small, 1e18)
