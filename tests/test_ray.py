"""The same run as a Ray job: `ray start --head`, then `ray job submit -- python -m pipeline.train`."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TINY, tiny
from ranks import STRICT, assert_same_run, descendants, free_port, newest_step, read

from pipeline.launch import _work
from pipeline.loop import train
from pipeline.world import World

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RAY = str(Path(sys.executable).with_name("ray"))
ENV = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, int]]:
    """A cluster of one node: its address for jobs, and the process id of its head."""
    # Ray puts sockets there, whose paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    ports = {name: free_port() for name in ("port", "dashboard-port", "ray-client-server-port")}
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2", "--temp-dir", str(folder)]
    command += ["--dashboard-host=127.0.0.1", "--object-store-memory=200000000"]
    # 127.0.0.1 itself Ray replaces by the machine's address on the network.
    command += ["--node-ip-address=127.0.0.2"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=ENV, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        deadline = time.monotonic() + 120
        while not answers(f"{address}/api/version"):
            assert head.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.5)
        yield address, head.pid
    finally:
        head.terminate()
        try:
            head.wait(60)
        finally:
            head.kill()
            shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a job ships: the packages, not this repository's other folders."""
    folder = tmp_path_factory.mktemp("code")
    for package in ("iddpm", "pipeline"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return str(folder)


class Job:
    def __init__(self, address: str, code: str, digits: str, out: Path, *flags: str) -> None:
        self.log = out.with_suffix(".log")
        command = [RAY, "job", "submit", "--address", address, "--working-dir", code, "--"]
        command += [sys.executable, "-m", "pipeline.train", "--preset", "digits", *TINY, *STRICT, "--workers", "2"]
        command += ["--data.url", digits, "--out", str(out), *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=ENV, stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> int:
        try:
            return self.process.wait(300)
        finally:
            self.process.kill()

    def said(self) -> str:
        return self.log.read_text()


def test_a_job_trains_the_run_of_one_and_survives_a_killed_worker(
    cluster: tuple[str, int], code: str, digits: str, tmp_path: Path
) -> None:
    """One job for both: starting Ray's workers takes most of a minute."""
    train(tiny(digits, tmp_path / "alone", *STRICT, "--horizon", "40steps"), World())
    out = tmp_path / "out"
    job = Job(cluster[0], code, digits, out, "--horizon", "40steps")
    deadline = time.monotonic() + 240
    while newest_step(out) < 10:
        assert time.monotonic() < deadline, job.said()
        assert job.process.poll() is None, job.said()
        time.sleep(0.05)
    os.kill(workers(cluster[1])[-1], signal.SIGKILL)
    assert job.wait() == 0, job.said()
    said = job.said()
    assert "Ray: 2 workers on a cluster with 0 GPUs and 2 CPUs" in said
    assert "launcher ray, 2 x CPU" in said
    assert said.count("step 40/40 loss") == 1
    assert "resuming at step" in said
    assert "'train/loss'" in said  # reported to Ray
    assert_same_run(out, tmp_path / "alone")


def workers(head: int) -> list[int]:
    """The process ids of the cluster's training workers."""
    return [pid for pid in descendants(head) if "RayTrainWorker" in read(f"/proc/{pid}/cmdline")]


def test_what_cannot_go_right_is_not_tried_again(digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker returns such an error; Ray tries again only after one that is raised."""
    import ray.train

    class Context:
        get_world_rank = get_local_rank = staticmethod(lambda: 0)
        get_world_size = get_local_world_size = staticmethod(lambda: 1)

    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(World, "catch_signals", lambda self: None)
    cpu = ("--device", "cpu")
    wrong = tiny(digits, tmp_path / "out", *cpu, "--model.image-size", "16")
    assert "its images are (1, 8, 8)" in _work(wrong, str(Path.cwd()))
    absent = tiny(str(tmp_path / "absent"), tmp_path / "out", *cpu)
    with pytest.raises(OSError, match="absent"):
        _work(absent, str(Path.cwd()))
