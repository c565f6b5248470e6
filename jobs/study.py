"""A scaling study: many sizes, each trained to several budgets, measured, and fitted.

python -m jobs.study plan|run|status|fit|report STUDY.yaml
"""

import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pipeline.config import (
    INTERRUPTED_STATUS,
    TrainConfig,
    check_same_run,
    fail_usage,
    file_flags,
    horizon_steps,
    parse_flags,
    parse_train,
)
from pipeline.storage import Store, carries_credentials, first_line, mask
from pipeline.tracking import connect, find_or_create_run, journal_dir, journal_of, statuses, tracking_uri
from pipeline.train import provide_digits, was_interrupted

if TYPE_CHECKING:  # these import torch and scipy
    from pipeline.evaluate import EvaluateConfig
    from pipeline.hardware import Cost
    from pipeline.scaling import ComputePoint

HARDWARE: dict[str, tuple[dict[str, float], float]] = {
    "a100": ({"bf16": 312e12, "fp32": 19.5e12}, 1.8),
    "h100": ({"bf16": 989e12, "fp32": 67e12}, 3.0),
    "h200": ({"bf16": 989e12, "fp32": 67e12}, 3.8),
}
"""Peak dense FLOP/s by precision, from the vendor's data sheets, and a typical price in USD per hour."""


