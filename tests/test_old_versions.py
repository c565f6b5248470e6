"""What an earlier version wrote is read, resumed and reported: tests/data/e3725b7 was written by that commit.

`run` was trained for 4 steps with the flags in flags.txt on `dataset`; step-8-model.safetensors are the weights that
the same version reached from there. `study` holds a finished study without its checkpoints, and the fit it reported.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_module
from ranks import newest
from safetensors.torch import load_file

from pipeline.run.journal import read_journal

OLD = Path(__file__).parent / "data" / "e3725b7"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_an_old_run_resumes_as_the_old_version_would_have(old: Path) -> None:
    flags = (old / "flags.txt").read_text().split()
    flags[flags.index("run")], flags[flags.index("dataset")] = str(old / "run"), str(old / "dataset")
    before = read_journal(old / "run")
    # One thread, as when it was written: the last bits of float32 sums depend on it.
    run_module("pipeline.train", *flags, "--horizon", "8steps", env={"OMP_NUM_THREADS": "1"})

    reference, resumed = load_file(old / "step-8-model.safetensors"), newest(old / "run")
    for name, expected in reference.items():
        # Equal bit for bit where the processor's kernels are those of the machine that wrote the reference.
        torch.testing.assert_close(resumed[f"model/{name}"], expected, rtol=0, atol=1e-4, msg=name)
    journal = read_journal(old / "run")
    assert journal[: len(before)] == before
    assert [r["step"] for r in journal if r["kind"] == "metrics"] == [2, 4, 6, 8]
    assert {r["uid"] for r in journal if r["kind"] == "run"} == {before[0]["uid"]}


def test_an_old_run_and_dataset_are_sampled_evaluated_and_verified(old: Path) -> None:
    run, data = str(old / "run"), str(old / "dataset")
    flags = ("--data", data, "--exact", "--images", "8", "--tracking.uri", "none")
    for rate in ("0.9", "0"):
        run_module("pipeline.evaluate", run, "--ema-rate", rate, *flags, env={"OMP_NUM_THREADS": "1"})
    evaluations = [r for r in read_journal(old / "run") if r["kind"] == "evaluation"]
    average, weights, new_average, *again = (r["metrics"]["eval/nll"] for r in evaluations)
    assert again == pytest.approx([weights] * len(again), rel=1e-4)  # none, if equal bit for bit
    # At step 4 two thirds of the old average are the initial weights; the new one is close to the trained weights.
    assert abs(new_average - weights) < 0.5 * abs(average - weights)
    averages = [r["passports"]["eval/nll"].get("averages") for r in evaluations[:3]]
    assert averages == [None, None, "normalised"]
    run_module("pipeline.sample", run, "--out", str(old / "grid.png"), "--count", "4")
    assert "all hashes match" in run_module("pipeline.prepare", "--verify", data).stdout


def test_an_old_study_is_complete_and_reported(old: Path) -> None:
    file = old / "study.yaml"
    file.write_text(f"out: {old / 'study'}\n" + (old / "study" / "tiny.yaml").read_text())
    said = run_module("jobs.study", "status", str(file)).stdout
    assert "12 of 12 points measured" in said, said
    assert "12 of 12 runs are done" in run_module("jobs.study", "run", str(file)).stdout
    run_module("jobs.study", "report", str(file), "--out", str(old / "report"))
    fit = json.loads((old / "report" / "fit.json").read_text())
    before = json.loads((old / "study" / "fit.json").read_text())
    assert [p["value"] for p in fit["nll"]["points"]] == [p["value"] for p in before["nll"]["points"]]
    assert fit["fd_digits"]["real_images"] == before["fd_digits"]["real_images"]
