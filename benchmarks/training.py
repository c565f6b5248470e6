"""Compare bf16 with fp32, memory over time and the start-up time in short training runs on the digits:
`python -m benchmarks.training`.
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.ranks import Steps, on_ranks
from benchmarks.table import Row, show_with_digits
from pipeline.cli import parse_train
from pipeline.distributed.world import World
from pipeline.run.journal import read_journal

STEPS = 300
SMALL = ["--model.channel-mult", "1", "--model.num-res-blocks", "1", "--batch-size", "8"]


def rows(folder: Path) -> list[Row]:
    """Measure; leaves a trained run in `folder`/fp32."""
    return [*_start(folder), *_precision(folder), _memory()]


def _start(folder: Path) -> list[Row]:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipeline.train", "--help"], check=True, stdout=subprocess.DEVNULL)
    answer = time.perf_counter() - began
    command = "-m pipeline.train --horizon 2steps --log-every 1 --sample-steps 1 --sample-count 1 --tracking.uri none"
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command.split(), "--out", str(folder / "start"), "--data.url", str(folder / "digits")],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        first = next(time.perf_counter() - began for line in process.stdout if line.startswith("step 1/"))
        process.communicate()
    return [
        Row("train --help", f"{answer:.2f} s", "1.5 s", answer / 1.5, 1.0, at_most=True),
        Row("command to first step", f"{first:.1f} s", "10 s", first / 10, 1.0, at_most=True),
    ]


def _precision(folder: Path) -> list[Row]:
    """Compare the mean loss over the last third of 300 steps in bf16 and with another seed."""
    loss = {}
    for name, flags in {"fp32": [], "seed": ["--seed", "1"], "bf16": ["--precision", "bf16"]}.items():
        fixed = f"--horizon {STEPS}steps --log-every 10 --sample-steps 1 --sample-count 1 --tracking.uri none"
        where = ["--out", str(folder / name), "--data.url", str(folder / "digits")]
        command = [sys.executable, "-m", "pipeline.train", *fixed.split(), *where, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        losses = [r["metrics"]["train/loss"] for r in read_journal(folder / name) if r["kind"] == "metrics"]
        loss[name] = statistics.mean(losses[-len(losses) // 3 :])
    apart, noise = abs(loss["bf16"] - loss["fp32"]), abs(loss["seed"] - loss["fp32"])
    against = f"between seeds {noise:.5f}"
    return [Row(f"loss of bf16 minus fp32, {STEPS} steps", f"{apart:.5f}", against, apart / noise, 1.0, at_most=True)]


def _memory() -> Row:
    """Compare, in a separate process, the peak memory after a thousand steps with that after a hundred."""
    early, late = on_ranks(1, _peaks)
    return Row(
        "memory after 1,000 steps", f"{late:.0f} MB", f"after 100: {early:.0f} MB", late / early, 1.01, at_most=True
    )


def _peaks(world: World) -> list[float]:
    """Return the peak MB after 100 and after 1,000 steps."""
    steps, peaks = Steps(parse_train(SMALL)[0], world), []
    for count in (100, 900):
        for _ in range(count):
            steps.step()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks


if __name__ == "__main__":
    show_with_digits(rows)