@dataclass(frozen=True)
class Study:
    """A study file. Its sections `train:` and `evaluate:` hold flags of pipeline.train and pipeline.evaluate, like a
    --config file: what all runs have in common, and how to measure each at its budgets.
    """

    name: str
    """Name of the study and of its MLflow experiment; its runs are in runs/NAME unless `out` is given."""
    values: tuple[str, ...]
    """The sizes: values of the axis, each with one or more runs."""
    budgets: tuple[float, ...]
    """Training FLOPs (forward and backward, 2 per MAC) at which to measure each size. Append later additions: with
    `separate`, a budget's position in the list determines its seeds."""
    axis: str = "model.channels"
    """Field of the network's configuration that `values` sets."""
    preset: str = "digits"
    """Preset of the runs."""
    seeds: tuple[int, ...] = (1,)
    """Number of runs, with different seeds, of each value at each budget: one number for all values, or one for each.
    """
    separate: bool = True
    """Whether each budget has its own runs and seeds, so that its points are independent of other budgets'. Otherwise
    one long run per seed is measured as it passes the budgets, which is about a third cheaper."""
    lr: float = 1e-4
    """Learning rate at 128 channels: a run with C channels uses lr / sqrt(C / 128) (IDDPM section 6)."""
    out: str = ""
    """Folder or URL of the study; default: runs/NAME."""
    train: tuple[str, ...] = ()
    """Flags of pipeline.train, from the file's section."""
    evaluate: tuple[str, ...] = ()
    """Flags of pipeline.evaluate, likewise. Allowed metrics: nll, fid and kid, for which lower is better."""

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) < len(self.values):
            raise ValueError(f"values: got {self.values}, expected one or more distinct values")
        if not self.budgets or min(self.budgets) <= 0:
            raise ValueError(f"budgets: got {self.budgets}, expected one or more positive FLOPs")
        if len({f"{budget:.3g}" for budget in self.budgets}) < len(self.budgets):  # runs are named after them
            raise ValueError(f"budgets: got {self.budgets}, expected budgets that differ in their first three digits")
        if not self.separate and list(self.budgets) != sorted(self.budgets):
            raise ValueError(
                f"budgets: got {self.budgets}, expected ascending budgets, which a run passes one after the other"
            )
        if not self.axis.startswith("model."):
            raise ValueError(
                f"axis: got {self.axis!r}, expected a field that sets the network's size, such as model.channels"
            )
        for section, flags, own in (
            ("train", self.train, ("lr", "seed", "out", "horizon")),
            ("evaluate", self.evaluate, ("step", "against", "against-step", "out")),
        ):
            if given := {f"--{name}" for name in own} & set(flags):
                raise ValueError(f"{section}: got {', '.join(sorted(given))}, which a study sets for each of its runs")
        if "--target-se" in self.evaluate:
            raise ValueError(
                "evaluate.target_se: points with different numbers of images are not comparable; give `images` instead"
            )
        if len(self.seeds) not in (1, len(self.values)) or min(self.seeds) < 1:
            raise ValueError(f"seeds: got {self.seeds}, expected one number, or one for each value, all 1 or more")

    @property
    def folder(self) -> str:
        """Folder or URL of the study."""
        return self.out or f"runs/{self.name}"

    @property
    def store(self) -> Store:
        return Store(self.folder, self.runs[0].config.storage)

    @property
    def parent(self) -> str:
        """The iddpm.uid of the MLflow run that is the parent of the study's runs."""
        return sha256(f"{self.name} {self.out}".encode()).hexdigest()[:32]

    @cached_property
    def evaluation(self) -> "EvaluateConfig":
        """How to measure each point, apart from the run."""
        from pipeline.evaluate import EvaluateConfig

        options = parse_flags(EvaluateConfig, [self.name, *self.evaluate], "The study's `evaluate:` section.")
        if any(map(carries_credentials, self.evaluate)):
            fail_usage(ValueError("evaluate: a URL there carries credentials, which would be recorded"))
        if options.wanted - {"nll", "fid", "kid"}:
            fail_usage(ValueError(f"evaluate.metrics: got {options.metrics!r}, expected comma-separated nll, fid, kid"))
        return replace(options, storage=self.runs[0].config.storage)

    @cached_property
    def runs(self) -> "list[Run]":
        """All runs, smallest first."""
        made = []
        seeds = self.seeds * (len(self.values) if len(self.seeds) == 1 else 1)
        groups = [(b,) for b in self.budgets] if self.separate else [self.budgets]
        for value, count in zip(self.values, seeds, strict=True):
            base = ["--preset", self.preset, *self.train, f"--{self.axis.replace('_', '-')}", *value.split()]
            config, _ = parse_train(base)
            lr = self.lr / math.sqrt(config.model.channels / 128)
            for (number, budgets), seed in product(enumerate(groups), range(count)):
                name = f"{value.replace(' ', 'x')}{f'-{budgets[0]:.3g}' if self.separate else ''}-{seed}"
                own: dict[str, Any] = {"out": f"{self.folder}/{name}", "seed": seed + 1000 * number, "lr": lr}
                shown: dict[str, Any] = {"experiment": self.name, "name": name, "parent": self.parent}
                flags = [*base, *(word for k, v in own.items() for word in (f"--{k}", str(v)))]
                flags += [word for k, v in shown.items() for word in (f"--tracking.{k}", v)]
                own["tracking"] = replace(config.tracking, **shown)
                made.append(Run(name, value, budgets, tuple(flags), replace(config, **own)))
        return made


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    name: str
    value: str
    budgets: tuple[float, ...]
    flags: tuple[str, ...]
    """Flags of pipeline.train, except the horizon."""
    config: TrainConfig

    def at(self, budget: float) -> TrainConfig:
        return replace(self.config, horizon=f"{budget!r}flops")

    def command(self, budget: float) -> list[str]:
        return [sys.executable, "-m", "pipeline.train", *self.flags, "--horizon", f"{budget!r}flops"]

    def point(self, budget: float) -> str:
        """Return the name of its measurement in the study's store."""
        return f"points/{self.name}-{budget:.4g}.json"


def load_study(path: Path) -> Study:
    """Read a study file; on an invalid field, print a message and exit with status 2."""
    sections: dict[str, list[str]] = {"": [], "train": [], "evaluate": []}
    section = ""
    for word in file_flags(str(path)):
        if word.startswith("--"):
            section, _, name = word.removeprefix("--").partition(".")
            if name and section in sections:
                word = f"--{name.removeprefix('launch.')}"
            else:
                section = ""
        sections[section].append(word)
    study = parse_flags(Study, sections[""], f"{Study.__doc__} ({path})")
    try:
        return replace(study, train=tuple(sections["train"]), evaluate=tuple(sections["evaluate"]))
    except ValueError as error:
        fail_usage(error)


