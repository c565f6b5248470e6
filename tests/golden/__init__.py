"""The golden values (README.md beside this file), and the denoiser they were made with."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent
MEANS = {"PREVIOUS_X": "x_prev", "START_X": "x_start", "EPSILON": "epsilon"}


@cache
def arrays(name: str = "diffusion") -> dict[str, Any]:
    with np.load(FOLDER / f"{name}.npz") as npz:
        return {key: npz[key] for key in npz.files}


def tensor(key: str) -> Tensor:
    return torch.from_numpy(arrays()[key].copy())


def keys(pattern: str) -> list[str]:
    """Those that begin with `pattern`'s first field and end with its last: "bpd/vb"."""
    first, last = pattern.split("/")
    return [key for key in arrays() if key.startswith(f"{first}/") and key.endswith(f"/{last}")]


@cache
def released() -> dict[str, Any]:
    return json.loads(gzip.decompress((FOLDER / "released_checkpoints.json.gz").read_bytes()))


def denoiser(learns_variance: bool):
    def model(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        eps = 0.9 * x + 0.1 * torch.sin(3 * x + 0.001 * t.to(x.dtype).view(-1, 1, 1, 1))
        return torch.cat([eps, 0.5 * torch.cos(2 * x)], dim=1) if learns_variance else eps

    return model


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; nan where there is a nan."""
    assert got.shape == expected.shape
    got, expected = got.detach(), expected.detach()
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
