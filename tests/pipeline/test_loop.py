"""The training loop: a run interrupted at any moment ends bit-identical to an uninterrupted one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run_module, run_train, small_disk, tiny
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import loop
from pipeline.data.shards import load_index
from pipeline.data.stream import stream
from pipeline.distributed.world import World
from pipeline.loop import train
from pipeline.run import recorder
from pipeline.run.checkpoint import Checkpoints, DamagedCheckpoint
from pipeline.run.interrupted import INTERRUPTED_FILE
from pipeline.run.journal import JOURNAL, read_journal
from pipeline.step import NonFinite, TrainState, train_step
from pipeline.storage.store import Store

IMPORTANCE = ("--diffusion.loss", "rescaled_kl", "--timestep-sampler", "loss-second-moment")


def newest(out: object) -> dict:
    """Return all tensors of the newest checkpoint, by part and name."""
    _, parts = Checkpoints(Store(str(out))).load()
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differ, differ[:5]


def assert_close(a: dict, b: dict, relative: float) -> None:
    """Return max |a - b| / max |b| over each part.

    Not over each tensor: the gradient of a bias before a GroupNorm with one channel per group is pure rounding error.
    """
    assert a.keys() == b.keys()
    for part in {name.split("/")[0] for name in a}:
        names = [name for name in a if name.startswith(part + "/")]
        largest = max(b[name].abs().max().double() for name in names)
        difference = max((a[name].double() - b[name].double()).abs().max() for name in names)
        assert difference <= relative * largest, (part, difference, largest)


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["metrics"]["train/loss"] for r in read_journal(out) if r["kind"] == "metrics"}


def test_a_run_from_start_to_end(digits: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(tiny(digits, out), World()) == "finished"
    records = read_journal(out)
    values = next(r["metrics"] for r in records if r["kind"] == "metrics" and r["step"] == 12)
    for name in ("loss", "mse", "vb", "grad_norm", "lr", "images_per_second"):
        assert values[f"train/{name}"] > 0
    assert {f"train/vb_q{q}" for q in range(4)} <= values.keys() | {"train/vb_q0", "train/vb_q3"}
    assert values["train/images"] == 12 * 16
    assert values["compute/train_flops"] > 1e6
    assert 0 < values["compute/utilization"] < 2
    assert records[-1]["status"] == "FINISHED"
    with Image.open(out / "samples" / "samples-0000012.png") as grid:
        assert grid.size[0] > 100
    assert train(tiny(digits, out), World()) == "finished"  # already complete
    longer = tiny(digits, out, "--horizon", "14steps")
    assert train(longer, World()) == "finished"
    assert Checkpoints(Store(str(out))).load()[0].step == 14


@pytest.mark.parametrize("flags", [(), IMPORTANCE, ("--model.dropout", "0.2", "--data.random-flip")])
def test_the_same_command_trains_the_same_run(digits: str, tmp_path: Path, flags: tuple[str, ...]) -> None:
    for name in ("a", "b"):
        train(tiny(digits, tmp_path / name, *flags), World())
    assert_same(newest(tmp_path / "a"), newest(tmp_path / "b"))
    other = tiny(digits, tmp_path / "c", *flags, "--seed", "1")
    train(other, World())
    assert any(not torch.equal(x, newest(tmp_path / "c")[n]) for n, x in newest(tmp_path / "a").items())


def test_interrupted_and_resumed_is_the_same_run(digits: str, tmp_path: Path) -> None:
    class Interrupting(World):
        """Requests a stop before one step."""

        stop_at = now = -1

        def at(self, step: int) -> None:
            self.now = step

        def stop_agreed(self) -> bool:
            return self.now == self.stop_at

    train(tiny(digits, tmp_path / "whole", *IMPORTANCE), World())
    out = tmp_path / "cut"
    for at in (3, 4, 7, 11):
        world = Interrupting()
        world.stop_at = at
        assert train(tiny(digits, out, *IMPORTANCE), world) == "interrupted"
        assert json.loads((out / INTERRUPTED_FILE).read_text())["step"] == at
    assert train(tiny(digits, out, *IMPORTANCE), World()) == "finished"
    assert not (out / INTERRUPTED_FILE).exists()
    assert_same(newest(tmp_path / "whole"), newest(out))
    assert losses(out) == losses(tmp_path / "whole")


def test_microbatches_train_the_same_run(digits: str, tmp_path: Path) -> None:
    fp64 = ("--precision", "fp64", *IMPORTANCE)
    for size in (16, 5, 1):
        train(tiny(digits, tmp_path / str(size), *fp64, "--microbatch", str(size)), World())
    whole = newest(tmp_path / "16")
    for size in (5, 1):
        assert_close(newest(tmp_path / str(size)), whole, 1e-9)


@pytest.mark.parametrize("loss", ["rescaled_mse", "rescaled_kl"])
def test_a_step_never_waits_for_the_device(digits: str, tmp_path: Path, loss: str) -> None:
    """Reading a device tensor on the host would stall a GPU: count the operations that do so."""
    config = tiny(digits, tmp_path, *IMPORTANCE, "--diffusion.loss", loss)
    world = World()
    state = TrainState(config, world)
    store = Store(digits)
    batches = stream(store, load_index(store, "train"), seed=0, position=0, batch_size=16)

    class Count(TorchDispatchMode):
        syncs = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                self.syncs += (function,)
            return function(*args, **(kwargs or {}))

    train_step(state, next(batches), world)
    with Count() as count:
        train_step(state, next(batches), world)
        state.ema.update(state.params, state.step)
    # The remaining one is AdamW's on the CPU, whose step counter is on the host there.
    assert len(count.syncs) == 0, count.syncs


def test_divergence_stops_with_the_step_and_keeps_the_last_good_checkpoint(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(digits, tmp_path, "--horizon", "8steps"), World())
    good = newest(tmp_path)

    step = loop.train_step

    def poisoned(state: TrainState, batch: object, world: World) -> None:
        if state.step == 9:
            with torch.no_grad():
                state.params["time_embed.0.weight"].fill_(float("nan"))
        step(state, batch, world)

    monkeypatch.setattr(loop, "train_step", poisoned)
    (tmp_path / INTERRUPTED_FILE).touch()  # by an earlier attempt
    with pytest.raises(NonFinite, match=r"step 10: .*last good checkpoint"):
        train(tiny(digits, tmp_path, "--horizon", "40steps"), World())
    assert not (tmp_path / INTERRUPTED_FILE).exists()
    assert_same(newest(tmp_path), good)
    assert read_journal(tmp_path)[-1]["status"] == "FAILED"


def test_divergence_with_the_importance_sampler_is_the_same_error(digits: str, tmp_path: Path) -> None:
    """With 4 timesteps, 64 losses fill the sampler's history long before anyone looks at the loss."""
    config = tiny(digits, tmp_path, *IMPORTANCE, "--diffusion.timesteps", "4", "--sample-steps", "4", "--lr", "1e6")
    config = replace(config, horizon="40steps", log_every=40, checkpoint_every=40, sample_every=0)
    with pytest.raises(NonFinite, match=r"step \d+: the loss or the gradient is not finite"):
        train(config, World())
    assert read_journal(tmp_path)[-1]["status"] == "FAILED"