@dataclass(frozen=True)
class OfStudy:
    """Options of every command."""

    study: tyro.conf.Positional[Path]
    """The study file."""


# ------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan(OfStudy):
    """Print the study's cost without training: each run's size, FLOPs, steps, memory, hours and price."""

    hardware: str = "h100"
    """Device: a100, h100, h200, or `here` to measure this machine's peak."""
    utilisation: float | None = None
    """Fraction of the peak that training reaches; default: 0.3, or with `here` what this study's runs have reached."""
    price: float | None = None
    """USD per device-hour; default: a typical price of the hardware, 0 for `here`."""

    def __post_init__(self) -> None:
        if self.hardware not in (*HARDWARE, "here"):
            raise ValueError(f"--hardware: got {self.hardware!r}, expected one of {', '.join(HARDWARE)}, here")
        if self.utilisation is not None and not 0 < self.utilisation <= 1:
            raise ValueError(f"--utilisation: got {self.utilisation}, expected a fraction of the peak, in (0, 1]")


def count_sizes(study: Study) -> "dict[str, Cost]":
    """Count each value's cost. Raises ValueError if two have equally many parameters: fits would treat them as one."""
    from pipeline.hardware import count

    costs = {value: count(next(r for r in study.runs if r.value == value).config) for value in study.values}
    if len({cost.parameters for cost in costs.values()}) < len(costs):
        shown = ", ".join(f"{value}: {cost.parameters:,}" for value, cost in costs.items())
        raise ValueError(f"values: got networks with equal numbers of parameters ({shown}), expected different sizes")
    return costs


def plan(options: Plan) -> None:
    study = load_study(options.study)
    costs = count_sizes(study)
    peak, price, source = _speed(options, study)
    images = _training_images(study)
    sizes = f"{len(study.runs)} runs of {len(study.values)} sizes ({study.axis})"
    print(f"{study.name}: {sizes}, at {len(study.budgets)} budgets")
    print(f"{options.hardware}, {source}: {peak / 1e12:.3g} TFLOP/s sustained")
    print("FLOPs count 2 per multiply-accumulate (MAC); training costs 3 forward passes; the papers count MACs.\n")
    rows = [["run", "lr", "parameters", "MACs fwd", "FLOPs train", "budget", "steps", "epochs", "memory"]]
    rows[0] += ["measuring", "hours", "USD"]
    training = measuring = 0.0
    warned: dict[str, list[str]] = {}
    for run in study.runs:
        cost, budget = costs[run.value], run.budgets[-1]
        steps = horizon_steps(run.at(budget), cost.train)
        flops = float(steps * run.config.batch_size * cost.train)
        epochs = f"{steps * run.config.batch_size / images:.2f}" if images else "-"
        points = float(len(run.budgets) * study.evaluation.evaluations(run.config) * cost.forward)
        training, measuring = training + flops, measuring + points
        hours = (flops + points) / peak / 3600
        rows.append([run.name, f"{run.config.lr:.3g}", f"{cost.parameters:,}", f"{cost.forward / 2e9:.4g}G"])
        rows[-1] += [f"{cost.train / 1e9:.4g}G", f"{budget:.3g}", f"{steps:,}", epochs]
        memory = sum(cost.memory.values()) / 2**30
        rows[-1] += [f"{memory:.2f} GiB", f"{points:.2g}", f"{hours:.3g}", f"{hours * price:.2f}"]
        first = horizon_steps(run.at(run.budgets[0]), cost.train)
        for line in _unequal(run, first, images):
            warned.setdefault(line, []).append(run.name)
    print(table(rows))
    hours = (training + measuring) / peak / 3600
    print(f"\n{training:.3e} FLOPs of training and {measuring:.2e} of measuring {study.evaluation.metrics}", end="")
    print(f": {hours:.3g} device-hours, {hours * price:.2f} USD")
    if len(study.values) < 3:
        warned["an isoFLOP parabola needs 3 or more"] = [f"{len(study.values)} sizes"]
    if len(study.budgets) < 5:
        warned["L(C) needs 4, and one more to hold out"] = [f"{len(study.budgets)} budgets"]
    if len(study.runs) < 6:
        warned["L(N, D) needs 6 or more, L(C) 4 at its frontier"] = [f"{len(study.runs)} runs"]
    for line, names in warned.items():
        print(f"warning: {line}: {', '.join(names)}")


