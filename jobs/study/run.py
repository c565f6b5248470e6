"""Train and measure a study's runs, here, under Slurm or Ray."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from iddpm.bounds import Count, check_bounds
from jobs.study.file import OfStudy, Run, Study, load_study
from jobs.study.plan import count_sizes
from jobs.study.points import measure, missing
from pipeline.errors import InputError, UserError
from pipeline.masking import first_line, mask
from pipeline.prepare import provide_digits
from pipeline.run.interrupted import INTERRUPTED_STATUS, was_interrupted
from pipeline.run.journal import journal_dir
from pipeline.run.mlflow import connect, find_or_create_run


@dataclass(frozen=True)
class Execute(OfStudy):
    """Train and measure the unfinished runs. Running the same command again resumes."""

    launcher: Literal["local", "slurm", "ray"] = "local"
    """local: on this machine; slurm: submit slurm/study.sh as an array; ray: submit a job for each run."""
    jobs: Count = 1
    """Number of simultaneous runs on this machine."""
    only: str | None = None
    """Only one run, by its name or its number from 0, like each task of a Slurm array."""
    prefix: str = ""
    """Prefix for each training command, such as 'srun --mpi=none --kill-on-bad-exit=1'."""

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)


def execute(options: Execute) -> int:
    study = load_study(options.study)
    if options.only is not None:
        return _one(study, _find(study, options.only), shlex.split(options.prefix))
    command = ["python", "-m", "jobs.study", "run", str(options.study), "--only"]
    count_sizes(study)
    todo = [run for run in study.runs if missing(study, run)]
    print(f"{study.name}: {len(study.runs) - len(todo)} of {len(study.runs)} runs are done", flush=True)
    if not todo:
        return 0
    if options.launcher == "ray":
        _submit_jobs(study, todo, options)
        return 0
    _prepare(study)
    if options.launcher == "slurm":
        return _submit_array(study, todo, options.study)

    children = Children()

    def start(run: Run) -> int:
        began = time.monotonic()
        log = journal_dir(run.store) / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
        words = [sys.executable, *command[1:], run.name, "--prefix", options.prefix]
        with log.open("ab") as file:
            status = children.run(words, file, {"OMP_NUM_THREADS": threads, **os.environ})
        said = {0: "done", INTERRUPTED_STATUS: "interrupted"}.get(status, f"failed with status {status}: see {log}")
        print(f"{run.name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
        return status

    # Longest first, so that no core waits for a long run that started last.
    todo.sort(key=lambda run: -run.budgets[-1])
    with ThreadPoolExecutor(options.jobs) as pool:
        statuses = list(pool.map(start, todo))
    return INTERRUPTED_STATUS if INTERRUPTED_STATUS in statuses else int(any(statuses))


def _submit_array(study: Study, todo: Sequence[Run], file: Path) -> int:
    """Submit an array of the runs to Slurm; return sbatch's exit status."""
    numbers = ",".join(str(study.runs.index(run)) for run in todo)
    words = [f"--array={numbers}", f"--job-name={study.name}", "slurm/study.sh", str(file)]
    if not shutil.which("sbatch"):
        raise InputError("--launcher slurm: sbatch is not installed here; submit from a login node of the cluster")
    if not Path("slurm/study.sh").exists():
        raise InputError("--launcher slurm: no slurm/study.sh in this folder; submit from the repository's root")
    return subprocess.run(["sbatch", *words]).returncode


def _submit_jobs(study: Study, todo: Sequence[Run], options: Execute) -> None:
    """Submit a Ray job for each run without a pending or running one, on one GPU (with `device: cpu`, on one CPU)."""
    import yaml
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    out, file = study.runs[0].config.out, options.study.resolve()
    if "://" not in out and not Path(out).is_absolute():
        raise InputError(f"out: got {out}, expected a URL, or an absolute path on a file system that all nodes share")
    if not file.is_relative_to(Path.cwd()):
        raise InputError(f"study: got {file}, expected a file below {Path.cwd()}, the only folder a Ray job uploads")
    _prepare(study)
    env = yaml.safe_load(Path(__file__).parents[1].joinpath("ray-env.yaml").read_text())
    command = ["python", "-m", "jobs.study", "run", str(file.relative_to(Path.cwd())), "--only"]
    prefix = options.prefix or "env -u RAY_JOB_CONFIG_JSON_ENV_VAR"  # train in the job itself, without separate workers
    on_cpu = study.runs[0].config.launch.device == "cpu"
    try:
        client = JobSubmissionClient()
        jobs = {job.submission_id: job.status for job in client.list_jobs()}
        for run in todo:
            name = f"{study.name}-{run.name}"
            if (status := jobs.get(name)) and not status.is_terminal():
                print(f"{name}: already {status.lower()}")
                continue
            if status:
                client.delete_job(name)  # its name is reused
            client.submit_job(
                entrypoint=shlex.join([*command, run.name, "--prefix", prefix]),
                submission_id=name,
                runtime_env=env,
                entrypoint_num_cpus=1,
                entrypoint_num_gpus=0 if on_cpu else 1,
            )
            print(f"{name}: submitted", flush=True)
    except (RuntimeError, RayError) as error:
        raise InputError(f"Ray rejected the job: {first_line(error)}") from error


