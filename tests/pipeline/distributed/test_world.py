"""One run on any number of ranks: what is the same, how it stops, and which rank is blamed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny
from ranks import STRICT, Ranks, assert_same_run, in_world, newest, newest_step, train_here, train_on

from pipeline import step as step_module
from pipeline.config import LaunchConfig, TrainConfig
from pipeline.data.shards import load_index
from pipeline.data.stream import stream
from pipeline.distributed.launch import _first_host, _tasks_per_node, connect, detect_launcher, run_main
from pipeline.distributed.world import World, pick_device
from pipeline.errors import InputError
from pipeline.loop import train
from pipeline.run.interrupted import INTERRUPTED_FILE
from pipeline.run.journal import read_journal
from pipeline.step import TrainState, train_step
from pipeline.storage.store import Store

# ------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ("", "local"),
        ("SLURM_JOB_ID SLURM_NTASKS SLURM_NNODES", "local"),  # a shell inside salloc
        ("RANK WORLD_SIZE", "torchrun"),
        ("RANK WORLD_SIZE SLURM_STEP_NUM_TASKS SLURM_PROCID RAY_JOB_CONFIG_JSON_ENV_VAR", "torchrun"),
        ("OMPI_COMM_WORLD_SIZE SLURM_STEP_NUM_TASKS SLURM_PROCID", "mpi"),  # mpirun inside salloc
        ("MPI_LOCALNRANKS PMI_SIZE PMI_RANK", "mpi"),
        ("PMI_SIZE PMI_RANK", "mpi"),
        ("SLURM_STEP_NUM_TASKS SLURM_PROCID", "slurm"),
        ("SLURM_STEP_NUM_TASKS SLURM_PROCID PMI_SIZE", "slurm"),  # srun --mpi=pmi2
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "ray"),
    ],
)
def test_the_launcher_is_found_by_its_step_variables(variables: str, launcher: str) -> None:
    assert detect_launcher(dict.fromkeys(variables.split(), "1")) == launcher


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_a_launcher_that_did_not_start_us_is_an_error(launcher: str) -> None:
    with pytest.raises(ValueError, match=f"--launcher {launcher}: its variable .* is not set"):
        connect(LaunchConfig(launcher=launcher))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match="--device cuda: torch finds no GPU"):
        pick_device("cuda", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("gpus", "says"), [("2", "--device cuda: torch finds no GPU"), ("1", "--ntasks-per-node: got 2, expected 1")]
)
def test_a_slurm_job_that_has_gpus_does_not_train_on_cpus(monkeypatch, gpus: str, says: str) -> None:
    """A node with a failing driver or too few GPUs is an error, not a slow rank."""
    step = {"PROCID": "1", "LOCALID": "1", "NODEID": "0", "JOB_ID": "1", "STEP_ID": "0", "GPUS_ON_NODE": gpus}
    step |= {"STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "1", "STEP_TASKS_PER_NODE": "2"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match=says):
        connect(LaunchConfig())


@pytest.mark.parametrize(("n", "size"), [(10, 4), (8, 4), (3, 4), (7, 1)])
def test_shares_cover_the_batch_in_order(n: int, size: int) -> None:
    worlds = [World() for _ in range(size)]
    for rank, world in enumerate(worlds):
        world.rank, world.size = rank, size
    shares = [world.share(n) for world in worlds]
    assert [i for lo, hi in shares for i in range(lo, hi)] == list(range(n))
    assert max(hi - lo for lo, hi in shares) - min(hi - lo for lo, hi in shares) <= 1


def test_slurm_lists_are_read() -> None:
    assert _tasks_per_node("4(x2),3") == [4, 4, 3]
    hosts = ["gpu[07-09,12],cpu1", "node1", "a,b[1-2]", "n-[3]-ib"]
    assert [_first_host(text) for text in hosts] == ["gpu07", "node1", "a", "n-3-ib"]


# ------------------------------------------------------------------------------------ the same run


@pytest.fixture(scope="module")
def reference(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train the run undisturbed in one process."""
    out = tmp_path_factory.mktemp("reference")
    assert train(tiny(digits, out, *STRICT), World()) == "finished"
    return str(out)