def _unequal(run: Run, steps: int, images: int | None) -> list[str]:
    """Say why a run's first measurement, after `steps` steps, is not comparable with those of longer runs."""
    config, said = run.config, []
    if images and steps * config.batch_size < images:
        said.append("a horizon below one epoch")
    if config.warmup_steps > 0.1 * steps:
        said.append(f"unequal schedules, a warm-up of {config.warmup_steps} steps is over a tenth of the run")
    if (memory := 1 / (1 - config.ema_rates[0])) > 0.2 * steps:
        said.append(f"unequal schedules, a moving average over {memory:,.0f} steps is over a fifth of the run")
    return said


def _speed(options: Plan, study: Study) -> tuple[float, float, str]:
    """Return sustained FLOP/s, price, and the source of these values."""
    from pipeline.hardware import peak_flops
    from pipeline.world import World, pick_device

    precision = study.runs[0].config.precision
    price = options.price
    if options.hardware == "here":
        peak = peak_flops(World(device=pick_device("auto", 0)).device, precision)  # set up as for training
    else:
        peaks, usual = HARDWARE[options.hardware]
        if precision not in peaks:
            raise ValueError(
                f"--hardware: the peak of {options.hardware} is not known for {precision}, expected {list(peaks)}"
            )
        peak, price = peaks[precision], usual if price is None else price
    runs = study.runs if options.hardware == "here" else []  # utilisation is relative to the peak measured there
    journals = (journal_of(run.config.out, run.config.storage) for run in runs)
    seen = [r["metrics"]["compute/utilization"] for journal in journals for r in journal if r["kind"] == "metrics"]
    utilisation = options.utilisation or (statistics.median(seen) if seen else 0.3)
    how = "as given" if options.utilisation else "as measured" if seen else "assumed"
    return peak * utilisation, price or 0.0, f"{precision} at {utilisation:.1%} of {peak / 1e12:.3g} TFLOP/s ({how})"


def _training_images(study: Study) -> int | None:
    from pipeline.data import load_index

    config = study.runs[0].config
    try:
        return load_index(Store(config.data.url, config.storage), "train").num_samples
    except OSError:
        print(f"(no data at {config.data.url} yet: epochs are unknown)")
        return None