def _find(study: Study, which: str) -> Run:
    names = [run.name for run in study.runs]
    if which.isdecimal() and which not in names and int(which) < len(names):
        return study.runs[int(which)]
    if which not in names:
        raise InputError(f"--only: got {which!r}, expected 0 to {len(names) - 1}, or one of {', '.join(names)}")
    return study.runs[names.index(which)]


def _prepare(study: Study) -> None:
    """Prepare what concurrent runs share, and check that they can be measured: the data, the image metrics' features,
    the MLflow database, the runs' parent.
    """
    from pipeline.data.shards import load_index
    from pipeline.distributed.world import World
    from pipeline.evaluation.measure import ImageMetrics

    config, options = study.runs[0].config, study.evaluation
    rates = (None, 0, *config.ema_rates)
    if options.ema_rate not in rates:
        raise InputError(f"evaluate.ema_rate: got {options.ema_rate}, expected {', '.join(map(str, rates[2:]))}, or 0")
    study.store.check(write=True, once=True)
    provide_digits(config)
    data = study.evaluation_data
    if "nll" in options.plan.metrics:
        options.nll.check(config.diffusion.timesteps)
        if data.local is None or data.local.exists():  # or only the nodes have it
            load_index(data, options.nll.split)
    if options.plan.image_metrics:
        ImageMetrics(options.plan, config, data, World())
    uri = config.tracking.mlflow_uri
    if uri is None:
        return
    try:
        client = connect(uri)
        client.update_run(find_or_create_run(client, study.name, study.parent, study.name, {}), status="RUNNING")
    except Exception as error:  # a failing tracking server must not stop the study
        reason = mask(str(error))
        print(f"warning: MLflow does not answer ({reason}); the journals in {study.store} are complete", flush=True)


def _one(study: Study, run: Run, prefix: Sequence[str]) -> int:
    """Train a run to each of its budgets in turn and measure it there; report at the end where that is impossible."""
    problems = []
    for budget in missing(study, run):
        children = Children()
        if status := children.run([*prefix, *run.command(budget)]):
            # srun kills the last tasks to exit, and their status hides the others'.
            return INTERRUPTED_STATUS if status > 128 and was_interrupted(run.store) else status
        children.let_go()
        if children.stop:
            return INTERRUPTED_STATUS
        try:
            measure(study, run, budget)
        except UserError as error:
            problems.append(f"{run.name} cannot be measured at {budget:.4g} FLOPs: {error}")
    if problems:
        raise InputError("\n".join(problems))
    return 0


class Children:
    """Child processes. A signal to stop is passed on to them, and no more are started."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self.stop = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._end)

    def let_go(self) -> None:
        """Restore the default signal handlers: from now on a signal ends this process."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)

    def _end(self, number: int, _: object) -> None:
        self.stop = True
        for process in list(self.running):
            # USR1 unchanged, since srun kills its tasks at SIGTERM; Ctrl-C as SIGTERM, since srun does not pass it on.
            process.send_signal(number if number == signal.SIGUSR1 else signal.SIGTERM)

    def run(self, command: Sequence[str], log: IO[bytes] | None = None, env: dict[str, str] | None = None) -> int:
        """Run a command; return its exit status, or INTERRUPTED_STATUS if a signal ended it or prevented its start."""
        if self.stop:
            return INTERRUPTED_STATUS
        # In its own session, so that Ctrl-C reaches it only once, from here.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        self.running.append(process)
        if self.stop:  # the signal came meanwhile
            process.terminate()
        status = process.wait()
        self.running.remove(process)
        # Killed (srun reports above 128) before it could handle the signal.
        return INTERRUPTED_STATUS if self.stop and not 0 <= status <= 128 else status
