"""Convert published weights: `python -m pipeline.convert openai FILE.pt --preset NAME --out RUN [flags of training]`.

Writes a published improved-diffusion model (.pt, tensors only) as a run with one checkpoint, which `pipeline.sample`
and `pipeline.evaluate` accept like any other. The preset and flags describe the model, as for pipeline.train; names and
shapes are checked. Published files hold a moving average of the weights, which becomes the average of the run's first
--ema-rates.
"""

import sys
import uuid

import torch

from iddpm.openai import load_published
from pipeline.cli import errors_exit, fail_usage, parse_train
from pipeline.config import TrainConfig, record
from pipeline.errors import InputError
from pipeline.model import ema_part
from pipeline.run.checkpoint import Checkpoints, Parts
from pipeline.storage.store import Store


def convert(path: str, config: TrainConfig) -> None:
    """Write a file's weights as a checkpoint of the run at `config.out`.

    Raises InputError if they do not fit the model, or if the run already has a checkpoint.
    """
    try:
        weights = load_published(path, config.model, config.out_channels)
    except ValueError as error:
        raise InputError(str(error)) from error
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    run = Store(config.out, config.storage)
    run.check(write=True, once=True)
    checkpoints = Checkpoints(run)
    if checkpoints.committed():
        raise InputError(f"--out {config.out}: already has a checkpoint; give another")
    meta = {
        "images": 0,
        "config": record(config),
        "uid": uuid.uuid4().hex,
        "dataset_digest": "",
        "source": path,
        "torch": torch.__version__,
    }
    parts: Parts = {"model": weights, **{ema_part(rate): weights for rate in config.ema_rates[:1]}}
    writer = checkpoints.claim({"launcher": "convert", "world_size": 1})
    writer.save(0, parts, meta, keep_last=1, keep_every=None)
    writer.close()
    print(f"{path}: {sum(t.numel() for t in weights.values()):,} parameters written as a checkpoint of {config.out}")


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        raise SystemExit(0)
    if len(argv) < 2 or argv[0] != "openai":
        fail_usage(InputError("expected openai FILE.pt --preset NAME --out RUN; see --help"))
    if not any(arg.split("=")[0] == "--out" for arg in argv):
        fail_usage(InputError("--out: expected a folder or URL for the run"))
    config, dry_run = parse_train(argv[2:])
    if dry_run:
        fail_usage(InputError("--dry-run: not supported by pipeline.convert"))
    with errors_exit():
        convert(argv[1], config)


if __name__ == "__main__":
    main(sys.argv[1:])
