"""The command: what it prints, and what reaches the run's history."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny

from pipeline.evaluate import EvaluateConfig, main
from pipeline.loop import train
from pipeline.tracking import read_journal
from pipeline.world import World

NO_TRACKING = {"tracking": tiny("", "x").tracking}


def evaluations(run: str | Path) -> list[dict[str, Any]]:
    return [r for r in read_journal(Path(run)) if r["kind"] == "evaluation"]


def test_values_go_to_the_terminal_and_the_journal(small_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(evaluations(small_run))
    options = {"images": 8, "draws": 2, "samples": 40, "steps": 3, "features": "trained", "neighbours": 4}
    config = EvaluateConfig(small_run, "nll,fid,precision", **options, **NO_TRACKING)  # type: ignore[arg-type]
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
    assert read_journal(Path(small_run))[-1]["status"] == "FINISHED"  # as it was
    main(config, World())  # the same values are not told twice
    assert len(evaluations(small_run)) == before + 1


def test_two_checkpoints_of_a_run_are_compared(small_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(EvaluateConfig(small_run, images=16, draws=4, against_step=20, **NO_TRACKING), World())
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
    main(EvaluateConfig(small_run, images=4, chain="best5", out=out, **NO_TRACKING), World())
    header, *rows = Path(out).read_text().splitlines()
    assert header == "timestep,vb_bits_per_dim,eps_mse"
    assert len(rows) == 5
    total = sum(float(row.split(",")[1]) for row in rows)
    said = capsys.readouterr().out
    printed = re.search(r"nll_best5 +([\d.]+)", said)
    assert printed
    assert float(printed[1]) == pytest.approx(total, abs=1e-3)
    with pytest.raises(ValueError, match="which only --exact and --chain know"):
        EvaluateConfig(small_run, out=out)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metrics": "nll,bpd"}, "expected some of nll, fid"),
        ({"metrics": ""}, "expected some of nll, fid"),
        ({"images": 0}, "--images: got 0"),
        ({"metrics": "fid", "steps": 21, "features": "trained"}, "expected 1 to the run's T = 20"),
        ({"metrics": "fid", "features": "nonsense"}, "expected one of inception, trained"),
    ],
)
def test_mistakes_are_one_line(small_run: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        main(EvaluateConfig(small_run, **options, **NO_TRACKING), World())


def test_training_evaluates_and_is_not_changed_by_it(digits: str, tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="--eval-metrics: got 'fidd'"):
        train(tiny(digits, tmp_path / "b", "--eval-metrics", "fidd"), World())


@pytest.mark.slow
def test_mlflow_gets_values_and_passports(digits: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    out = tmp_path / "run"
    train(tiny(digits, out, "--tracking.uri", uri, "--sample-every", "0"), World())
    tracking = tiny(digits, out, "--tracking.uri", uri, "--tracking.flush-s", "120").tracking
    main(EvaluateConfig(str(out), images=4, draws=2, tracking=tracking), World())
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
    journal.write_text("".join(line for line in lines if '"status"' not in line))  # as another process leaves it
    main(EvaluateConfig(str(tmp_path), images=4, draws=2, **NO_TRACKING), World())
    assert [r["kind"] for r in read_journal(tmp_path)][-1] == "evaluation"
