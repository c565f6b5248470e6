"""Training from and to a real S3 server: failing requests, kills and changes of world size lose nothing."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from conftest import TINY, small_disk, tiny
from PIL import Image
from ports import free_port
from ranks import FORKS
from s3 import KEY, SECRET, FaultProxy, credentials

from pipeline import evaluate, sample
from pipeline.data.order import expected_digest
from pipeline.data.shards import load_index
from pipeline.distributed.world import World
from pipeline.evaluation.nll import NllPlan
from pipeline.loop import train
from pipeline.prepare import prepare_digits
from pipeline.run.checkpoint import Checkpoints
from pipeline.run.journal import JOURNAL, journal_dir, read_journal
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store

pytestmark = [pytest.mark.s3, pytest.mark.slow]

DATA = "s3://train/digits"


@pytest.fixture(scope="module")
def shards(s3: str) -> str:
    """Prepare the digits on the server."""
    prepare_digits(DATA, StorageConfig(s3))
    return DATA


def newest(store: Store) -> tuple[int, dict[str, torch.Tensor]]:
    """Return the step and all tensors of the newest checkpoint."""
    record, parts = Checkpoints(store).load()
    return record.step, {f"{part}/{name}": tensor for part in parts for name, tensor in parts[part].items()}


def start(machine: Path, flags: list[str], **env: str) -> ForkServerProcess:
    """Run `python -m pipeline.train` in the folder `machine`, which represents a computer and holds its local files."""
    machine.mkdir(exist_ok=True)
    process = FORKS.Process(target=_main, args=(machine, flags, {**os.environ, **env}))
    process.start()
    return process


def _main(machine: Path, flags: list[str], env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(machine)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from pipeline.train import main

    main(flags)


def start_all(machine: Path, world: int, flags: list[str]) -> list[ForkServerProcess]:
    """Start all ranks, with torchrun's variables."""
    if world == 1:
        return [start(machine, flags)]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    sizes = {**where, "LOCAL_WORLD_SIZE": str(world)}
    return [start(machine, flags, RANK=str(r), LOCAL_RANK=str(r), **sizes) for r in range(world)]


def log(machine: Path) -> str:
    return (machine / "log").read_text() if (machine / "log").exists() else ""


def wait(processes: list[ForkServerProcess], machine: Path) -> None:
    """Wait until all ranks have succeeded."""
    for process in processes:
        process.join(180)
        assert process.exitcode == 0, log(machine)[-3000:]


