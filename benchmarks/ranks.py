"""Training steps on a fixed batch, and groups of local processes to run them in."""

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ranks import Ranks

from pipeline.config import LaunchConfig, TrainConfig
from pipeline.data.stream import Batch
from pipeline.distributed.launch import run_main
from pipeline.distributed.world import World
from pipeline.step import TrainState, train_step


class Steps:
    """This project's training step, repeated on this rank's share of one random batch."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.state, self.world = TrainState(config, world), world
        model, index = config.model, torch.arange(*world.share(config.batch_size))
        shape = (len(index), model.in_channels, model.image_size, model.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        self.batch = Batch(images, torch.zeros(len(index)).long(), index, index)

    def step(self) -> None:
        train_step(self.state, self.batch, self.world)
        self.state.ema.update(self.state.params, self.state.step)


def on_ranks(size: int, function: Callable[..., Any], *arguments: object) -> Any:
    """Run `function(world, *arguments)` on `size` single-threaded processes; return rank 0's result, which must be JSON
    data.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, config = Path(folder) / "result.json", LaunchConfig(launcher="torchrun", device="cpu")
        body = functools.partial(_write, out, function, arguments)
        with Ranks(size, Path(folder), run_main, body, config) as ranks:
            statuses = ranks.join(600)
            if any(status != 0 for status in statuses):
                said = "".join(ranks.said(rank) for rank in range(size))
                raise SystemExit(f"error: some of {size} workers failed, exit statuses {statuses}\n{said}")
        return json.loads(out.read_text())


def _write(out: Path, function: Callable[..., Any], arguments: tuple[Any, ...], world: World) -> None:
    result = function(world, *arguments)
    if world.rank == 0:
        out.write_text(json.dumps(result))
