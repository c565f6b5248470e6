"""A study: its file, its plan, its runs from the start through a signal to the end, and its report."""

import base64
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_module
from laws import BUDGETS, grid, line
from mlflow import MlflowClient

from iddpm.config import UNetConfig
from jobs.study import plan
from jobs.study.__main__ import main
from jobs.study.figures import draw_figures
from jobs.study.file import Study, load_study
from jobs.study.findings import Findings
from jobs.study.plan import Plan, print_plan
from jobs.study.points import Status, load_points, print_status
from jobs.study.report import _page, write_report
from jobs.study.run import RAY_ENV, Execute, execute
from pipeline.cli import parse_train
from pipeline.config import TrainConfig, record
from pipeline.evaluation.measured import Measured
from pipeline.hardware import count
from pipeline.run.journal import read_journal
from pipeline.storage.store import Store
from studies import study_file


def test_the_runs_of_a_study_file(tmp_path: Path) -> None:
    path = study_file(tmp_path, seeds=[2, 1], lr=1e-3)
    runs = load_study(path).runs
    assert [run.name for run in runs] == [
        *("32-1e+10-0", "32-1e+10-1", "32-2e+10-0", "32-2e+10-1"),
        *("64-1e+10-0", "64-2e+10-0"),
    ]
    assert len({run.config.seed for run in runs if run.value == "32"}) == 4  # budgets are independent
    assert runs[-1].config.lr == pytest.approx(1e-3 / math.sqrt(64 / 128))
    assert runs[-1].config.model == UNetConfig(8, 1, 64, (1,), 1, ())
    train = {"launch": {"device": "cpu"}, "storage": {"endpoint_url": "http://127.0.0.1:8333"}}
    elsewhere = load_study(study_file(tmp_path, train))
    assert elsewhere.runs[0].config.launch.device == "cpu"  # as in a --config file
    assert elsewhere.evaluation.storage == elsewhere.runs[0].config.storage
    long = load_study(study_file(tmp_path, separate=False)).runs
    assert [(run.name, run.budgets) for run in long] == [("32-0", (1e10, 2e10)), ("64-0", (1e10, 2e10))]
    wider = load_study(study_file(tmp_path, axis="model.channel_mult", values=["1", "1 2"])).runs
    assert wider[-1].config.model.channel_mult == (1, 2)
    assert wider[-1].name == "1x2-2e+10-0"
    for run in (*runs, *wider):  # the command line agrees with the plan
        assert parse_train(run.command(1e10)[3:])[0] == run.at(1e10)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"budgets": [-1e10]}, "expected each a positive number"),
        ({"budgets": [1.001e10, 1.002e10]}, "expected budgets that differ in their first three digits"),
        ({"budgets": [2e10, 1e10], "separate": False}, "expected ascending budgets"),
        ({"axis": "lr"}, "expected a field of the network"),
        ({"train": {"seed": 3, "lr": 1e-3}}, "train: got --lr, --seed, which a study sets for each of its runs"),
        ({"evaluate": {"against": "runs/x"}}, "evaluate: got --against, which a study sets"),
        ({"evaluate": {"target_se": 0.01}}, "points with different numbers of images are not comparable"),
        ({"seeds": [1, 2, 3]}, "expected one number, or one for each value"),
        ({"sizes": [1]}, "sizes"),
        ({"train": {"lrr": 1}}, "lrr"),
        ({"evaluate": {"image": 1}}, "--images"),
        ({"evaluate": {"metrics": "nll,is"}}, "expected comma-separated nll, fid, kid"),
    ],
)
def test_a_wrong_study_file_is_one_clear_error(tmp_path: Path, capsys, fields: dict, says: str) -> None:
    path = study_file(tmp_path, **fields)
    with pytest.raises(SystemExit) as ended:
        _ = [(loaded.runs, loaded.evaluation) for loaded in [load_study(path)]]
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_budget_that_is_added_changes_no_run_before_it(tmp_path: Path) -> None:
    before, after = (load_study(study_file(tmp_path, budgets=b)).runs for b in ([1e10, 4e10], [1e10, 4e10, 2e10]))
    assert set(before) < set(after)


def test_networks_of_one_size_are_refused(tmp_path: Path, capsys) -> None:
    path = study_file(tmp_path, axis="model.num_heads", values=[1, 2])
    for command in ("plan", "run"):
        with pytest.raises(SystemExit, match="1"):
            main([command, str(path)])
        assert "networks with equal numbers of parameters" in capsys.readouterr().err