def test_faults_kills_and_other_worlds_change_nothing(
    s3: str,
    shards: str,
    digits: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On 1, then 2, then 1 ranks, with 30 % of all requests failing, killed five times at random moments and resumed
    elsewhere: each sample of every epoch is consumed once, and the weights are those of an undisturbed run."""
    legs = ((1, 24, 2), (2, 48, 2), (1, 72, 1))  # ranks, to which step, kills
    flags = [*TINY, "--batch-size", "64", "--checkpoint-every", "3", "--log-every", "2", "--sample-every", "20"]
    flags += ["--diffusion.loss", "rescaled_kl", "--timestep-sampler", "loss-second-moment"]
    run, rng, direct = "s3://ckpt/disturbed", random.Random(0), StorageConfig(s3)
    kills = 0
    with FaultProxy(s3, rate=0.3, seed=6) as proxy:
        proxy.stall_s = 0.5
        remote = ["--storage.endpoint-url", proxy.url, "--storage.deadline-s", "90"]
        for world, horizon, wanted in legs:
            for attempt in range(wanted + 1):
                machine = tmp_path / "ab"[kills % 2]
                leg = [*flags, *remote, "--data.url", shards, "--out", run, "--horizon", f"{horizon}steps"]
                leg += ["--data.cache-dir", str(machine / "cache")]
                before = reached(Store(run, direct))
                if attempt == wanted and world == 2:  # by torchrun itself
                    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
                    subprocess.run([*command, "-m", "pipeline.train", *leg], cwd=machine, check=True, timeout=300)
                    continue
                processes = start_all(machine, world, leg)
                if attempt == wanted:
                    wait(processes, machine)
                    continue
                for _ in range(2400):
                    if reached(Store(run, direct)) > before:
                        break
                    assert all(process.is_alive() for process in processes), log(machine)[-3000:]
                    time.sleep(0.05)
                time.sleep(rng.random())
                assert all(process.is_alive() for process in processes), "the leg was over before it was killed"
                for process in processes:  # as when a computer fails
                    process.kill()
                    process.join()
                kills += 1
        assert kills == 5
        assert sum(proxy.counts.values()) - proxy.counts["passed"] > 100
        assert len([fault for fault in proxy.counts if proxy.counts[fault]]) == 9  # every kind of fault, and "passed"

        # Sampling and evaluation read through the same faults.
        grid, config = tmp_path / "grid.png", StorageConfig(proxy.url, deadline_s=90)
        sample.main(sample.SampleConfig(run, out=str(grid), count=4, storage=config), World())
        evaluate.main(evaluate.EvaluateConfig(run, nll=NllPlan(4), storage=config), World())
        said = capsys.readouterr().out
        assert "step 72" in said
        assert "bits/dim" in said

    # The same world sizes, undisturbed, from and to the local disk.
    reference = tmp_path / "reference"
    for world, horizon, _ in legs:
        more = ["--horizon", f"{horizon}steps"]
        if world == 1:
            train(tiny(digits, reference, *flags, *more), World())
        else:
            where = ["--data.url", digits, "--out", str(reference)]
            wait(start_all(tmp_path / "c", world, [*flags, *more, *where]), tmp_path / "c")
    step, disturbed = newest(Store(run, direct))
    assert step == 72
    _, undisturbed = newest(Store(reference))
    assert disturbed.keys() == undisturbed.keys()
    assert not [name for name in disturbed if not torch.equal(disturbed[name], undisturbed[name])]

    # The journal under the run's URL is complete, wherever the attempts ran.
    journal, index = read_journal(Store(run, direct)), load_index(Store(shards, direct), "train")
    epochs = {r["step"]: r["digest"] for r in journal if r["kind"] == "epoch"}
    assert epochs == {epoch: expected_digest(index, epoch) for epoch in range(72 * 64 // index.num_samples)}
    assert len(epochs) == 3
    losses, expected = ({r["step"]: r["metrics"]["train/loss"] for r in records if r["kind"] == "metrics"}
                        for records in (journal, read_journal(reference)))  # fmt: skip
    assert losses == expected
    assert list(losses) == list(range(2, 73, 2))
    assert len({r["uid"] for r in journal if r["kind"] == "run"}) == 1
    assert [r["kind"] for r in journal[-2:]] == ["status", "evaluation"]
    assert journal[-2]["status"] == "FINISHED"
    for name in ("samples-0000020.png", "samples-0000060.png", "samples-0000072.png"):
        Store(f"{run}/samples", direct).download(name, tmp_path / name)
        Image.open(tmp_path / name).verify()
    with Image.open(grid) as picture:
        assert picture.size == (134, 134)


def reached(run: Store) -> int:
    return max((record.step for record in Checkpoints(run).records()), default=0)


def test_a_run_goes_on_elsewhere_with_its_history(s3: str, shards: str, tmp_path: Path, monkeypatch) -> None:
    """Machine a, then b, then a again: each continues the run's journal, whatever the state of its local copy."""
    run, endpoint = "s3://ckpt/elsewhere", ("--storage.endpoint-url", s3, "--data.cache-dir", str(tmp_path / "cache"))
    for machine, horizon in (("a", 4), ("b", 8), ("a", 12), ("b", 12)):
        (tmp_path / machine).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / machine)
        train(tiny(shards, run, *endpoint, "--log-every", "2", "--horizon", f"{horizon}steps"), World())
    journal = read_journal(Store(run, StorageConfig(s3)))
    assert [r["step"] for r in journal if r["kind"] == "metrics"] == [2, 4, 6, 8, 10, 12]
    assert [r["kind"] for r in journal].count("run") == 1
    assert [r["kind"] for r in journal].count("tags") == 3
    assert read_journal(tmp_path / "a" / journal_dir(Store(run))) == journal
    # A local copy that is ahead of the store's, as after a kill, is kept.
    monkeypatch.chdir(tmp_path / "a")
    ahead = journal_dir(Store(run)) / JOURNAL
    whole = ahead.read_bytes()
    Store(run, StorageConfig(s3)).write(JOURNAL, whole[: whole.index(b'"step": 8')].rpartition(b"\n")[0] + b"\n")
    train(tiny(shards, run, *endpoint, "--log-every", "2", "--horizon", "14steps"), World())
    assert ahead.read_bytes().startswith(whole)
    assert Store(run, StorageConfig(s3)).read(JOURNAL) == ahead.read_bytes()


