"""The same run under srun, on a real private Slurm of two nodes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TINY, tiny
from ranks import STRICT, assert_same_run, newest_step
from slurm import Slurm, private_slurm

from pipeline.loop import train
from pipeline.world import World

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with private_slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def reference(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("reference")
    train(tiny(digits, out, *STRICT), World())
    return str(out)


def srun(slurm: Slurm, nodes: int, digits: str, out: Path, *flags: str, **env: str) -> subprocess.Popen[str]:
    command = ["srun", f"-N{nodes}", "-n2", "--kill-on-bad-exit=1", sys.executable, "-m", "pipeline.train"]
    command += [*TINY, *STRICT, "--data.url", digits, "--out", str(out), *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=slurm.env | {"OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(run: subprocess.Popen[str], timeout: float = 180) -> str:
    try:
        return run.communicate(timeout=timeout)[0]
    finally:
        run.kill()


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_tasks_train_the_run_of_one(slurm: Slurm, nodes: int, digits: str, tmp_path: Path, reference: str) -> None:
    # The nodes' names are not in any DNS; real ones are, and need no MASTER_ADDR.
    env = {"MASTER_ADDR": "127.0.0.1"} if nodes == 2 else {}
    run = srun(slurm, nodes, digits, tmp_path / "out", **env)
    output = said(run)
    assert run.returncode == 0, output + slurm.logs()
    assert "launcher slurm, 2 x CPU" in output
    assert output.count("finished at step 30") == 1
    assert_same_run(tmp_path / "out", reference)


def test_a_node_whose_name_does_not_resolve_is_explained(slurm: Slurm, digits: str, tmp_path: Path) -> None:
    run = srun(slurm, 2, digits, tmp_path / "out")
    output = said(run)
    assert run.returncode != 0
    assert "the name of rank 0's node, 'node1', does not resolve here; set MASTER_ADDR" in output


def test_a_killed_task_ends_the_step_and_the_same_command_resumes(
    slurm: Slurm, digits: str, tmp_path: Path, reference: str
) -> None:
    out = tmp_path / "out"
    run = srun(slurm, 1, digits, out)
    deadline = time.monotonic() + 120
    while newest_step(out) < 10:
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.05)
    os.kill(task(1, str(out)), signal.SIGKILL)
    output = said(run, 60)
    assert run.returncode != 0
    assert 10 <= newest_step(out) < 30, output
    again = srun(slurm, 1, digits, out)
    output = said(again)
    assert again.returncode == 0, output
    assert "resuming at step" in output
    assert_same_run(out, reference)


def task(rank: int, out: str) -> int:
    """The process id of a task of this run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_text().split("\0")
            arguments = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue  # ended meanwhile, or not ours
        if f"SLURM_PROCID={rank}" in variables and out in arguments and "srun" not in arguments[0]:
            return int(process.name)
    raise AssertionError(f"no task {rank}")
