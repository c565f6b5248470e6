"""The batch scripts of slurm/, and the same run under srun, on a real, private Slurm with two nodes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, tiny
from ranks import STRICT, assert_same_run, newest_step

from jobs.study.file import load_study
from jobs.study.points import load_points
from pipeline.distributed.world import World, pick_device
from pipeline.loop import train
from pipeline.run.interrupted import INTERRUPTED_FILE
from pipeline.run.journal import read_journal
from slurm import Slurm, private_slurm

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

LONG = [*STRICT, "--horizon", "100steps", "--checkpoint-every", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with private_slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    yield cluster
    cluster.run("scancel", "--state=PENDING")  # left by a failed test
    cluster.run("scancel", "--state=RUNNING")


@pytest.fixture(scope="module")
def reference(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train the run undisturbed in one process."""
    out = tmp_path_factory.mktemp("reference")
    train(tiny(digits, out, *LONG), World())
    return str(out)


class Job:
    """A job of slurm/train_imagenet64.sh: a tiny digits run in `out`, with one task on each of two nodes."""

    def __init__(self, slurm: Slurm, digits: str, out: Path) -> None:
        self.slurm, self.out, self.log = slurm, out, out.with_suffix(".log")
        options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", f"--output={self.log}"]
        self.flags = ["--preset", "digits", *TINY, *LONG, "--data.url", digits, "--out", str(out)]
        self.id = slurm.run("sbatch", "--parsable", *options, "slurm/train_imagenet64.sh", *self.flags).strip()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, true: Callable[[], bool], what: str) -> None:
        try:
            self.slurm.until(true, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}\n{self.slurm.job(self.id)}") from None

    def train(self, steps: int) -> None:
        """Wait until this attempt has committed this many more steps."""
        there = newest_step(self.out)
        self.until(lambda: newest_step(self.out) >= there + steps, f"{steps} steps beyond {there}")

    def restarted(self, times: int) -> None:
        self.until(lambda: self.slurm.job(self.id)["Restarts"] == str(times), f"restart {times}")

    def ended(self, state: str) -> None:
        self.until(lambda: self.slurm.job(self.id)["JobState"] == state, f"state {state}")


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck: apt-get install shellcheck")
def test_the_scripts_pass_shellcheck() -> None:
    scripts = [".ci/run", *(str(path.relative_to(ROOT)) for path in (ROOT / "slurm").glob("*.sh"))]
    assert len(scripts) == 6
    result = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_a_run_goes_on_through_time_limit_lost_node_and_requeue(
    slurm: Slurm, digits: str, tmp_path: Path, reference: str
) -> None:
    """One job on two nodes, interrupted three times, ends as the undisturbed run, with one history."""
    job = Job(slurm, digits, tmp_path / "out")
    job.train(5)
    # Held, so that it does not finish before Slurm checks the limit, twice a minute.
    held = slurm.tasks(job.id)
    assert len(held) == 2
    signal_all(held, signal.SIGSTOP)
    minutes = int(slurm.job(job.id)["RunTime"].split(":")[1])
    slurm.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes + 2}")
    job.until(lambda: "warned by Slurm" in job.said(), "warning")
    signal_all(held, signal.SIGCONT)
    job.restarted(1)
    assert f"interrupted: requeueing job {job.id}" in job.said()
    slurm.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=UNLIMITED")

    job.train(5)
    slurm.lose("node2", job.id)
    slurm.boot("node2")
    job.restarted(2)

    job.train(5)
    slurm.run("scontrol", "requeue", job.id)
    job.restarted(3)

    job.ended("COMPLETED")
    said = job.said()
    assert said.count("launcher slurm, 2 x CPU") == 4
    assert said.count("resuming at step") == 3
    assert said.count("interrupted: requeueing") == 1
    assert said.count("finished at step 100") == 1
    assert_same_run(job.out, reference)
    records = read_journal(job.out)
    assert [r["kind"] for r in records].count("run") == 1
    steps = [r["step"] for r in records if r["kind"] == "metrics"]
    assert steps == sorted(set(steps))