def test_a_study_file_that_is_missing_is_named_once(tmp_path: Path, capsys) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(SystemExit, match="1"):
        main(["plan", str(missing)])
    assert capsys.readouterr().err == f"error: {missing}: No such file or directory\n"


def test_points_are_measured_again_only_if_what_is_asked_for_changes(tmp_path: Path) -> None:
    written = load_study(study_file(tmp_path, evaluate={"metrics": "nll,fid", "images": 4, "exact": True}))
    reordered = load_study(study_file(tmp_path, evaluate={"exact": True, "images": 4, "metrics": "fid,nll", "seed": 0}))
    other = load_study(study_file(tmp_path, evaluate={"metrics": "nll,fid", "images": 5, "exact": True}))
    fewer = load_study(study_file(tmp_path, evaluate={"metrics": "nll", "images": 4, "exact": True}))
    assert reordered.evaluate != written.evaluate
    assert reordered.measures_like(written.evaluate)
    assert not other.measures_like(written.evaluate)
    assert not fewer.measures_like(written.evaluate)


@pytest.mark.parametrize(
    ("evaluate", "says"),
    [
        ({"metrics": "nll", "split": "test"}, "no 'test' dataset"),
        ({"metrics": "nll", "chain": "best250"}, "expected at most the run's"),
        ({"ema_rate": 0.9}, "evaluate.ema_rate: got 0.9"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    tmp_path: Path, digits: str, capsys, evaluate: dict, says: str
) -> None:
    path = study_file(tmp_path, {"data": {"url": digits}}, evaluate=evaluate, out=str(tmp_path / "out"))
    with pytest.raises(SystemExit, match="1"):
        main(["run", str(path)])
    assert says in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/checkpoints"))


@pytest.mark.parametrize(
    ("channels", "parameters", "macs"),
    [(64, 30_303_494, "10.04"), (96, 68_126_598, "22.43"), (128, 121_063_942, "39.74"), (192, 272_281_350, "89.09")],
)
def test_the_papers_sizes_are_counted_exactly(channels: int, parameters: int, macs: str) -> None:
    cost = count(TrainConfig(model=UNetConfig(channels=channels)))
    assert cost.parameters == parameters
    assert f"{cost.forward / 2e9:.2f}" == macs
    assert cost.train == 3 * cost.forward


def test_a_plan_counts_and_warns(tmp_path: Path, capsys, monkeypatch, digits: str) -> None:
    monkeypatch.setattr(plan, "journal_of", None)  # a plan for other hardware needs no store of the runs
    path = study_file(tmp_path, {"warmup_steps": 5, "ema_rates": [0.99], "data": {"url": digits}}, budgets=[1e10])
    print_plan(Plan(path, utilisation=0.5, price=2.0))
    said = capsys.readouterr().out
    cost = count(load_study(path).runs[0].config)
    steps = math.ceil(1e10 / (16 * cost.train))
    row = next(line.split() for line in said.splitlines() if line.startswith("32-"))
    assert row[2] == f"{cost.parameters:,}"
    assert row[6] == str(steps)
    assert float(row[7]) == pytest.approx(steps * 16 / 1438, abs=0.01)
    measuring = 4 * 20 + 16 * 5
    hours = (steps * 16 * 3 + measuring) * cost.forward / (0.5 * 67e12) / 3600
    assert float(row[-2]) == pytest.approx(hours, rel=0.01)
    for warning in (
        "below one epoch",
        "warm-up of 5 steps",
        "average over 100 steps",
        "needs 3 or more sizes; the study has 2",
        "needs 4 budgets, and one more to hold out; the study has 1",
        "needs 6 or more runs, L(C) 4 at its frontier; the study has 2",
    ):
        assert warning in said
    with pytest.raises(ValueError, match="expected one of a100"):
        Plan(path, hardware="abacus")
    print_plan(Plan(path, hardware="A100"))
    assert "A100, fp32 at 30.0% of 19.5 TFLOP/s (assumed)" in capsys.readouterr().out


def test_what_slurm_and_ray_are_given(tmp_path: Path, capsys, digits: str, monkeypatch) -> None:
    path = study_file(tmp_path, {"data": {"url": digits}, "tracking": {"uri": "http://127.0.0.1:1"}})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="--launcher slurm: sbatch is not installed here"):
        execute(Execute(path, launcher="slurm"))
    assert "warning: MLflow does not answer" in capsys.readouterr().out
    assert "working_dir" in RAY_ENV.read_text()
    with pytest.raises(ValueError, match="a Ray job uploads"):
        execute(Execute(path, launcher="ray"))
    with pytest.raises(ValueError, match="expected 0 to 3"):
        execute(Execute(path, only="9"))


@pytest.mark.slow
def test_a_study_interrupted_and_run_again(tmp_path: Path, digits: str, capsys) -> None:
    """Each run stops within a step of its budget; a signal loses nothing; finished work is skipped."""
    train = {"data": {"url": digits}}
    path = study_file(tmp_path, train, budgets=[2e10], values=[32])
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    command = [sys.executable, "-m", "jobs.study", "run", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    only = tmp_path / "s" / "32-2e+10-0"
    end = time.monotonic() + 120
    while process.poll() is None and not any(r["kind"] == "metrics" for r in read_journal(only)):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said + (only / "log.txt").read_text()

    run_module("jobs.study", "run", str(path), env=environment)
    loaded = load_study(path)
    measured = load_points(loaded)
    assert measured.keys() == {"nll", "fd_digits"}
    (point,), (distance,) = measured.values()
    step = 16 * count(loaded.runs[0].config).train
    assert 2e10 <= point.flops < 2e10 + step
    assert point.flops == point.images * step / 16
    steps = [r["step"] for r in read_journal(only) if r["kind"] == "metrics"]
    assert steps == sorted(set(steps))
    assert sum(r["kind"] == "evaluation" for r in read_journal(only)) == 1

    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("s").experiment_id])
    parent = next(run for run in runs if run.data.tags["iddpm.uid"] == loaded.parent)
    (child,) = [run for run in runs if run is not parent]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    for value in (point, distance):
        assert child.data.metrics[f"eval/{value.name}"] == pytest.approx(value.value)
        assert child.data.metrics[f"eval/log10_{value.name}"] == pytest.approx(math.log10(value.value))
        assert json.loads(child.data.tags[f"eval/{value.name}.passport"]) == value.passport
    assert (point.passport["n"], distance.passport["n"]) == (4, 16)

    capsys.readouterr()
    write_report(loaded, str(tmp_path / "report"))
    floor = json.loads((tmp_path / "report" / "fit.json").read_text())["fd_digits"]["real_images"]
    assert 0 < floor["value"] < distance.value
    assert (
        floor["passport"] | {"n": 16, "real": "val", "reference": distance.passport["reference"]} == floor["passport"]
    )
    assert f"real images instead of generated ones: {floor['value']:.4f} (val, n 16)" in capsys.readouterr().out
    assert child.data.metrics["compute/train_flops"] == point.flops

    capsys.readouterr()
    assert execute(Execute(path)) == 0
    print_status(Status(path))
    said = capsys.readouterr().out
    assert "1 of 1 runs are done" in said
    assert f"{point.value:.4f}  {distance.value:9.4f}" in said
    # With other `evaluate` settings, it is measured again, without training.
    path = study_file(tmp_path, train, budgets=[2e10], values=[32], evaluate={"images": 8})
    assert execute(Execute(path, only="0")) == 0
    assert [(name, p.passport["n"]) for name, (p,) in load_points(load_study(path)).items()] == [("nll", 8)]
    with pytest.raises(ValueError, match="--lr"):
        execute(Execute(study_file(tmp_path, train, budgets=[2e10], values=[32], lr=3e-4), only="0"))