# -------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Execute(OfStudy):
    """Train and measure the unfinished runs. Running the same command again resumes."""

    launcher: Literal["local", "slurm", "ray"] = "local"
    """local: on this machine; slurm: submit slurm/study.sh as an array; ray: submit a job for each run."""
    jobs: int = 1
    """Number of simultaneous runs on this machine."""
    only: str | None = None
    """Only one run, by its name or its number from 0, like each task of a Slurm array."""
    prefix: str = ""
    """Prefix for each training command, such as 'srun --mpi=none --kill-on-bad-exit=1'."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs: got {self.jobs}, expected 1 or more")


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
        log = journal_dir(run.config.out) / "log.txt"
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
        raise ValueError("--launcher slurm: sbatch is not installed here; submit from a login node of the cluster")
    if not Path("slurm/study.sh").exists():
        raise ValueError("--launcher slurm: no slurm/study.sh in this folder; submit from the repository's root")
    return subprocess.run(["sbatch", *words]).returncode


def _submit_jobs(study: Study, todo: Sequence[Run], options: Execute) -> None:
    """Submit a Ray job for each run without a pending or running one, on one GPU (with `device: cpu`, on one CPU)."""
    import yaml
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    out, file = study.runs[0].config.out, options.study.resolve()
    if "://" not in out and not Path(out).is_absolute():
        raise ValueError(f"out: got {out}, expected a URL, or an absolute path on a file system that all nodes share")
    if not file.is_relative_to(Path.cwd()):
        raise ValueError(f"study: got {file}, expected a file below {Path.cwd()}, the only folder a Ray job uploads")
    _prepare(study)
    env = yaml.safe_load(Path(__file__).with_name("ray-env.yaml").read_text())
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
        raise ValueError(f"Ray rejected the job: {first_line(error)}") from error


def _find(study: Study, which: str) -> Run:
    names = [run.name for run in study.runs]
    if which.isdecimal() and which not in names and int(which) < len(names):
        return study.runs[int(which)]
    if which not in names:
        raise ValueError(f"--only: got {which!r}, expected 0 to {len(names) - 1}, or one of {', '.join(names)}")
    return study.runs[names.index(which)]


def _prepare(study: Study) -> None:
    """Prepare what concurrent runs share, and check that they can be measured: the data, the image metrics' features,
    the MLflow database, the runs' parent.
    """
    from pipeline.data import load_index
    from pipeline.evaluate import image_tools
    from pipeline.world import World

    config, options = study.runs[0].config, study.evaluation
    rates = (None, 0, *config.ema_rates)
    if options.ema_rate not in rates:
        raise ValueError(f"evaluate.ema_rate: got {options.ema_rate}, expected {', '.join(map(str, rates[2:]))}, or 0")
    study.store.check(write=True, once=True)
    provide_digits(config)
    data = Store(options.data or config.data.url, config.storage)
    if "nll" in options.wanted:
        options.plan.check(config.diffusion.timesteps)
        if data.local is None or data.local.exists():  # or only the nodes have it
            load_index(data, options.split)
    if options.wanted - {"nll"}:
        image_tools(options, config, data, World())
    tracking = config.tracking
    if tracking.uri == "none":
        return
    try:
        client = connect(tracking_uri(tracking))
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
            return INTERRUPTED_STATUS if status > 128 and was_interrupted(run.config) else status
        children.let_go()
        if children.stop:
            return INTERRUPTED_STATUS
        try:
            measure(study, run, budget)
        except ValueError as error:
            problems.append(f"{run.name} cannot be measured at {budget:.4g} FLOPs: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return 0


def missing(study: Study, run: Run) -> list[float]:
    """Return the budgets at which the run is not yet measured as the study says.

    Raises ValueError if the measured run had another configuration.
    """
    return [budget for budget in run.budgets if not _point(study, run, budget)]


def _point(study: Study, run: Run, budget: float) -> dict[str, Any] | None:
    """Return a run's measurement at a budget, if it was made as the study says.

    Raises ValueError if the measured run had another configuration.
    """
    try:
        content: dict[str, Any] = json.loads(study.store.read(run.point(budget)))
    except FileNotFoundError:
        return None
    check_same_run(content["config"], run.at(budget))
    return content if content["evaluate"] == list(study.evaluate) else None


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


def measure(study: Study, run: Run, budget: float) -> None:
    """Measure a run that has reached its budget; write the point to the study's store, the journal and MLflow."""
    from iddpm.flops import count_parameters, train_flops
    from pipeline import evaluate
    from pipeline.sample import load_trained
    from pipeline.scaling import ComputePoint
    from pipeline.world import World, pick_device

    config = run.config
    options = replace(study.evaluation, run=config.out, tracking=config.tracking)
    world = World(device=pick_device(config.launch.device, 0))
    last = horizon_steps(run.at(budget), train_flops(config.model, config.out_channels))
    trained = load_trained(config.out, config.storage, world, options.ema_rate, last)
    flops = trained.meta["train_flops"]
    common = {"train_data": trained.meta["dataset_digest"], "batch_size": config.batch_size}
    common |= {"diffusion": asdict(config.diffusion), "precision": config.precision}
    found = evaluate.measure([trained], options, world, keep=True)
    found = [replace(value, passport=value.passport | common) for value in found]
    evaluate.track(trained, found, options)
    spent = {
        "run": run.name,
        "parameters": count_parameters(config.model, config.out_channels),
        "images": trained.meta["images"],
        "flops": flops,
        "budget": budget,
    }
    points = [asdict(ComputePoint(**vars(value), **spent)) for value in found]
    content = {"points": points, "evaluate": study.evaluate, "config": trained.meta["config"]}
    study.store.write(run.point(budget), json.dumps(content, indent=1).encode())
    for value in found:
        print(f"{run.name}: {flops:.4e} FLOPs, {value}", flush=True)


