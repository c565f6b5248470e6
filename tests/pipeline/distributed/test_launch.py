"""The same run under torchrun and mpirun, as a user starts them: equal, resumable, and stopped when it should be."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, tiny
from ranks import STRICT, assert_same_run, descendants, newest_step, read

from pipeline.config import LaunchConfig
from pipeline.distributed.launch import connect
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.loop import train
from pipeline.run.interrupted import INTERRUPTED_FILE

BIN = Path(sys.executable).parent
TORCHRUN = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2")
MPIRUN = (str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable)
LAUNCHERS = [
    pytest.param(TORCHRUN, id="torchrun"),
    pytest.param((*MPIRUN, "-m", "mpi4py"), id="mpirun", marks=pytest.mark.mpi),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train the run undisturbed in one process."""
    out = tmp_path_factory.mktemp("reference")
    train(tiny(digits, out, *STRICT), World())
    return str(out)


class Launched:
    """A launcher's process, its ranks and their output."""

    def __init__(self, launcher: tuple[str, ...], digits: str, out: Path, *flags: str) -> None:
        self.log = out.with_suffix(".log")
        command = [*launcher, "-m", "pipeline.train", *TINY, *STRICT, "--data.url", digits, "--out", str(out), *flags]
        # A launcher started by a test must not detect an outer launcher.
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI"))}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, timeout: float = 180) -> int:
        """Wait for the exit status; after the time-out, kill what is left and fail."""
        ranks = descendants(self.process.pid)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in [self.process.pid, *ranks]:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"still there after {timeout} s\n{self.said()}") from None

    def said(self) -> str:
        return self.log.read_text()

    def rank(self, rank: int) -> int:
        """Return the process id of a rank."""
        for pid in descendants(self.process.pid):
            variables = read(f"/proc/{pid}/environ").split("\0")
            if f"RANK={rank}" in variables or f"OMPI_COMM_WORLD_RANK={rank}" in variables:
                return pid
        raise AssertionError(f"no rank {rank}\n{self.said()}")


def until(true: Callable[[], bool], run: Launched, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, run.said()
        assert run.process.poll() is None, run.said()
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_workers_train_the_run_of_one(
    launcher: tuple[str, ...], digits: str, tmp_path: Path, reference: str
) -> None:
    run = Launched(launcher, digits, tmp_path / "out")
    assert run.wait() == 0, run.said()
    assert f"launcher {'mpi' if 'mpi4py' in launcher else 'torchrun'}, 2 x CPU" in run.said()
    assert run.said().count("finished at step 30") == 1  # rank 0 alone
    assert "Warning" not in run.said()
    assert_same_run(tmp_path / "out", reference)


def runs(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    return read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"], ["X"])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_worker_ends_all_and_the_same_command_resumes(
    launcher: tuple[str, ...], digits: str, tmp_path: Path, reference: str
) -> None:
    out = tmp_path / "out"
    run = Launched(launcher, digits, out)
    until(lambda: newest_step(out) >= 10, run)
    ranks = [run.rank(0), run.rank(1)]
    os.kill(ranks[1], signal.SIGKILL)
    assert run.wait() != 0, run.said()
    deadline = time.monotonic() + 60
    while any(runs(pid) for pid in ranks):
        assert time.monotonic() < deadline, "a rank is left behind"
        time.sleep(0.1)
    if launcher == TORCHRUN:  # torchrun gives the others 30 s; mpirun ends them itself
        assert "error: rank 1 died" in run.said()
    assert 10 <= newest_step(out) < 30
    again = Launched(launcher, digits, out)
    assert again.wait() == 0, again.said()
    assert "resuming at step" in again.said()
    assert_same_run(out, reference)


def training(run: Launched, out: Path, step: int) -> bool:
    return "launcher torchrun" in run.said() and newest_step(out) >= step


def test_torchrun_passes_its_signals_on(digits: str, tmp_path: Path) -> None:
    """torchrun always forwards SIGTERM, but SIGUSR1 only with a flag; without it, SIGUSR1 orphans the workers."""
    out = tmp_path / "out"
    handled = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    for number, step in ((signal.SIGUSR1, 10), (signal.SIGTERM, 20)):
        run = Launched((*TORCHRUN, *handled), digits, out, "--horizon", "100000steps")
        until(functools.partial(training, run, out, step), run)
        os.kill(run.process.pid, number)
        assert run.wait() == 1  # torchrun's own: hence the marker
        assert "checkpointed" in run.said()
        assert json.loads((out / INTERRUPTED_FILE).read_text())["step"] == newest_step(out)


@pytest.mark.mpi
def test_mpirun_passes_usr1_on_and_returns_the_status(digits: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Launched(MPIRUN, digits, out, "--horizon", "100000steps")
    until(lambda: newest_step(out) >= 10, run)
    os.kill(run.process.pid, signal.SIGUSR1)
    assert run.wait() == 75
    assert json.loads((out / INTERRUPTED_FILE).read_text())["step"] == newest_step(out)


@pytest.mark.mpi
def test_an_mpi_of_another_make_is_explained(digits: str, tmp_path: Path) -> None:
    """MPICH's mpirun with the wheel's Open MPI: each process sees only itself, and must refuse to train alone."""
    mpirun = shutil.which("mpirun.mpich")
    if not mpirun:
        pytest.skip("needs MPICH's mpirun beside Open MPI's: apt-get install mpich")
    run = Launched((mpirun, "-n", "2", sys.executable), digits, tmp_path / "out")
    assert run.wait() == 1
    assert "mpirun started 2 processes, but mpi4py's MPI library (Open MPI" in run.said()
    assert not (tmp_path / "out").exists()


@pytest.mark.mpi
def test_a_system_open_mpi_works(digits: str, tmp_path: Path, reference: str) -> None:
    mpirun, library = shutil.which("mpirun.openmpi"), Path("/usr/lib/x86_64-linux-gnu/libmpi.so.40")
    if not mpirun or not library.exists():
        pytest.skip("needs the system's Open MPI: apt-get install openmpi-bin")
    launcher = ("env", f"MPI4PY_LIBMPI={library}", mpirun, *MPIRUN[1:])
    run = Launched(launcher, digits, tmp_path / "out")
    assert run.wait() == 0, run.said()
    assert_same_run(tmp_path / "out", reference)


def test_workers_that_only_ray_can_start_are_refused() -> None:
    with pytest.raises(InputError, match=r"--workers: got 8, expected none: .* torchrun --nproc-per-node 8 -m"):
        connect(LaunchConfig(launcher="local", workers=8))