def see_steps(world: World, config: TrainConfig, out: str) -> None:
    """Record what each rank sees in four steps: timesteps, noise, gradients after the first."""
    state, store = TrainState(config, world), Store(config.data.url)
    lo, hi = world.share(config.batch_size)
    batches = stream(store, load_index(store, "train"), seed=0, position=0, batch_size=config.batch_size, lo=lo, hi=hi)
    seen: list[tuple[torch.Tensor, ...]] = []
    losses = state.diffusion.training_losses

    def record(model, x_start, t, noise, y=None):
        seen.append((x_start.clone(), t.clone(), noise.clone()))
        return losses(model, x_start, t, noise, y)

    state.diffusion.training_losses = record  # type: ignore[method-assign]
    digests = []
    for step in range(4):
        train_step(state, next(batches), world)
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in state.params.items() if p.grad is not None}
        if state.sampler.needs_losses:
            digests.append(int(state.sampler.digest()))
    rows = [torch.cat(tensors) for tensors in zip(*seen, strict=True)]
    torch.save({"rows": rows, "gradients": gradients, "digests": digests}, f"{out}/{world.rank}.pt")


def seen_by(size: int, folder: Path, config: TrainConfig) -> list[dict]:
    folder.mkdir()
    if size == 1:
        see_steps(World(), config, str(folder))
    else:
        with Ranks(size, folder, in_world, see_steps, config, str(folder)) as ranks:
            assert ranks.join() == [0] * size, ranks.said(0)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def in_order(parts: list[dict], batch_size: int) -> list[torch.Tensor]:
    """Merge the ranks' rows of each step into what one process would see."""
    joined = []
    for kind in range(3):
        per_rank = [part["rows"][kind].chunk(4) for part in parts]
        joined.append(torch.cat([rows for step in zip(*per_rank, strict=True) for rows in step]))
    assert len(joined[0]) == 4 * batch_size
    return joined


def test_any_ranks_and_microbatch_see_the_same_timesteps_and_noise(digits: str, tmp_path: Path) -> None:
    config = tiny(digits, tmp_path, "--batch-size", "10", "--data.random-flip")
    alone = seen_by(1, tmp_path / "1", config)
    for size, microbatch in ((1, "3"), (2, None), (4, "1"), (4, "2")):
        flags = ("--microbatch", microbatch) if microbatch else ()
        cut = tiny(digits, tmp_path, "--batch-size", "10", "--data.random-flip", *flags)
        parts = seen_by(size, tmp_path / f"{size}-{microbatch}", cut)
        for a, b in zip(in_order(alone, 10), in_order(parts, 10), strict=True):
            assert torch.equal(a, b), (size, microbatch)
        # In float32, only the order of summation differs.
        for name, gradient in alone[0]["gradients"].items():
            for part in parts:
                wrong = (part["gradients"][name] - gradient).norm() / norm(alone[0]["gradients"])
                assert wrong < 1e-6, (size, microbatch, name)


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return torch.stack([t.norm() for t in tensors.values()]).norm().item()


def test_the_importance_sampler_is_bit_identical_on_all_ranks(digits: str, tmp_path: Path) -> None:
    # With 4 timesteps, 160 losses fill the history, so importance sampling starts at the second step.
    flags = ("--diffusion.timesteps", "4", "--batch-size", "63", "--timestep-sampler", "loss-second-moment")
    parts = seen_by(4, tmp_path / "4", tiny(digits, tmp_path, *flags))
    assert len(set(parts[0]["digests"])) == 4  # it changes every step
    assert all(part["digests"] == parts[0]["digests"] for part in parts)