# ------------------------------------------------------------------------------------ status, fit


@dataclass(frozen=True)
class Status(OfStudy):
    """Show each run's progress."""

    watch: float = 0.0
    """Refresh interval in seconds; 0: once."""


def status(options: Status) -> None:
    study = load_study(options.study)
    while True:
        measured = load_points(study)
        rows = [["run", "state", "step", "FLOPs", "of budget", "loss", "images/s", "seen", *measured]]
        for run in study.runs:
            records = journal_of(run.config.out, run.config.storage)
            last: dict[str, Any] = next((r for r in reversed(records) if r["kind"] == "metrics"), {})
            told = statuses(records)
            state = (told[-1] or "running").lower() if told else "waiting"
            flops = last.get("metrics", {}).get("compute/train_flops", 0.0)
            rows.append([run.name, state, str(last.get("step", "")), f"{flops:.3g}", f"{flops / run.budgets[-1]:.0%}"])
            rows[-1] += [f"{last['metrics'][k]:.4g}" if last else "" for k in ("train/loss", "train/images_per_second")]
            rows[-1] += [f"{time.time() - records[-1]['time']:.0f} s ago" if records else ""]
            for points in measured.values():
                values = {p.budget: f"{p.value:.4f}" for p in points if p.run == run.name}
                rows[-1].append(" ".join(values.get(b, "-") for b in run.budgets))
        print(("\033[2J\033[H" if options.watch else "") + table(rows))
        done = max(map(len, measured.values()), default=0)
        print(f"{done} of {sum(len(run.budgets) for run in study.runs)} points measured", flush=True)
        if not options.watch:
            return
        time.sleep(options.watch)


@dataclass(frozen=True)
class Fit(OfStudy):
    """Fit the scaling laws to the measured points and print them with intervals."""


@dataclass(frozen=True)
class Report(OfStudy):
    """Fit and plot everything, write one HTML file and PNGs, and log them to the study's MLflow run."""

    out: str = ""
    """Folder to write to; default: report/ in the study's folder, or runs/NAME/report for a remote study."""


def load_points(study: Study) -> "dict[str, list[ComputePoint]]":
    """Return the measured points of the study's runs, by metric."""
    from pipeline.scaling import ComputePoint

    found: dict[str, list[ComputePoint]] = {}
    for run in study.runs:
        for budget in run.budgets:
            for point in (_point(study, run, budget) or {"points": []})["points"]:
                found.setdefault(point["name"], []).append(ComputePoint(**point))
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a table: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


Command = (
    Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Execute, tyro.conf.subcommand("run")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Fit, tyro.conf.subcommand("fit")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def main(argv: Sequence[str]) -> int:
    try:
        options: Any = parse_flags(Command, argv, __doc__ or "")  # type: ignore[arg-type]
        match options:
            case Plan():
                plan(options)
            case Execute():
                return execute(options)
            case Status():
                status(options)
            case Fit() | Report():
                from jobs.report import report

                report(load_study(options.study), getattr(options, "out", None))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
