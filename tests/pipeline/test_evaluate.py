"""The command: what it prints and what it adds to the run's history."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from ranks import Ranks, in_world

from pipeline.cli import parse_flags
from pipeline.config import TrainConfig
from pipeline.distributed.world import World
from pipeline.drawing import draw_batches
from pipeline.evaluate import EvaluateConfig, main
from pipeline.evaluation import measure as module
from pipeline.evaluation import resumable as blocks
from pipeline.evaluation.features import Features
from pipeline.evaluation.image_quality import moments_npz
from pipeline.evaluation.measure import ImagePlan, real_floor
from pipeline.evaluation.measured import Measured
from pipeline.evaluation.nll import NllPlan
from pipeline.loop import train
from pipeline.model import load_trained
from pipeline.run.journal import fetch_journal, read_journal
from pipeline.storage.store import Store

CPU = torch.device("cpu")
NO_TRACKING = {"tracking": tiny("", "x").tracking}


def evaluations(run: str | Path) -> list[dict[str, Any]]:
    return [r for r in read_journal(Path(run)) if r["kind"] == "evaluation"]


def measured(world: World, config: EvaluateConfig) -> list[Measured]:
    trained = load_trained(Store(config.run, config.storage), world, config.ema_rate, config.step)
    data = Store(config.data or trained.config.data.url, config.storage)
    return module.measure([trained], config.plan, data, world, Store(config.run, config.storage))


def test_values_go_to_the_terminal_and_the_journal(small_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(evaluations(small_run))
    images = ImagePlan(40, steps=3, features="trained", neighbours=4)
    config = EvaluateConfig(small_run, "nll,fid,precision", nll=NllPlan(8, draws=2), images=images, **NO_TRACKING)
    main(config, World())
    said = capsys.readouterr().out
    for name in ("nll ", "fd_digits ", "precision_digits ", "n 8, split val", "sampler ancestral, steps 3", "k 4"):
        assert name in said
    *_, last = evaluations(small_run)
    assert len(evaluations(small_run)) == before + 1
    assert last["step"] == 40
    assert last["metrics"].keys() == {
        "eval/nll",
        "eval/nll_se",
        "eval/fd_digits",
        "eval/precision_digits",
        "eval/train_flops",
    }
    assert last["passports"]["eval/fd_digits"] | {"n": 40, "seed": 0, "eta": 0.0} == last["passports"]["eval/fd_digits"]
    assert read_journal(Path(small_run))[-1]["status"] == "FINISHED"  # unchanged
    main(config, World())  # the same values are not recorded twice
    assert len(evaluations(small_run)) == before + 1


def test_what_images_lack_is_said_before_anything_is_measured(
    small_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure_nll", None)
    with pytest.raises(ValueError, match="--inception"):
        main(EvaluateConfig(small_run, "nll,fid", **NO_TRACKING), World())
    np.savez(tmp_path / "moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    images = ImagePlan(reference=str(tmp_path / "moments.npz"), features="trained")
    with pytest.raises(ValueError, match="--reference"):
        main(EvaluateConfig(small_run, "nll,fid", images=images, **NO_TRACKING), World())
    with pytest.raises(ValueError, match="--eta"):
        ImagePlan(eta=0.5)
    with pytest.raises(ValueError, match="needs a classifier"):
        EvaluateConfig(small_run, "nll,is", images=ImagePlan(features="clip-vit-b-32"))
    with pytest.raises(ValueError, match="expected less than --samples = 3"):
        EvaluateConfig(small_run, "recall", images=ImagePlan(3))


def test_two_checkpoints_of_a_run_are_compared(small_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(EvaluateConfig(small_run, nll=NllPlan(16, draws=4), against_step=20, **NO_TRACKING), World())
    said = capsys.readouterr().out
    assert "nll_difference" in said
    assert "the first is lower, clearly" in said
    *_, last = evaluations(small_run)
    assert last["metrics"].keys() == {
        "eval/nll",
        "eval/nll_se",
        "eval/train_flops",
    }  # the difference belongs to two runs


def test_exact_writes_its_terms(small_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "terms.csv")
    main(EvaluateConfig(small_run, nll=NllPlan(4, chain="best5"), out=out, **NO_TRACKING), World())
    header, *rows = Path(out).read_text().splitlines()
    assert header == "timestep,vb_bits_per_dim,eps_mse"
    assert len(rows) == 5
    total = sum(float(row.split(",")[1]) for row in rows)
    said = capsys.readouterr().out
    printed = re.search(r"nll_best5 +([\d.]+)", said)
    assert printed
    assert float(printed[1]) == pytest.approx(total, abs=1e-3)
    with pytest.raises(ValueError, match="--out: needs --exact or --chain"):
        EvaluateConfig(small_run, out=out)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--metrics", "nll,bpd"), "expected a comma-separated list of nll, fid"),
        (("--metrics", ""), "expected a comma-separated list of nll, fid"),
        (("--images", "0"), "--images: got 0"),
        (("--chain", "x"), "--chain: got 'x'"),
        (("--eta", "2", "--sampler", "ddim"), "--eta: got 2.0"),
        (("--timeout-s", "0"), "--timeout-s: got 0"),
    ],
)
def test_mistakes_in_flags_are_bad_usage(
    flags: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        parse_flags(EvaluateConfig, ["run", *flags], "")
    assert end.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (ImagePlan(steps=21, features="trained"), "expected 1 to the run's T = 20"),
        (ImagePlan(features="nonsense"), "expected one of inception, trained"),
    ],
)
def test_what_the_run_lacks_is_said(small_run: str, images: ImagePlan, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        main(EvaluateConfig(small_run, "fid", images=images, **NO_TRACKING), World())


def test_moments_alone_are_no_reference_for_all(
    small_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "trained_features", lambda *_: Features("inception", "x", lambda _: _, CPU))
    (tmp_path / "moments.npz").write_bytes(moments_npz(np.ones(64), np.eye(64)))
    config = images_config(small_run, reference=str(tmp_path / "moments.npz"))
    with pytest.raises(ValueError, match="kid, recall: need real images"):
        main(config, World())


def test_training_evaluates_and_is_not_changed_by_it(digits: str, tmp_path: Path, capsys) -> None:
    flags = ("--eval-every", "8", "--eval-metrics", "nll,fid", "--eval-images", "8", "--sample-every", "0")
    for name, more in (("plain", ()), ("evaluated", flags)):
        train(tiny(digits, tmp_path / name, *more), World())
    found = evaluations(tmp_path / "evaluated")
    assert [r["step"] for r in found] == [8, 12]
    assert found[0]["metrics"].keys() == {"eval/nll", "eval/nll_se", "eval/fd_digits", "eval/train_flops"}
    assert found[0]["passports"]["eval/nll"]["n"] == 8
    plain, evaluated = (
        [r["metrics"]["train/loss"] for r in read_journal(tmp_path / name) if r["kind"] == "metrics"]
        for name in ("plain", "evaluated")
    )
    assert plain == evaluated
    with pytest.raises(SystemExit):
        tiny(digits, tmp_path / "b", "--eval-metrics", "fidd")
    assert "--eval-metrics: got 'fidd'" in capsys.readouterr().err


def test_what_training_cannot_measure_is_refused_at_its_start(digits: str, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "train-only", ignore=shutil.ignore_patterns("val*"))
    flags = ("--eval-every", "8")
    with pytest.raises(FileNotFoundError, match="no 'val' dataset"):
        train(tiny(str(tmp_path / "train-only"), tmp_path / "out", *flags), World())
    assert not (tmp_path / "out").exists()


def test_what_real_images_get(small_run: str, digits: str, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "train-only", ignore=shutil.ignore_patterns("val*"))
    run, config = trained_config(small_run), images_config(small_run, samples=300)
    held_out = {value.name: value for value in real_floor(config.plan, run, Store(run.data.url), World())}
    assert held_out.keys() == {"fd_digits", "kd_digits", "recall_digits"}
    assert held_out["fd_digits"].passport["real"] == "val"
    # Training images are part of the reference: too close, and useless for metrics that compare with them directly.
    (part,) = real_floor(config.plan, run, Store(tmp_path / "train-only"), World())
    assert (part.name, part.passport["real"], part.passport["n"]) == ("fd_digits", "train", 300)
    assert 0 < part.value < held_out["fd_digits"].value
    with pytest.raises(ValueError, match="expected more than --samples = 5000 images"):
        real_floor(images_config(small_run, samples=5000).plan, run, Store(run.data.url), World())


def trained_config(run: str) -> TrainConfig:
    return load_trained(Store(run), World()).config


def images_config(run: str, **plan: Any) -> EvaluateConfig:
    images = ImagePlan(**{"samples": 36, "batch_size": 8, "steps": 3, "features": "trained", **plan})
    return EvaluateConfig(run, "fid,kid,recall", images=images, **NO_TRACKING)


def killed_evaluation(run: str, after: int) -> None:
    """Kill an evaluation, which stores each block at once, while it draws its next block."""
    drawn = []

    def dying(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        drawn.append(arguments)
        if len(drawn) > after:
            raise KeyboardInterrupt
        return draw_batches(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SAVE_S", -1.0)
        patch.setattr(module, "draw_batches", dying)
        with pytest.raises(KeyboardInterrupt):
            main(images_config(run), World())


def test_a_killed_evaluation_of_images_goes_on_where_it_was(
    small_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "killed"):
        shutil.copytree(small_run, tmp_path / name)
    main(images_config(str(tmp_path / "whole")), World())
    whole = capsys.readouterr().out
    killed_evaluation(str(tmp_path / "killed"), after=2)
    killed_evaluation(str(tmp_path / "killed"), after=1)
    assert evaluations(tmp_path / "killed") == evaluations(small_run)
    drawn = []

    def counting(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        drawn.append(range(*arguments[3:5]))
        return draw_batches(*arguments, **options)

    monkeypatch.setattr(module, "draw_batches", counting)
    main(images_config(str(tmp_path / "killed")), World())
    assert drawn == [range(24, 32), range(32, 36)]
    assert capsys.readouterr().out == whole
    assert evaluations(tmp_path / "killed")[-1]["metrics"] == evaluations(tmp_path / "whole")[-1]["metrics"]
    assert not list((tmp_path / "killed" / "evaluation").glob("images-*"))  # no large files remain


def test_images_of_another_measurement_are_not_mixed_in(small_run: str, tmp_path: Path) -> None:
    shutil.copytree(small_run, tmp_path / "run")
    killed_evaluation(str(tmp_path / "run"), after=2)
    (kept,) = {path.name.rsplit("-", 2)[0] for path in (tmp_path / "run" / "evaluation").glob("images-*")}
    assert len(list((tmp_path / "run" / "evaluation").glob(f"{kept}*"))) == 2
    copy, original = images_config(str(tmp_path / "run")), images_config(small_run)
    for options in ({"seed": 1}, {"step": 20}, {"ema_rate": 0.5}):
        there, here = (measured(World(), replace(config, **options)) for config in (copy, original))
        assert there == here
    for plan in ({"sampler": "ddim"}, {"steps": 4}, {"samples": 35}):
        images = replace(original.images, **plan)
        there, here = (measured(World(), replace(config, images=images)) for config in (copy, original))
        assert there == here
    assert len(list((tmp_path / "run" / "evaluation").glob(f"{kept}*"))) == 2


@pytest.mark.slow
def test_any_number_of_ranks_finds_the_same_images(small_run: str, tmp_path: Path) -> None:
    for size in (1, 3):
        shutil.copytree(small_run, tmp_path / str(size))
        if size == 3:
            killed_evaluation(str(tmp_path / "3"), after=2)  # alone
        config = images_config(str(tmp_path / str(size)))
        with Ranks(size, tmp_path / f"ranks-{size}", in_world, main_in_world, config) as ranks:
            assert ranks.join() == [0] * size, ranks.said(0)
    one, three = (evaluations(tmp_path / name)[-1] for name in ("1", "3"))
    assert one["metrics"] == three["metrics"]
    assert one["passports"] == three["passports"]


def main_in_world(world: World, config: EvaluateConfig) -> None:
    main(config, world)


@pytest.mark.slow
def test_mlflow_gets_values_and_passports(digits: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    out = tmp_path / "run"
    train(tiny(digits, out, "--tracking.uri", uri, "--sample-every", "0"), World())
    tracking = tiny(digits, out, "--tracking.uri", uri, "--tracking.flush-s", "120").tracking
    main(EvaluateConfig(str(out), nll=NllPlan(4, draws=2), tracking=tracking), World())
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("iddpm").experiment_id])
    (point,) = client.get_metric_history(run.info.run_id, "eval/nll")
    assert (point.step, point.value) == (12, evaluations(out)[0]["metrics"]["eval/nll"])
    assert json.loads(run.data.tags["eval/nll.passport"])["n"] == 4
    assert run.info.status == "FINISHED"
    assert torch.isfinite(torch.tensor(run.data.metrics["eval/nll_se"]))


def test_a_run_that_is_still_training_keeps_its_status(digits: str, tmp_path: Path) -> None:
    train(tiny(digits, tmp_path, "--horizon", "4steps", "--sample-every", "0"), World())
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"status"' not in line))  # as left by another process
    main(EvaluateConfig(str(tmp_path), nll=NllPlan(4, draws=2), **NO_TRACKING), World())
    assert [r["kind"] for r in read_journal(tmp_path)][-1] == "evaluation"


def test_evaluating_a_remote_run_while_it_trains_loses_nothing(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training overwrites the journal at the run's URL, so the line of an evaluation elsewhere is stored separately."""
    monkeypatch.chdir(tmp_path)  # where training has its journal
    (tmp_path / "elsewhere").mkdir()
    run = "memory://evaluated/run"

    def evaluate_now(step: int, _: dict[str, float]) -> None:
        if step == 12:  # after the checkpoint of step 4 is certainly committed, and before the last copy
            with contextlib.chdir(tmp_path / "elsewhere"):
                for _ in range(2):
                    main(EvaluateConfig(run, step=4, nll=NllPlan(4, draws=2), **NO_TRACKING), World())

    flags = ("--checkpoint-every", "4", "--log-every", "2", "--sample-every", "0")
    train(tiny(digits, run, *flags), World(), evaluate_now)
    train(tiny(digits, run, *flags, "--horizon", "16steps"), World())
    there = read_journal(Store(run))
    assert [r["step"] for r in there if r["kind"] == "metrics"] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [r["step"] for r in there if r["kind"] == "evaluation"] == [4]
    assert [r["status"] for r in there if r["kind"] == "status"] == ["FINISHED", "FINISHED"]
    fetch_journal(Store(run), tmp_path / "third")
    assert [r["step"] for r in evaluations(tmp_path / "third")] == [4]


def test_a_class_conditional_model_refuses_data_without_labels(small_run: str, unlabelled: str) -> None:
    with pytest.raises(ValueError, match="got data of 0 classes, expected 1 to the model's 10"):
        main(EvaluateConfig(small_run, data=unlabelled, **NO_TRACKING), World())