@pytest.mark.parametrize("size", [2, 4])
def test_weights_agree_in_float64(digits: str, tmp_path: Path, size: int) -> None:
    longer = (*STRICT, "--horizon", "50steps")
    train(tiny(digits, tmp_path / "alone", *longer), World())
    flags = ("--microbatch", "2") if size == 2 else ()
    train_on(size, tmp_path / "log", tiny(digits, tmp_path / "out", *longer, *flags))
    assert_same_run(tmp_path / "out", tmp_path / "alone")
    counts = newest(tmp_path / "out")["progress/counts"]
    assert counts.sum() == 500
    assert (counts >= 10).all()  # warmed up: the losses of all ranks have determined timesteps


def test_losses_agree_in_float32(digits: str, tmp_path: Path) -> None:
    flags = ("--batch-size", "10", "--horizon", "50steps", "--log-every", "1", "--sample-every", "0")
    train(tiny(digits, tmp_path / "1", *flags), World())
    train_on(4, tmp_path / "log", tiny(digits, tmp_path / "4", *flags))
    one, four = (logged_losses(tmp_path / name) for name in ("1", "4"))
    assert len(one) == 50
    assert four == pytest.approx(one, rel=1e-3)


def logged_losses(out: Path) -> list[float]:
    return [r["metrics"]["train/loss"] for r in read_journal(out) if r["kind"] == "metrics"]


