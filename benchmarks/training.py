"""Short trainings of the digits: bf16 beside fp32, memory, and how soon the first step comes:
`python -m benchmarks.training`.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.table import Row, show
from pipeline.config import parse_train
from pipeline.data import Batch
from pipeline.loop import TrainState, train_step
from pipeline.prepare import prepare_digits
from pipeline.world import World

STEPS = 300
SMALL = ["--model.channel-mult", "1", "--model.num-res-blocks", "1", "--batch-size", "8"]


def rows(folder: Path) -> list[Row]:
    """Leaves a trained run in `folder`/fp32."""
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
    """The mean loss of the last third of 300 steps, in bf16 and with another seed."""
    loss = {}
    for name, flags in {"fp32": [], "seed": ["--seed", "1"], "bf16": ["--precision", "bf16"]}.items():
        fixed = f"--horizon {STEPS}steps --log-every 10 --sample-steps 1 --sample-count 1 --tracking.uri none"
        where = ["--out", str(folder / name), "--data.url", str(folder / "digits")]
        command = [sys.executable, "-m", "pipeline.train", *fixed.split(), *where, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        records = [json.loads(line) for line in (folder / name / "journal.jsonl").read_text().splitlines()]
        losses = [r["metrics"]["train/loss"] for r in records if r["kind"] == "metrics"]
        loss[name] = statistics.mean(losses[-len(losses) // 3 :])
    apart, noise = abs(loss["bf16"] - loss["fp32"]), abs(loss["seed"] - loss["fp32"])
    against = f"between seeds {noise:.5f}"
    return [Row(f"loss of bf16 less fp32, {STEPS} steps", f"{apart:.5f}", against, apart / noise, 1.0, at_most=True)]


def _memory() -> Row:
    """Of a thousand steps, the peak of the last 900 over that of the first hundred."""
    state, world = TrainState(parse_train(SMALL)[0], World()), World()
    index = torch.arange(8)
    batch = Batch(torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8), torch.zeros(8).long(), index, index)
    for step in range(1000):
        train_step(state, batch, world)
        if step == 100:
            early = _peak_mb()
    late = _peak_mb()
    return Row(
        "memory after 1,000 steps", f"{late:.0f} MB", f"after 100: {early:.0f} MB", late / early, 1.01, at_most=True
    )


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare_digits(f"{folder}/digits")
        print(show(rows(Path(folder))))


if __name__ == "__main__":
    main()
