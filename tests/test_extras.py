"""A laptop needs no extra to train, sample and evaluate on local files; what needs one names it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from pipeline.errors import EXTRAS

WITHOUT = f"""
import runpy, sys
sys.modules |= dict.fromkeys({list(EXTRAS)})  # an import of these fails as if they were not installed
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run(folder: Path, module: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, module, *flags],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_train_sample_and_evaluate_without_any_extra(tmp_path: Path) -> None:
    flags = [*TINY, "--data.url", "data/digits", "--out", "run"]
    flags.remove("--tracking.uri")
    flags.remove("none")
    trained = run(tmp_path, "pipeline.train", *flags)
    assert trained.returncode == 0, trained.stderr
    assert "mlflow is not installed: pip install 'iddpm-pipeline[mlflow]'; the history is in run/" in trained.stdout
    for module, more in (("sample", ["--out", "grid.png", "--count", "4"]), ("evaluate", ["--images", "4"])):
        result = run(tmp_path, f"pipeline.{module}", "run", *more)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "grid.png").stat().st_size > 100
    result = run(tmp_path, "jobs.curves", "curves.png", "run")
    assert (result.returncode, result.stderr) == (1, error("matplotlib", "figures"))


def error(package: str, extra: str) -> str:
    return f"error: {package} is not installed: pip install 'iddpm-pipeline[{extra}]'\n"


@pytest.mark.parametrize(
    ("package", "extra", "flags"),
    [
        ("s3fs", "s3", ["pipeline.train", "--out", "s3://bucket/run"]),
        ("ray", "ray", ["pipeline.train", "--launcher", "ray"]),
        ("mpi4py", "mpi", ["pipeline.train", "--launcher", "mpi"]),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, package: str, extra: str, flags: list[str]) -> None:
    result = run(tmp_path, *flags)
    assert result.returncode == 1
    assert result.stderr.endswith(error(package, extra)), result.stderr
