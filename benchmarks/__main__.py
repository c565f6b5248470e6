"""Run all benchmarks and print one table: `python -m benchmarks`, or `make bench`. Results are ratios to peers and
limits measured in the same run, because machines differ and are noisy; a ratio that misses its goal is marked.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import checkpoint, data, nll, sampler_sync, scaling, step, tracking, training
from benchmarks.table import Row, here, show
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
            "several processes": scaling.rows,
            "tracking": lambda: tracking.rows(folder),
            "data": data.rows,
            "checkpoints": checkpoint.rows,
        }.items():
            print(f"measuring: {what} ...", flush=True)
            rows += measure()
    print(f"\n{here()}\n\n{show(rows)}")


if __name__ == "__main__":
    argparse.ArgumentParser("python -m benchmarks", description=__doc__).parse_args()
    main()