def test_a_cancelled_run_stays_down_until_it_is_started_again(
    slurm: Slurm, digits: str, tmp_path: Path, reference: str
) -> None:
    """The run resumes inside salloc, on another number of nodes."""
    job = Job(slurm, digits, tmp_path / "out")
    job.train(5)
    slurm.run("scancel", job.id)
    job.ended("CANCELLED")
    slurm.until(lambda: not slurm.run("squeue", "--noheader"), "an empty queue")
    assert slurm.job(job.id)["Restarts"] == "0"
    assert "checkpointed" in job.said()
    assert "requeueing" not in job.said()
    salloc = ["salloc", "--quiet", "--ntasks-per-node=2", "--gpus-per-node=2"]
    said = slurm.run(*salloc, "bash", "slurm/train_imagenet64.sh", *job.flags, timeout=180)
    assert "resuming at step" in said
    assert_same_run(job.out, reference)


@pytest.mark.parametrize(("attempt", "interrupted"), [("1.2", True), ("1.1", False), ("7.2", False), (None, False)])
def test_the_run_says_itself_whether_it_was_interrupted(tmp_path: Path, attempt: str | None, interrupted: bool) -> None:
    """The mark also says which start of which job was interrupted."""
    if attempt:
        (tmp_path / INTERRUPTED_FILE).write_text(json.dumps({"step": 1, "attempt": attempt}))
    command = 'source slurm/job.sh; source slurm/environment.sh; was_interrupted "$@"'
    words = ["bash", "-c", command, "-", "--preset", "digits", "--out", str(tmp_path), "--lr", "1e-3"]
    result = subprocess.run(words, cwd=ROOT, env=os.environ | {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "2"})
    assert result.returncode == (0 if interrupted else 1)


def test_which_jobs_start_again(slurm: Slurm, tmp_path: Path) -> None:
    """Interrupted jobs are requeued as often as allowed, failed ones are not; in an array, only the task is."""

    def submit(name: str, command: str, *options: str) -> str:
        script = tmp_path / f"{name}.sh"
        script.write_text(f"#!/bin/bash\nsource slurm/job.sh\npatience=1\nrun bash -c '{command}'\nfinish\n")
        common = ("--requeue", "--open-mode=append", f"--output={tmp_path}/{name}.log")
        return slurm.run("sbatch", "--parsable", *common, *options, str(script)).strip()

    once = '[ "$SLURM_RESTART_COUNT" ] && exit 0; '
    jobs = {
        "interrupted": submit("interrupted", "exit 75", "--export=ALL,MAX_RESTARTS=1"),
        "failed": submit("failed", "exit 3"),
        "killed": submit("killed", "kill -KILL $$"),
        "deaf": submit("deaf", f'{once} trap "" USR1; touch {tmp_path}/deaf; sleep 300 & wait'),
        "early": submit("early", f"{once} touch {tmp_path}/early; exec sleep 300"),
    }
    array = submit("array", f"{once} [ $SLURM_ARRAY_TASK_ID = 1 ] && exit 75; exit 0", "--array=0-1")
    for name in ("deaf", "early"):  # the first ignores the warning, the second dies of it
        slurm.until((tmp_path / name).exists, name)
        slurm.run("scancel", "--batch", "--signal=USR1", jobs[name])
    slurm.until(lambda: not slurm.run("squeue", "--noheader"), "an empty queue")
    jobs |= {"task 0": f"{array}_0", "task 1": f"{array}_1"}
    found = {name: slurm.job(job) for name, job in jobs.items()}
    assert {name: (job["Restarts"], job["ExitCode"]) for name, job in found.items()} == {
        "interrupted": ("1", "75:0"),
        "failed": ("0", "3:0"),
        "killed": ("0", "137:0"),
        "deaf": ("1", "0:0"),
        "early": ("1", "0:0"),
        "task 0": ("0", "0:0"),
        "task 1": ("1", "0:0"),
    }
    assert "restarted 1 times" in (tmp_path / "interrupted.log").read_text()


