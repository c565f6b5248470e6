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
from typing import IO, Any, Literal

from iddpm.bounds import Count, check_bounds
from jobs.study.file import OfStudy, Run, Study, load_study
from jobs.study.plan import count_sizes
from jobs.study.points import measure_point, missing
from pipeline.errors import InputError, UserError
from pipeline.masking import first_line
from pipeline.prepare import provide_digits
from pipeline.run.interrupted import INTERRUPTED_STATUS, was_interrupted
from pipeline.run.journal import journal_dir
from pipeline.run.mlflow import update_parent

RAY_ENV = Path(__file__).parents[1] / "ray-env.yaml"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # to stop


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
    # One run, in a process that this function started below, or that a cluster did.
    study = load_study(options.study)
    if options.only is not None:
        return _train_and_measure(study, _find(study, options.only), shlex.split(options.prefix))

    # What is left to do. Sizes that cannot be told apart and points of other configurations are refused here.
    count_sizes(study)
    todo = [run for run in study.runs if missing(study, run)]
    print(f"{study.name}: {len(study.runs) - len(todo)} of {len(study.runs)} runs are done", flush=True)
    if not todo:
        return 0

    # A cluster starts the runs itself.
    if options.launcher == "ray":
        _submit_jobs(study, todo, options)
        return 0
    _prepare(study)
    if options.launcher == "slurm":
        return _submit_array(study, todo, options.study)

    # Here, a process for each run, longest first, so that no core waits for a long run that started last.
    todo.sort(key=lambda run: -run.budgets[-1])
    children = Children()
    with ThreadPoolExecutor(options.jobs) as pool:
        statuses = list(pool.map(lambda run: _start(run, options, children), todo))
    return INTERRUPTED_STATUS if INTERRUPTED_STATUS in statuses else int(any(statuses))


def _command(python: str, study: Path, run: Run, prefix: str) -> list[str]:
    return [python, "-m", "jobs.study", "run", str(study), "--only", run.name, "--prefix", prefix]


def _start(run: Run, options: Execute, children: "Children") -> int:
    """Train and measure a run in another process, with its output in the run's log.txt; return its exit status."""
    began = time.monotonic()
    log = journal_dir(run.store) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with log.open("ab") as file:
        command = _command(sys.executable, options.study, run, options.prefix)
        status = children.call(command, file, {"OMP_NUM_THREADS": str(threads), **os.environ})
    outcomes = {0: "done", INTERRUPTED_STATUS: "interrupted"}
    outcome = outcomes.get(status, f"failed with status {status}: see {log}")
    print(f"{run.name}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    return status


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

    # Nodes have the files that a job uploads, and share what is at a URL or on a common file system.
    out, file = study.config.out, options.study.resolve()
    if "://" not in out and not Path(out).is_absolute():
        raise InputError(f"out: got {out}, expected a URL, or an absolute path on a file system that all nodes share")
    if not file.is_relative_to(Path.cwd()):
        raise InputError(f"study: got {file}, expected a file below {Path.cwd()}, the only folder a Ray job uploads")
    file = file.relative_to(Path.cwd())
    _prepare(study)

    # Each job trains in its own process, without Ray's separate workers.
    prefix = options.prefix or "env -u RAY_JOB_CONFIG_JSON_ENV_VAR"
    env = yaml.safe_load(RAY_ENV.read_text())
    gpus = 0 if study.config.launch.device == "cpu" else 1
    try:
        client = JobSubmissionClient()
        jobs = {job.submission_id: job.status for job in client.list_jobs()}
        for run in todo:
            # A job is named after its run: one that has not ended continues, one that has is replaced.
            name = f"{study.name}-{run.name}"
            status = jobs.get(name)
            if status and not status.is_terminal():
                print(f"{name}: already {status.lower()}")
                continue
            if status:
                client.delete_job(name)
            client.submit_job(
                entrypoint=shlex.join(_command("python", file, run, prefix)),
                submission_id=name,
                runtime_env=env,
                entrypoint_num_cpus=1,
                entrypoint_num_gpus=gpus,
            )
            print(f"{name}: submitted", flush=True)
    except (RuntimeError, RayError) as error:
        raise InputError(f"Ray rejected the job: {first_line(error)}") from error


def _find(study: Study, which: str) -> Run:
    names = [run.name for run in study.runs]
    if which in names:
        return study.runs[names.index(which)]
    if which.isdecimal() and int(which) < len(names):
        return study.runs[int(which)]
    raise InputError(f"--only: got {which!r}, expected 0 to {len(names) - 1}, or one of {', '.join(names)}")


def _prepare(study: Study) -> None:
    """Prepare what concurrent runs share, and check that they can be measured: the data, the image metrics' features,
    the MLflow database, the runs' parent.
    """
    from pipeline.data.shards import load_index
    from pipeline.distributed.world import World
    from pipeline.evaluation.measure import ImageMetrics

    config, options, data = study.config, study.evaluation, study.evaluation_data
    if options.ema_rate not in (None, 0, *config.ema_rates):
        rates = ", ".join(map(str, config.ema_rates))
        raise InputError(f"evaluate.ema_rate: got {options.ema_rate}, expected {rates}, or 0")
    study.store.check(write=True, once=True)
    provide_digits(config)
    if "nll" in options.plan.metrics:
        options.nll.check(config.diffusion.timesteps)
        if data.local is None or data.local.exists():  # or only the nodes have it
            load_index(data, options.nll.split)
    if options.plan.image_metrics:
        ImageMetrics(options.plan, config, data, World())
    problem = update_parent(config.tracking.mlflow_uri, study.name, study.parent, _mark_running)
    if problem:
        print(f"warning: MLflow does not answer ({problem}); the journals in {study.store} are complete", flush=True)


def _mark_running(client: Any, run_id: str) -> None:
    client.update_run(run_id, status="RUNNING")


def _train_and_measure(study: Study, run: Run, prefix: Sequence[str]) -> int:
    """Train a run to each of its budgets in turn and measure it there; report at the end where that is impossible."""
    problems = []
    for budget in missing(study, run):
        children = Children()
        if status := children.call([*prefix, *run.command(budget)]):
            # srun kills the last tasks to exit, and their status hides the others'.
            return INTERRUPTED_STATUS if status > 128 and was_interrupted(run.store) else status
        children.let_go()
        if children.stop:
            return INTERRUPTED_STATUS
        try:
            measure_point(study, run, budget)
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
        for number in SIGNALS:
            signal.signal(number, self._end)

    def let_go(self) -> None:
        """Restore the default signal handlers: from now on a signal ends this process."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _end(self, number: int, _: object) -> None:
        self.stop = True
        for process in list(self.running):
            # USR1 unchanged, since srun kills its tasks at SIGTERM; Ctrl-C as SIGTERM, since srun does not pass it on.
            process.send_signal(number if number == signal.SIGUSR1 else signal.SIGTERM)

    def call(self, command: Sequence[str], log: IO[bytes] | None = None, env: dict[str, str] | None = None) -> int:
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
