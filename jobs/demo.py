"""`make demo`: from real images to a trained model, its samples and its bits/dim, all on this machine."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import DEFAULT_URI, TrackingConfig
from pipeline.masking import mask

RUN = "runs/demo"
STEPS = (500, 1000, 3000)
IMAGES = 32  # validation images for the exact bits/dim, which evaluates the network at every timestep


def demo(steps: Sequence[int] = STEPS, images: int = IMAGES) -> None:
    """Run every command, evaluating after each of `steps`, of which the last ends the training."""
    print("1. Write scikit-learn's handwritten digits as WebDataset shards", flush=True)
    run("pipeline.prepare", "digits", "--out", "data/digits")

    print(f"\n2. Train {steps[-1]} steps of L_hybrid", flush=True)
    run("pipeline.train", "--out", RUN, "--horizon", f"{steps[-1]}steps", "--keep-every", "500")

    print("\n3. Evaluate bits/dim of the EMA on validation images at several training steps", flush=True)
    for step in steps:
        run("pipeline.evaluate", RUN, "--step", str(step))
    run("pipeline.evaluate", RUN, "--exact", "--images", str(images))

    print("\n4. Draw samples and learning curves", flush=True)
    run("pipeline.sample", RUN, "--out", f"{RUN}/grid.png", "--steps", "250")
    run("jobs.curves", f"{RUN}/curves.png", RUN)

    print(
        f"\nOpen   {Path(RUN).resolve()}/grid.png       64 generated digits"
        f"\n       {Path(RUN).resolve()}/curves.png     learning curves"
    )
    uri = TrackingConfig().mlflow_uri
    if uri == DEFAULT_URI:
        ui = f"{Path(sys.executable).parent}/mlflow ui --backend-store-uri {uri}"
        print(f"Compare runs with   {ui}\n                    and open http://127.0.0.1:5000")
    elif uri:
        print(f"Compare runs in MLflow at {mask(uri)}")


def run(module: str, *flags: str) -> None:
    command = [sys.executable, "-m", module, *flags]
    print(f"$ {shlex.join(['python', *command[1:]])}", flush=True)
    status = subprocess.run(command).returncode
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    argparse.ArgumentParser("python -m jobs.demo", description=__doc__).parse_args()
    demo()