def test_what_cannot_work_fails_at_once_with_advice(s3: str, shards: str, tmp_path: Path) -> None:
    right, out = (KEY, SECRET), "s3://ckpt/never"
    cases: dict[str, tuple[tuple[str | None, str | None], str, str, str, str]] = {
        "wrong secret": ((KEY, "hunter2-hunter2"), shards, out, s3, "the secret key is wrong"),
        "unknown key": (("nobody", SECRET), shards, out, s3, "does not know this access key"),
        "no credentials": ((None, None), shards, out, s3, "no credentials were found"),
        "no bucket for the run": (right, shards, "s3://nowhere/x", s3, "create the bucket"),
        "no bucket for the data": (right, "s3://nowhere/x", out, s3, "create the bucket"),
        "no data": (right, "s3://train/nothing", out, s3, "python -m pipeline.prepare"),
        "no server": (right, shards, out, "http://127.0.0.1:9", "the server is up"),
    }
    FORKS.Process(target=int).start()  # importing the server does not count as the program's time
    for name, (identity, data, run, endpoint, says) in cases.items():
        flags = [*TINY, "--data.url", data, "--out", run, "--storage.endpoint-url", endpoint]
        with credentials(*identity):
            began, machine = time.monotonic(), tmp_path / name
            process = start(machine, [*flags, "--storage.deadline-s", "5"])
            process.join(120)
            took = time.monotonic() - began
        said = log(machine)
        assert process.exitcode == 1, said
        assert [line for line in said.splitlines() if line.startswith("error: ") and says in line], said
        assert "Traceback" not in said
        assert took < 60
        assert not [text for text in ("hunter2", SECRET) if text in said]
    assert not Checkpoints(Store(out, StorageConfig(s3))).store.list()
    with pytest.raises(ValueError, match="s3://ckpt/never: got no checkpoint"):
        sample.load_trained(Store(out, StorageConfig(s3)), World())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system with room for one shard of the digits, but not for two."""
    with small_disk(tmp_path, "800k") as disk:
        yield disk


def test_training_goes_on_where_the_cache_s_disk_is_full(
    s3: str, shards: str, digits: str, tmp_path: Path, disk: Path
) -> None:  # fmt: skip
    out, flags = tmp_path / "run", ["--horizon", "30steps", "--batch-size", "64"]
    remote = ["--data.url", shards, "--storage.endpoint-url", s3, "--data.cache-dir", str(disk / "cache")]
    wait([start(tmp_path, [*TINY, *flags, *remote, "--out", str(out)])], tmp_path)
    said = log(tmp_path)
    assert said.count("is bypassed, shards stay in memory") == 1
    assert "the disk is full" in said
    train(tiny(digits, tmp_path / "undisturbed", *flags), World())
    (step, full), (_, roomy) = newest(Store(out)), newest(Store(tmp_path / "undisturbed"))
    assert step == 30
    assert not [name for name in full if not torch.equal(full[name], roomy[name])]