def test_an_evaluation_that_fails_is_a_warning_after_the_checkpoint(digits: str, tmp_path: Path, capsys) -> None:
    data, out = Path(shutil.copytree(digits, tmp_path / "data")), tmp_path / "run"
    for shard in data.glob("val-*.tar"):
        shard.write_bytes(shard.read_bytes()[:-1000])
    config = tiny(str(data), out, "--eval-every", "6", "--eval-images", "4", "--horizon", "12steps")
    assert train(config, World()) == "finished"
    said = capsys.readouterr().out
    assert "warning: step 6 has no evaluation: shard" in said
    assert "warning: step 12 has no evaluation: shard" in said
    train(tiny(digits, tmp_path / "whole"), World())
    assert_same(newest(out), newest(tmp_path / "whole"))
    assert read_journal(out)[-1]["status"] == "FINISHED"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the killed attempts' open journals
def test_what_follows_a_checkpoint_is_made_up_for(digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that dies between a checkpoint and the grid and evaluation of its step leaves them to the next."""

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    config = tiny(digits, tmp_path, "--eval-every", "6", "--eval-images", "4", "--checkpoint-every", "6")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_draw_grid", die)
        patch.setattr(recorder.RunRecorder, "fail", lambda self, _: self.writer.close())  # no more than SIGKILL leaves
        for step in (6, 12):
            with pytest.raises(Killed):
                train(config, World())
            assert Checkpoints(Store(str(tmp_path))).load()[0].step == step
            patch.setattr(loop, "_draw_grid", lambda state, *_: die() if state.step == 12 else None)
    assert train(config, World()) == "finished"
    evaluated = [r["step"] for r in read_journal(tmp_path) if r["kind"] == "evaluation"]
    assert evaluated == [6, 12]
    assert (tmp_path / "samples" / "samples-0000012.png").exists()


def test_a_remote_run_that_failed_says_so_elsewhere(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise NonFinite("step 1")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train_step", failing)
    with pytest.raises(NonFinite):
        train(tiny(digits, "memory://failed/run"), World())
    assert read_journal(Store("memory://failed/run"))[-1]["status"] == "FAILED"


def test_a_history_cut_off_behind_the_last_checkpoint_is_closed(digits: str, tmp_path: Path) -> None:
    train(tiny(digits, tmp_path), World())
    lines = (tmp_path / JOURNAL).read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["status"] == "FINISHED"
    for last in ("", lines[-1].replace("FINISHED", "FAILED")):
        (tmp_path / JOURNAL).write_text("".join(lines[:-1]) + last)
        assert train(tiny(digits, tmp_path), World()) == "finished"
        assert read_journal(tmp_path)[-1]["status"] == "FINISHED"
    journal = (tmp_path / JOURNAL).read_text()
    assert train(tiny(digits, tmp_path), World()) == "finished"
    assert (tmp_path / JOURNAL).read_text() == journal


@pytest.mark.parametrize("flags", [("--lr", "0.5"), ("--seed", "3"), ("--model.channels", "64")])
def test_another_configuration_is_refused(digits: str, tmp_path: Path, flags: tuple[str, str]) -> None:
    train(tiny(digits, tmp_path, "--horizon", "4steps"), World())
    with pytest.raises(ValueError, match=flags[0]):
        train(tiny(digits, tmp_path, *flags), World())


def test_data_that_does_not_fit_is_refused(digits: str, unlabelled: str, tmp_path: Path) -> None:
    for flags, says in (
        (("--model.in-channels", "3"), "expected \\(3, 8, 8\\)"),
        (("--model.num-classes", "9"), "at least the 10"),
    ):
        with pytest.raises(ValueError, match=says):
            train(tiny(digits, tmp_path / "a", *flags), World())
    with pytest.raises(ValueError, match="the data have no labels; prepare them with class folders"):
        train(tiny(unlabelled, tmp_path / "a", "--model.num-classes", "10"), World())
    with pytest.raises(FileNotFoundError, match=r"pipeline\.prepare"):
        train(tiny(str(tmp_path / "nowhere"), tmp_path / "a"), World())
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").rglob("*.json*"))


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_shard_is_one_clear_error_and_loses_nothing(digits: str, tmp_path: Path, damage: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    out = tmp_path / "run"
    flags = ("--data.url", str(data), "--data.window", "1", "--out", str(out), *TINY[2:])
    run_train("--batch-size", "16", *flags, "--horizon", "4steps")
    for shard in data.glob("train-*.tar"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 16
        shard.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    result = run_train("--batch-size", "16", *flags, "--horizon", "200steps", check=False)
    assert result.returncode == 1
    assert "train-0" in result.stderr
    assert "damaged" in result.stderr
    assert "Traceback" not in result.stderr
    assert Checkpoints(Store(str(out))).load()[0].step == 4


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(digits: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    train(tiny(digits, tmp_path / "whole"), World())
    train(tiny(digits, out, "--horizon", "8steps"), World())
    file = Checkpoints(Store(str(out))).load()[0].parts["optimizer"]["file"]
    part = out / "checkpoints" / "data" / file
    part.write_bytes(part.read_bytes()[:-100])
    assert train(tiny(digits, out), World()) == "finished"
    said = capsys.readouterr().out
    assert "trying the checkpoint before it" in said
    assert "resuming at step 4" in said
    assert_same(newest(out), newest(tmp_path / "whole"))
    assert losses(out) == losses(tmp_path / "whole")

    for part in (out / "checkpoints" / "data").iterdir():
        part.write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match=r"all .* checkpoints are damaged"):
        train(tiny(digits, out, "--horizon", "20steps"), World())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, "40m") as disk:
        yield disk


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_cannot_be_written_is_one_clear_error(
    digits: str, tmp_path: Path, disk: Path, trouble: str
) -> None:
    out, filler = disk / "run", disk / "filler"
    train(tiny(digits, out, "--horizon", "4steps"), World())
    good = newest(out)
    if trouble == "full":
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], capture_output=True)  # until it is full
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    flags = [*TINY, "--data.url", digits, "--out", str(out)]
    result = run_train(*flags, check=False)
    assert result.returncode == 1
    assert ("No space left" if trouble == "full" else "Read-only") in result.stderr
    assert "Traceback" not in result.stderr
    assert_same(newest(out), good)

    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    filler.unlink(missing_ok=True)
    run_train(*flags)
    train(tiny(digits, tmp_path / "undisturbed"), World())
    assert_same(newest(out), newest(tmp_path / "undisturbed"))


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(digits: str, tmp_path: Path) -> None:
    """After five SIGKILLs at arbitrary moments, weights, EMA, optimizer and sampler end bit-identical."""
    flags = [*TINY, "--data.url", digits, "--horizon", "400steps", *IMPORTANCE, "--sample-every", "0"]
    flags += ["--log-every", "7", "--checkpoint-every", "5"]
    run_train(*flags, "--out", str(tmp_path / "whole"))
    out = tmp_path / "killed"
    rng = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.train", *flags, "--out", str(out)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        seen = step_reached(out)
        wait_until(lambda seen=seen, process=process: step_reached(out) > seen or process.poll() is not None)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.wait()
    result = run_train(*flags, "--out", str(out))
    assert "finished at step 400" in result.stdout
    assert_same(newest(tmp_path / "whole"), newest(out))
    assert losses(out) == losses(tmp_path / "whole")


def step_reached(out: Path) -> int:
    records = Checkpoints(Store(str(out))).records() if out.exists() else []
    return max((r.step for r in records), default=0)


def wait_until(condition, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_checkpoints_and_exits_75(digits: str, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    flags = [
        *TINY,
        "--data.url",
        digits,
        "--out",
        str(out),
        "--horizon",
        "100000steps",
        "--sample-every",
        "0",
    ]
    process = subprocess.Popen([sys.executable, "-m", "pipeline.train", *flags], cwd=ROOT, stdout=subprocess.PIPE)
    wait_until(lambda: step_reached(out) > 0)
    os.kill(process.pid, number)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 75, said
    step = json.loads((out / INTERRUPTED_FILE).read_text())["step"]
    assert f"interrupted at step {step}" in said
    assert step_reached(out) == step


@pytest.mark.slow
def test_sample_and_evaluate_a_run(digits: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny(digits, out, "--ema-rates", "0.9", "0.5"), World())
    grid = tmp_path / "grid.png"
    run_module("pipeline.sample", str(out), "--out", str(grid), "--count", "9", "--steps", "5")
    with Image.open(grid) as picture:
        assert picture.size == (200, 200)  # 3 x 3 tiles of 64 pixels and the lines between
    exact = ("--images", "8", "--exact", "--out", str(tmp_path / "terms.csv"))
    said = run_module("pipeline.evaluate", str(out), *exact).stdout
    assert "bits/dim" in said
    assert len((tmp_path / "terms.csv").read_text().splitlines()) == 1 + 20
    for flags, says in (
        (("--ema-rate", "0.7"), "expected 0.9, 0.5"),
        (("--step", "5"), "no checkpoint of step 5"),
    ):
        result = run_module("pipeline.sample", str(out), *flags, check=False)
        assert result.returncode == 1
        assert says in result.stderr
        assert "Traceback" not in result.stderr
    result = run_module("pipeline.evaluate", str(tmp_path / "nothing"), check=False)
    assert (result.returncode, "got no checkpoint" in result.stderr) == (1, True)
