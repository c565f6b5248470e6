"""Points that follow known scaling laws."""

import math

import numpy as np

from jobs.study import scaling
from jobs.study.scaling import ComputePoint

E, A, B, ALPHA, BETA = 1.0, 400.0, 410.0, 0.34, 0.28
SIZES = np.geomspace(3e5, 1e8, 5)
BUDGETS = np.geomspace(1e14, 1e17, 5)


def law(n, d):
    return E + A * n**-ALPHA + B * d**-BETA


def point(run: str, parameters: float, images: float, flops: float, value: float) -> ComputePoint:
    where = {"run": run, "parameters": parameters, "images": images, "flops": flops, "budget": flops}
    return ComputePoint(name="nll", value=value, step=1, passport={}, **where)


def grid(noise: float = 0.0, seed: int = 0, sizes=SIZES, budgets=BUDGETS, seeds: int = 1) -> list[ComputePoint]:
    """Runs that follow L(N, D), each with its own budget; C = 6 N D."""
    rng = np.random.default_rng(seed)
    return [
        point(f"{n:.3g}-{c:.3g}-{s}", n, c / (6 * n), c, law(n, c / (6 * n)) * math.exp(rng.normal(0, noise)))
        for n in sizes
        for c in budgets
        for s in range(seeds)
    ]


def line(noise: float = 0.0, seed: int = 0, budgets: int = 8, seeds: int = 2) -> list[ComputePoint]:
    """Runs that follow IDDPM's published NLL fit over compute."""
    e, k, a = scaling.PAPER["nll"]
    rng = np.random.default_rng(seed)
    return [
        point(f"{c:.3g}-{s}", 1e6, c / 6e6, c, (e + (k * c) ** -a) * math.exp(rng.normal(0, noise)))
        for c in np.geomspace(1e15, 1e20, budgets)
        for s in range(seeds)
    ]