def test_two_ranks_are_bit_identical_from_start_to_start(digits: str, tmp_path: Path) -> None:
    flags = ("--timestep-sampler", "loss-second-moment")
    for name in ("a", "b"):
        train_on(2, tmp_path / f"log-{name}", tiny(digits, tmp_path / name, *flags))
    a, b = newest(tmp_path / "a"), newest(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_continues_on_more_and_on_fewer_ranks(digits: str, tmp_path: Path, reference: str) -> None:
    out = tmp_path / "out"
    for size, horizon in ((2, "9steps"), (1, "15steps"), (2, "21steps"), (4, "30steps")):
        train_on(size, tmp_path / f"log-{horizon}", tiny(digits, out, *STRICT, "--horizon", horizon))
    assert_same_run(out, reference)


def test_rank_0_alone_prints_and_writes(digits: str, tmp_path: Path) -> None:
    config = tiny(digits, tmp_path / "out")
    with Ranks(2, tmp_path / "log", train_here, config) as ranks:
        assert ranks.join() == [0, 0]
        assert "launcher torchrun, 2 x CPU" in ranks.said(0)
        assert "step 12/12" in ranks.said(0)
        assert ranks.said(1) == ""


# ---------------------------------------------------------------------------------------- stopping


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while newest_step(out) < step:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_a_signal_to_any_rank_stops_all_at_one_step(
    digits: str, tmp_path: Path, reference: str, number: int, rank: int
) -> None:
    out = tmp_path / "out"
    config = tiny(digits, out, *STRICT)
    with Ranks(2, tmp_path / "log", train_here, config) as ranks:
        wait_for_step(out, 10)
        ranks.signal(rank, number)
        assert ranks.join() == [75, 75]
        assert "checkpointed" in ranks.said(0)
        assert ranks.said(1) == ""
    step = json.loads((out / INTERRUPTED_FILE).read_text())["step"]
    assert 10 <= step < 30
    assert newest_step(out) == step
    train_on(2, tmp_path / "again", config)
    assert not (out / INTERRUPTED_FILE).exists()
    assert_same_run(out, reference)


def be_told(_: World, number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(1000)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_program_that_does_not_checkpoint_ends_at_once(tmp_path: Path, number: int, status: int) -> None:
    with Ranks(1, tmp_path, in_world, be_told, number) as ranks:
        assert ranks.join() == [status]
        assert ranks.said(0) == ""


@pytest.mark.parametrize(
    ("number", "rank", "told"),
    [
        (signal.SIGKILL, 0, "rank 0 died"),
        (signal.SIGKILL, 1, "rank 1 died"),
        (signal.SIGSTOP, 0, "rank 0 stopped responding"),
        (signal.SIGSTOP, 2, "rank 2 stopped responding"),
    ],
)
def test_the_others_stop_and_name_a_rank_that_dies_or_hangs(
    digits: str, tmp_path: Path, number: int, rank: int, told: str
) -> None:
    out = tmp_path / "out"
    config = tiny(digits, out, *STRICT, "--horizon", "100000steps", "--timeout-s", "4")
    with Ranks(3, tmp_path / "log", train_here, config) as ranks:
        wait_for_step(out, 10)
        ranks.signal(rank, number)
        others = [r for r in range(3) if r != rank]
        for other in others:
            ranks.processes[other].join(120)
        statuses = [ranks.processes[other].exitcode for other in others]
        assert statuses == [1, 1], [ranks.said(other) for other in others]
        assert all(f"error: {told}" in ranks.said(other) for other in others), ranks.said(others[0])


def hang(world: World) -> None:
    """Rank 1 dies while rank 0 is stuck outside any collective, like a host waiting for its GPU."""
    if world.rank == 1:
        time.sleep(2)
        os._exit(3)
    time.sleep(1000)


def test_a_stuck_training_thread_is_ended(tmp_path: Path) -> None:
    with Ranks(2, tmp_path / "log", in_world, hang) as ranks:
        assert ranks.join() == [1, 3]
        assert "error: rank 1 died; this rank is stuck" in ranks.said(0)


def work_long(world: World) -> None:
    """Rank 0 is busy for longer than the time-out for silent ranks; then rank 1 fails at its own work."""
    assert world.on_rank0(lambda: time.sleep(6) or "found") == "found"
    assert world.on_all_ranks(lambda: world.rank) == [0, 1]
    print("all is well")
    world.on_all_ranks(lambda: 1 // (1 - world.rank))


def test_ranks_wait_for_one_that_works_and_learn_when_it_fails(tmp_path: Path) -> None:
    with Ranks(2, tmp_path, run_main, work_long, LaunchConfig(timeout_s=3)) as ranks:
        assert ranks.join() == [1, 1]
        assert "all is well" in ranks.said(0)
        assert "rank 1 failed" in ranks.said(0)
        assert "ZeroDivisionError" in ranks.said(1)


def spoil(world: World, config: TrainConfig) -> None:
    """Train with one NaN image in rank 1's sixth step."""
    honest = step_module.to_device

    def to_device(batch, index, config, device):
        x, y = honest(batch, index, config, device)
        if world.rank == 1 and index[0] // config.batch_size == 5:
            x[0] = float("nan")
        return x, y

    step_module.to_device = to_device
    train(config, world)


def test_a_value_that_is_not_finite_on_one_rank_stops_all_at_its_step(digits: str, tmp_path: Path) -> None:
    config = tiny(digits, tmp_path / "out", "--log-every", "8")
    with Ranks(2, tmp_path / "log", in_world, spoil, config) as ranks:
        assert ranks.join() == [1, 1]
        said = ranks.said(0) + ranks.said(1)
    assert said.count("error: step 6: the loss or the gradient is not finite") == 1, said
    assert newest_step(tmp_path / "out") == 4


def fail(world: World) -> None:
    world.at(3)
    if world.rank == 1:
        raise InputError("--data.url: unreadable on this node")
    world.gather(None)


def test_an_error_on_one_rank_ends_all_and_is_told(tmp_path: Path) -> None:
    with Ranks(2, tmp_path / "log", in_world, fail) as ranks:
        assert ranks.join() == [1, 1]
        assert ranks.said(1) == "rank 1: error: --data.url: unreadable on this node\n"
        assert "error: rank 1 failed: --data.url: unreadable on this node" in ranks.said(0)