@pytest.fixture
def measured(tmp_path: Path) -> Study:
    """Write a study at a URL, whose points follow a known law."""
    points = grid(0.01)
    sizes = sorted({p.parameters for p in points})
    fields = {"values": [32, 64, 96, 128, 160], "budgets": [float(b) for b in BUDGETS]}
    out = f"memory://{tmp_path.name}"
    loaded = load_study(study_file(tmp_path, {"tracking": {"uri": "http://127.0.0.1:1"}}, out=out, **fields))
    for run in loaded.runs:
        size = sizes[loaded.values.index(run.value)]
        point = next(p for p in points if p.parameters == size and p.budget == run.budgets[0])
        both = [{**vars(point), "run": run.name, "name": name, "passport": {"n": 64}} for name in ("nll", "fd_digits")]
        content = {"points": both, "evaluate": loaded.evaluate, "config": record(run.at(run.budgets[0]))}
        loaded.store.write(run.point(run.budgets[0]), json.dumps(content).encode())
    return loaded


def test_a_report(measured: Study, tmp_path: Path, capsys) -> None:
    largest = measured.runs[-1].config
    Store(largest.out).write("samples/samples-0000001.png", b"a picture")
    write_report(measured, str(tmp_path / "r"))
    said = capsys.readouterr().out
    assert "alpha" in said
    assert re.search(r"L\(N, D\) .* FLOPs: predicted .* measured .*: (inside|OUTSIDE)", said)
    assert "compute-optimal at 1e+17" in said
    page = (tmp_path / "r" / "report.html").read_text()
    assert "warning: MLflow did not take the report" in said
    drawn = {f"{metric}-{name}.png" for metric in ("nll", "fd_digits") for name in ("frontier", "isoflop", "residuals")}
    assert {p.name for p in (tmp_path / "r").glob("*.png")} == drawn
    assert page.count("data:image/png;base64,") == 7
    assert base64.b64encode(b"a picture").decode() in page
    assert 'src="http' not in page
    fits = json.loads((tmp_path / "r" / "fit.json").read_text())
    value, low, high = fits["fd_digits"]["fits"]["L(N, D)"]["alpha"]
    assert low < value < high


