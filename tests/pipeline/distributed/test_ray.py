"""Programs as Ray jobs on a cluster of two nodes: `ray start` twice, then `ray job submit`."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY, run_module, tiny
from ports import free_port, free_ports
from ranks import STRICT, assert_same_run, descendants, newest_step, read

from jobs.study.file import load_study
from jobs.study.points import load_points
from pipeline.distributed.world import World
from pipeline.loop import train
from pipeline.run.journal import read_journal
from studies import study_file

RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = secrets.token_hex(32)  # because Ray listens on all of the machine's addresses
ENV = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
ENV |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
ENV["PATH"] = f"{Path(sys.executable).parent}:{ENV['PATH']}"  # jobs say `python`


class Cluster:
    """Start two nodes of one CPU each, which share nothing but this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ("port", "dashboard-port", "ray-client-server-port")
        ports = dict(zip(names, free_ports(3), strict=True))
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        # Ray would replace 127.0.0.1 itself by the machine's network address.
        self.head = self._node("head", "127.0.0.2", "--head", "--dashboard-host=127.0.0.1", *flags(ports))
        self._wait(1)
        self.worker = self._node("worker", "127.0.0.3", f"--address=127.0.0.2:{ports['port']}")
        self._wait(2)

    def _node(self, name: str, ip: str, *more: str) -> subprocess.Popen[bytes]:
        folder = self.folder / name
        folder.mkdir()
        command = [RAY, "start", "--block", "--disable-usage-stats", "--num-cpus=1", f"--node-ip-address={ip}"]
        command += [f"--temp-dir={folder}", "--object-store-memory=100000000"]
        # Its workers' default ports, 10002 to 19999, are other tests' too; 0 leaves the choice to Linux.
        command += [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0", *more]
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(command, env=ENV, cwd=folder, stdout=log, stderr=log)

    def _wait(self, nodes: int) -> None:
        def ready() -> bool:
            try:
                found = self.get("/nodes?view=summary")["data"]["summary"]
            except OSError:
                return False
            return sum(node["raylet"].get("state") == "ALIVE" for node in found) == nodes

        until(ready, lambda: "\n".join(log.read_text() for log in self.folder.glob("*.log")))

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def training(self) -> list[int]:
        """Return the process ids of the training workers."""
        both = descendants(self.head.pid) + descendants(self.worker.pid)
        return [pid for pid in both if "RayTrainWorker" in read(f"/proc/{pid}/cmdline")]

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Simulate a power failure. (On SIGTERM, a node waits 30 s for its work to end.)"""
        for pid in [node.pid, *descendants(node.pid)]:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        node.wait()


def flags(values: dict[str, int]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def until(happened: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray puts sockets there, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    made = object.__new__(Cluster)
    try:
        made.__init__(folder)  # type: ignore[misc]
        yield made
    finally:
        for node in ("worker", "head"):
            if hasattr(made, node):
                made.kill(getattr(made, node))
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a clone with files of work in progress."""
    folder = tmp_path_factory.mktemp("code")
    for package in ("iddpm", "pipeline", "jobs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", folder)
    for name in ("runs/digits/checkpoint", "data/digits/train-00000.tar", ".venv/bin/python", "mlflow.db"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("large")
    return folder


class Job:
    """Run `ray job submit` as a user on another machine would, in the clone's root."""

    def __init__(self, cluster: Cluster, code: Path, log: Path, *command: str) -> None:
        self.log, self.address = log, cluster.address
        submit = [RAY, "job", "submit", "--address", self.address, "--runtime-env", "jobs/ray-env.yaml", "--"]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*submit, "python", "-m", *command], env=ENV, cwd=code, stdout=file, stderr=subprocess.STDOUT
            )

    def reaches(self, step: int, out: Path) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.said()
            return newest_step(out) >= step

        until(there, self.said)

    def stop(self) -> None:
        (name,) = set(re.findall(r"raysubmit_\w+", self.said()))
        subprocess.run([RAY, "job", "stop", "--address", self.address, name], env=ENV, check=True, timeout=300)

    def wait(self) -> int:
        try:
            return self.process.wait(600)
        finally:
            self.process.kill()

    def said(self) -> str:
        return self.log.read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_is_submitted_run_by_run(cluster: Cluster, code: Path, digits: str, tmp_path: Path) -> None:
    train = {"data": {"url": digits}, "tracking": {"uri": "none"}, "device": "cpu"}
    path = study_file(code, train, budgets=[2e10], out=str(tmp_path / "s"))

    def submit() -> str:
        command = [sys.executable, "-m", "jobs.study", "run", path.name, "--launcher", "ray"]
        env = ENV | {"RAY_API_SERVER_ADDRESS": cluster.address}
        done = subprocess.run(command, cwd=code, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first, second = (f"s-{value}-2e+10-0" for value in (32, 64))
    assert re.findall(r"(\S+): submitted", submit()) == [first, second]
    subprocess.run([RAY, "job", "stop", "--address", cluster.address, second], env=ENV, check=True, timeout=300)
    assert re.findall(r"(\S+): submitted", submit()) == [second]

    def states() -> dict[str, str]:
        return {job["submission_id"]: job["status"] for job in cluster.get("/api/jobs/")}

    until(lambda: all(states()[job] not in ("PENDING", "RUNNING") for job in (first, second)), lambda: str(states()))
    logs = "\n".join(cluster.get(f"/api/jobs/{job}/logs")["logs"] for job in (first, second))
    assert {states()[job] for job in (first, second)} == {"SUCCEEDED"}, logs
    assert [len(points) for points in load_points(load_study(path)).values()] == [2, 2]
    assert "launcher local, 1 x CPU" in logs
    assert "2 of 2 runs are done" in submit()
    # What a job uploads.
    (shipped,) = cluster.folder.glob("head/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert {p.name for p in shipped.iterdir()} == {"iddpm", "pipeline", "jobs", ".gitignore", "study.yaml"}


@pytest.mark.slow
@pytest.mark.ray
def test_an_evaluation_on_two_nodes_is_that_of_one_process(
    cluster: Cluster, code: Path, small_run: str, tmp_path: Path
) -> None:
    def command(out: str) -> list[str]:  # copies, since a run stores its measurements
        shutil.copytree(small_run, tmp_path / out)
        return ["pipeline.evaluate", str(tmp_path / out), "--images", "32", "--tracking.uri", "none"]

    job = Job(cluster, code, tmp_path / "log", *command("a"), "--workers", "2")
    assert job.wait() == 0, job.said()
    assert "(ip=127.0.0.3" in job.said()
    run_module(*command("b"))
    a, b = ([r for r in read_journal(tmp_path / out) if r["kind"] == "evaluation"][-1] for out in "ab")
    assert a["metrics"] == b["metrics"]


@pytest.mark.slow
@pytest.mark.ray
def test_what_cannot_go_right_is_not_tried_again(cluster: Cluster, code: Path, digits: str, tmp_path: Path) -> None:
    """A user error is not retried, although only rank 0 detects it and Ray sees the other rank die."""
    out = tmp_path / "out"
    train(tiny(digits, out, *STRICT), World())
    wrong = ("--lr", "0.5", "--horizon", "60steps", "--workers", "2", "--data.url", digits, "--out", str(out))
    job = Job(cluster, code, tmp_path / "log", "pipeline.train", *TINY, *STRICT, *wrong)
    assert job.wait() != 0
    assert f"error: --out {out} holds a run with another configuration" in job.said()
    assert "after 3 retries" not in job.said()
    assert newest_step(out) == 30
    # But an error that another machine might not have is retried; here not, since --retries is 0.
    absent = ("--retries", "0", "--workers", "1", "--data.url", str(tmp_path / "absent"), "--out", str(tmp_path / "b"))
    job = Job(cluster, code, tmp_path / "absent.log", "pipeline.train", *TINY, *absent)
    assert job.wait() != 0
    assert "error: after 0 retries" in job.said()


@pytest.mark.slow
@pytest.mark.ray
def test_a_stopped_job_a_killed_worker_and_a_lost_node_change_nothing(
    cluster: Cluster, code: Path, digits: str, tmp_path: Path
) -> None:
    """Last of these tests, since only one node remains. Log lines keep the run slow: Ray takes a report every 2 s."""
    horizon = ("--horizon", "120steps")
    train(tiny(digits, tmp_path / "alone", *STRICT, *horizon), World())
    out = tmp_path / "out"
    command = ["pipeline.train", *TINY, *STRICT, *horizon, "--workers", "2", "--data.url", digits, "--out", str(out)]

    job = Job(cluster, code, tmp_path / "first.log", *command)
    job.reaches(10, out)
    job.stop()
    assert job.wait() == 0, job.said()
    step = json.loads((out / "interrupted.json").read_text())["step"]
    assert newest_step(out) == step < 120

    job = Job(cluster, code, tmp_path / "second.log", *command)
    job.reaches(step + 10, out)
    os.kill(cluster.training()[0], signal.SIGKILL)
    until(lambda: job.said().count("resuming at step") == 2, job.said)
    job.reaches(newest_step(out) + 10, out)
    cluster.kill(cluster.worker)
    assert job.wait() == 0, job.said()
    assert f"resuming at step {step} of 120; launcher ray, 2 x CPU" in job.said()
    assert "(ip=127.0.0.2" in job.said()
    assert "(ip=127.0.0.3" in job.said()
    assert job.said().count("launcher ray, 2 x CPU") == 2
    assert job.said().count("launcher ray, 1 x CPU") == 1
    steps = [record["step"] for record in read_journal(out) if record["kind"] == "metrics"]
    assert steps == sorted(set(steps))
    assert "'train/loss'" in job.said()  # reported to Ray
    assert_same_run(out, tmp_path / "alone")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own modules
def test_the_cluster_file_is_what_ray_up_reads() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "jobs" / "ray-cluster.yaml").read_text()))
    validate_config(config)
    assert (ROOT / config["file_mounts"]["~/requirements.lock"]).is_file()
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    check_flags([part for command in starts for part in command.split(";") if part.strip().startswith("ray ")])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_commands_in_the_documentation_have_real_flags() -> None:
    text = (ROOT / "docs" / "ray.md").read_text().replace("\\\n", " ")
    lines = [line.split("  #")[0] for block in text.split("```sh\n")[1:] for line in block.split("```")[0].splitlines()]
    check_flags([line for line in lines if line.startswith("ray ")])


def check_flags(commands: list[str]) -> None:
    """Each `ray …` in the documents uses a subcommand and flags of the installed Ray."""
    import click
    from ray.scripts.scripts import cli

    assert commands
    for command in commands:
        words = shlex.split(command)[1:]
        found: click.Command = cli
        while isinstance(found, click.Group):
            found = found.commands[words.pop(0)]
        found.make_context(str(found.name), words)
