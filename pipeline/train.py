"""`python -m pipeline.train`: the command line of `pipeline.loop`, under any launcher."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import parse_train
from pipeline.config import TrainConfig, horizon_steps, record
from pipeline.run.interrupted import INTERRUPTED_STATUS

if TYPE_CHECKING:
    from pipeline.distributed.world import World


def main(argv: list[str]) -> None:
    config, dry_run = parse_train(argv)
    # Slow imports come only now, so that --help and usage errors answer at once.
    if dry_run:
        print(describe(config))
        return
    from pipeline.distributed.launch import run_main

    run_main(partial(run, config), config.launch)


def run(config: TrainConfig, world: "World") -> int:
    """Train on one rank; return its exit status."""
    world.catch_signals()
    from pipeline.distributed.ray import report
    from pipeline.loop import train
    from pipeline.prepare import provide_digits

    ray = world.launcher == "ray"
    if ray and "/working_dir_files/" in str(Path(config.out).absolute()) and "://" not in config.out:
        world.say(f"warning: --out {config.out} is in Ray's copy of the working directory; give a URL or absolute path")
    world.only_on_rank0(partial(provide_digits, config))
    return INTERRUPTED_STATUS if train(config, world, report if ray else None) == "interrupted" else 0


def describe(config: TrainConfig) -> str:
    """Describe the resolved configuration and its cost, for `--dry-run`."""
    import torch
    import yaml

    from pipeline.hardware import count

    cost = count(config)
    steps = horizon_steps(config, cost.train)
    images = steps * config.batch_size
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in cost.memory.items())
    lines = [
        yaml.safe_dump(record(config), sort_keys=False).rstrip(),
        "---",
        f"parameters          {cost.parameters:,}",
        f"forward             {cost.forward / 1e9:.2f} GFLOPs per image ({cost.forward / 2e9:.2f} GMACs)",
        f"training            {cost.train / 1e9:.2f} GFLOPs per image, forward and backward",
        f"steps               {steps:,} of {config.batch_size} images = {images:,} images",
        f"total               {float(cost.train * images):.3e} FLOPs",
        f"memory, estimated   {sum(cost.memory.values()) / 2**30:.2f} GiB per rank for forward passes of"
        f" {cost.share} images ({parts})",
        f"devices here        {torch.cuda.device_count()} GPUs",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