def test_a_report_shows_names_from_files_as_text(measured: Study, tmp_path: Path) -> None:
    """Metrics and runs are named in files of a store, which others may write."""
    for run in measured.runs:
        name = run.point(run.budgets[0])
        content = json.loads(measured.store.read(name))
        content["points"] = [point | {"name": "<b>fd</b>", "run": "<i>r</i>"} for point in content["points"][:1]]
        measured.store.write(name, json.dumps(content).encode())
    findings = Findings(load_points(measured)["<b>fd</b>"])
    page = _page(measured, [findings], tmp_path)
    assert "<h2>&lt;b&gt;fd&lt;/b&gt;</h2>" in page
    assert "&lt;i&gt;r&lt;/i&gt;" in page
    assert not re.search("<[bi]>", page)


def test_a_caption_describes_only_what_is_drawn(measured: Study) -> None:
    points = load_points(measured)["fd_digits"]
    findings = Findings(points)
    _, caption = draw_figures(findings)["frontier"]
    assert "square" in caption
    assert "dotted" not in caption
    few = Findings([p for p in points if p.budget < BUDGETS[2]], Measured("fd_digits", 1.0, 0, {}))
    _, caption = draw_figures(few)["frontier"]
    assert "line and band" not in caption
    assert "square" not in caption
    assert "dotted: the same number of real images" in caption


def test_a_report_says_what_it_refuses(measured: Study) -> None:
    few = [p for p in load_points(measured)["nll"] if p.budget < BUDGETS[2] and p.parameters < 1e7]
    findings = Findings(few)
    assert not findings.fits
    assert "expected 4 or more" in findings.refused["L(C)"]
    assert "refused: L(C)" in findings.text()
    assert set(draw_figures(findings)) == {"frontier", "isoflop"}


def test_the_papers_fit_is_drawn_only_beside_a_floor_that_is_known() -> None:
    known = Findings(line(0.005))
    assert "papers" in draw_figures(known)
    other = Findings([dataclasses.replace(p, name="fd_digits") for p in line(0.005)])
    assert "papers" not in draw_figures(other)  # it is not FID
    unknown = Findings(line(0.02, budgets=5, seeds=1))
    assert "papers" not in draw_figures(unknown)
    reason = unknown.fits["L(C)"].undetermined["E"]
    assert re.search(rf"  E .*\]  undetermined: {reason}", unknown.text())
    assert f"warning: L(C): the points do not determine E: {reason}" in unknown.text()


def test_a_changed_passport_is_refused(measured: Study, tmp_path: Path, capsys) -> None:
    name = measured.runs[0].point(measured.runs[0].budgets[0])
    content = json.loads(measured.store.read(name))
    content["points"][0]["passport"]["n"] = 32
    measured.store.write(name, json.dumps(content).encode())
    write_report(measured, None)
    said = capsys.readouterr().out
    assert re.search(r"refused: nll: .* not comparable: they differ in n: 32 and 64", said)
    assert "fd_digits: 25 points" in said
    with pytest.raises(ValueError, match="no points to fit"):
        write_report(load_study(study_file(tmp_path)), None)