def test_a_study_is_an_array_that_goes_on_after_preemption(slurm: Slurm, digits: str, tmp_path: Path) -> None:
    content = {"name": "s", "values": [32, 64], "budgets": [1.5e11], "out": str(tmp_path / "s")}
    settings = {"batch_size": 8, "warmup_steps": 0, "ema_rates": [0.5], "log_every": 1, "checkpoint_every": 50}
    settings |= {"sample_count": 4, "sample_steps": 4, "device": "cpu", "data": {"url": digits}}
    settings |= {"model": {"channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": []}}
    settings |= {"diffusion": {"timesteps": 20}, "tracking": {"uri": "none"}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content | {"train": settings, "evaluate": {"images": 4, "exact": True}}))
    command = (sys.executable, "-m", "jobs.study", "run", str(file), "--launcher", "slurm")
    slurm.env["SBATCH_OUTPUT"] = f"{tmp_path}/%a.log"
    said = slurm.run(*command)
    array = said.split()[-1]
    assert said.endswith(f"Submitted batch job {array}\n")

    folders = [tmp_path / "s" / run.name for run in load_study(file).runs]
    slurm.until(lambda: all(any(r["kind"] == "metrics" for r in read_journal(f)) for f in folders), "two runs")
    held = slurm.tasks(array)
    assert len(held) == 2
    signal_all(held, signal.SIGSTOP)
    slurm.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    slurm.until(lambda: all("warned by Slurm" in log.read_text() for log in logs), "warnings")
    signal_all(held, signal.SIGCONT)
    slurm.until(lambda: not slurm.run("squeue", "--noheader"), "an empty queue")
    for task, log in enumerate(logs):
        text = log.read_text()
        assert f"interrupted: requeueing job {array}_{task}" in text
        assert text.count("resuming at step") == 1, text
        assert slurm.job(f"{array}_{task}")["JobState"] == "COMPLETED", text
    (points,) = load_points(load_study(file)).values()
    assert len(points) == 2
    assert all(1.5e11 <= point.flops < 1.52e11 for point in points)
    assert "2 of 2 runs are done" in slurm.run(*command)


def test_an_evaluation_over_two_nodes(slurm: Slurm, reference: str, tmp_path: Path) -> None:
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", f"--output={tmp_path}/log"]
    flags = ["--images", "16", "--tracking.uri", "none"]
    job = slurm.run("sbatch", "--parsable", *options, "slurm/evaluate.sh", reference, *flags).strip()
    slurm.until(lambda: slurm.job(job)["JobState"] == "COMPLETED", "end")
    assert "16 images" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("options", ["--gpus-per-node=4", "--gpus-per-task=1", "--gpus-per-node=4 --gpu-bind=single:1"])
def test_each_task_takes_a_gpu_of_its_own(slurm: Slurm, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    """Works whether Slurm shows a task all the GPUs of its node, or one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    show = "echo $SLURM_NODEID $SLURM_LOCALID $SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES"
    taken = set()
    for line in slurm.run(
        "srun", "--nodes=2", "--ntasks-per-node=4", *options.split(), "bash", "-c", show
    ).splitlines():
        node, local_rank, gpus, visible = line.split()
        assert gpus == "4"
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: len(visible.split(",")))
        taken.add((node, visible.split(",")[pick_device("cuda", int(local_rank)).index]))
    assert len(taken) == 8


# ------------------------------------------------------------------------------------- srun itself


def srun(slurm: Slurm, nodes: int, digits: str, out: Path) -> subprocess.Popen[str]:
    command = ["srun", f"-N{nodes}", "-n2", "--kill-on-bad-exit=1", sys.executable, "-m", "pipeline.train"]
    command += [*TINY, *LONG, "--data.url", digits, "--out", str(out)]
    return subprocess.Popen(
        command, cwd=ROOT, env=slurm.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def said(run: subprocess.Popen[str]) -> str:
    try:
        return run.communicate(timeout=180)[0]
    finally:
        run.kill()


def test_a_node_whose_name_does_not_resolve_is_explained(
    slurm: Slurm, digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(slurm.env, "MASTER_ADDR")
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
    output = said(run)
    assert run.returncode != 0
    assert 10 <= newest_step(out) < 100, output
    again = srun(slurm, 1, digits, out)
    output = said(again)
    assert again.returncode == 0, output
    assert "resuming at step" in output
    assert_same_run(out, reference)


def task(rank: int, out: str) -> int:
    """Return the process id of a task of this run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_text().split("\0")
            arguments = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue  # ended meanwhile, or not ours
        if f"SLURM_PROCID={rank}" in variables and out in arguments and "srun" not in arguments[0]:
            return int(process.name)
    raise AssertionError(f"no task {rank}")
