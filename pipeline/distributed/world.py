"""The processes that train one run together: their ranks, and the communication between them.

A launcher (torchrun, mpirun, srun, Ray) starts the processes; `connect` detects it and joins them. Three process groups
keep the traffic apart: gradients (DDP's, on the device), the timestep sampler's losses (on the device, so that they can
overlap the gradients), and control (always gloo on the CPU, so that agreeing on a signal never waits for the device).
`pipeline.distributed.liveness` finds out, on connections of its own, which rank died.
"""

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.distributed.liveness import SELF_REPORTED, Liveness, listen
from pipeline.errors import InputError, UserError
from pipeline.masking import first_line

T = TypeVar("T")


class RankFailure(UserError):
    """Another rank died, hangs or failed; the message names it."""

    self_reported = False
    """Whether that rank reported the failure itself."""


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
        self._thread: ThreadPoolExecutor | None = None
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

    # ----------------------------------------------------------------------------- values and tensors

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

    def start_gather(self, shares: torch.Tensor, n: int) -> "Gather":
        """Start collecting each rank's `share(n)` of a device tensor [n]; never blocks the host."""
        return Gather(self, shares, n)

    # --------------------------------------------- work that may take long: who does it, who gets the results

    def on_all_ranks(self, call: Callable[[], T]) -> list[T]:
        """Every rank calls; every rank gets the results, in rank order."""
        return self.gather(self._meanwhile(call))

    def to_rank0(self, call: Callable[[], T]) -> list[T]:
        """Every rank calls; rank 0 gets the results, in rank order, and the others an empty list."""
        value = self._meanwhile(call)
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(value, values or None, group=self._control)
        return values

    def on_rank0(self, call: Callable[[], T]) -> T:
        """Rank 0 calls; every rank gets the result."""
        return self.broadcast_object(self.only_on_rank0(call))

    def only_on_rank0(self, call: Callable[[], T]) -> T | None:
        """Rank 0 calls and gets the result; the others wait for it and get None."""
        return self._meanwhile(lambda: call() if self.rank == 0 else None)

    def _meanwhile(self, call: Callable[[], T]) -> T:
        """Return `call()` once every rank's call has returned, however long that takes.

        The ranks keep in touch meanwhile, so that none times out. `call` runs in another thread and must not use
        collectives.
        """
        if self.size == 1:
            return call()
        if self._thread is None:  # one thread for all calls: cuDNN's plans and the current GPU are per thread
            enter = partial(torch.cuda.set_device, self.device) if self.device.type == "cuda" else None
            self._thread = ThreadPoolExecutor(1, "work", initializer=enter)
        result = self._thread.submit(call)
        while True:
            done = bool(wait([result], timeout=1.0).done)
            value = result.result() if done else None  # raises the call's error at once
            if all(self.gather(done)):
                return value  # type: ignore[return-value]

    # --------------------------------------------------------------------------------- signals

    def catch_signals(self) -> None:
        """Make SIGTERM, SIGINT and SIGUSR1 request a stop at the end of the step instead of killing the process.

        This is permanent: launchers send SIGTERM when another rank has exited, and this one must still report why.
        """

        def request_stop(*_: object) -> None:
            self._stop = True

        if self.on_signal:
            self.on_signal(request_stop)
        else:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, request_stop)

    def stop_agreed(self) -> bool:
        """Whether any rank has been asked to stop; call once per step: every rank gets the same answer.

        The ranks are asked one step ahead and answer while that step computes.
        """
        if self.size == 1:
            return self._stop
        # What the ranks answered during the last step.
        agreed = False
        if self._pending:
            work, flag = self._pending
            work.wait()
            agreed = bool(flag.item())
        # Ask them for the next.
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
        failure = self._liveness.blame() if self._liveness else None
        if not self._liveness or not failure:
            return None
        seen = f"seen by rank {self.rank} at step {self._liveness.step}: {first_line(error)}"
        explained = RankFailure(f"{failure} ({seen})")
        explained.self_reported = SELF_REPORTED in failure
        return explained

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


def _patience(timeout_s: float, device: torch.device) -> timedelta:
    # NCCL's time-out aborts the process without naming a rank: let ours come first.
    return timedelta(seconds=timeout_s + (60 if device.type == "cuda" else 0))


def pick_device(name: str, local_rank: int) -> torch.device:
    """Return the device of the rank with this number on its node."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; give --device cpu, or fix the driver")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each task only its own GPU (srun --gpus-per-task), or all of the node's.
    count = torch.cuda.device_count()
    if local_rank >= count and (count > 1 or "CUDA_VISIBLE_DEVICES" not in os.environ):
        raise InputError(
            f"local rank {local_rank} has no GPU: this node shows {count}; start at most that many workers per node"
        )
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def fail_together(world: World) -> Iterator[World]:
    """Run the body on every rank so that, however it ends, no rank is left waiting for another.

    A failed collective becomes a RankFailure; any other error is reported to the other ranks and raised.
    """
    try:
        yield world
        world.close()
    except RuntimeError as error:  # what gloo and NCCL raise, among others
        failure = world.explain(error)
        if failure:
            raise failure from error
        world.report_failure(error)
        raise
    except BaseException as error:
        world.report_failure(error)
        raise
