"""All benchmarks in one table: `python -m benchmarks`, or `make bench`. Ratios against peers and limits measured in
the same run, since machines differ and are noisy; a ratio that misses its goal is marked.
"""

import platform
import subprocess
import tempfile
from datetime import date
from pathlib import Path

import torch

from benchmarks import checkpoint, data, nll, sampler_sync, step, training
from benchmarks.table import Row, show
from pipeline.prepare import prepare_digits


def main() -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_digits(f"{folder}/digits")
        for what, measure in {
            "training step and sampling": step.rows,
            "start, precision, memory": lambda: training.rows(folder),
            "bits/dim": lambda: nll.rows(str(folder / "fp32"), images=32, seeds=40),
            "timestep sampler": sampler_sync.rows,
            "data": data.rows,
            "checkpoints": checkpoint.rows,
        }.items():
            print(f"measuring: {what} ...", flush=True)
            rows += measure()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"\n{date.today()}, {commit}, {_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(show(rows))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
