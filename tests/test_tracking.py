"""The journal is complete and has each step once; MLflow gets all of it, whatever happens to its server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from mlflow import MlflowClient
from PIL import Image

from pipeline.config import TrackingConfig
from pipeline.storage import mask
from pipeline.tracking import JOURNAL, Tracker, find_uid, journal_dir, read_journal

CONFIG = {"lr": 0.1, "model": {"channels": 32}}
DATASET = {"url": "data/digits", "name": "digits", "digest": "0" * 32}


def tracker(folder: Path, uri: str, uid: str | None = None, **config: object) -> Tracker:
    options = {"experiment": "study", "flush_s": 120.0, **config}
    return Tracker(folder, TrackingConfig(uri=uri, **options), uid=uid, name="run", run_config=CONFIG, dataset=DATASET)


def steps(folder: Path) -> list[int]:
    return [r["step"] for r in read_journal(folder) if r["kind"] == "metrics"]


def the_run(uri: str):
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    return client, run


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    first = tracker(tmp_path, "none")
    for step in (1, 2, 3):
        first.log(step, {"train/loss": 1.0 / step})
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"kind": "metrics", "st')  # killed while writing
    second = tracker(tmp_path, "none", uid=first.uid)
    for step in (2, 3, 4, 5):  # back at the checkpoint of step 1
        second.log(step, {"train/loss": 1.0 / step})
    second.close("FINISHED")
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert sum(r["kind"] == "run" for r in read_journal(tmp_path)) == 1
    assert find_uid(tmp_path, CONFIG) == first.uid
    assert find_uid(tmp_path, {"lr": 0.2}) is None


def test_a_new_run_in_an_old_folder_keeps_the_old_journal(tmp_path: Path) -> None:
    first = tracker(tmp_path, "none")
    first.log(1, {"a": 1.0})
    first.close("FAILED")
    second = tracker(tmp_path, "none")
    assert second.uid != first.uid
    assert steps(tmp_path) == []
    assert (tmp_path / f"journal-{first.uid}.jsonl").exists()


def test_mlflow_has_everything_the_journal_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)  # where MLflow puts the artifacts
    first = tracker(tmp_path / "run", uri)
    first.tags({"world_size": "2"})
    for step in range(300):  # more than a batch of the shipper's
        first.log(step, {"train/loss": float(step), "compute/train_flops": 10.0 * step})
    png = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(png)
    first.image(299, "samples", png.read_bytes())
    first.close("KILLED")
    (tmp_path / "run" / "journal.shipped").unlink()  # as on another machine: all is sent again
    second = tracker(tmp_path / "run", uri, uid=first.uid)
    second.log(300, {"train/loss": 300.0, "compute/train_flops": 3000.0})
    second.close("FINISHED")

    client, run = the_run(uri)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s, float(s)) for s in range(301)]
    assert run.data.params == {"lr": "0.1", "model.channels": "32"}
    assert run.data.tags["world_size"] == "2"
    assert run.info.status == "FINISHED"
    assert run.inputs.dataset_inputs[0].dataset.digest == "0" * 32
    pictures = [f.path for f in client.list_artifacts(run.info.run_id, "images") if f.path.endswith(".png")]
    assert len(pictures) == 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def server(folder: Path, port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "art"),
    ]
    return subprocess.Popen(
        command + ["--workers", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def stop(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_dead_server_holds_nothing_up_and_gets_everything_later(tmp_path: Path, capsys) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    folder = tmp_path / "run"
    begin = time.perf_counter()
    tracked = tracker(folder, uri, flush_s=3.0)
    for step in range(50):
        tracked.log(step, {"train/loss": float(step), "compute/train_flops": float(step)})
    assert time.perf_counter() - begin < 5  # refused connections are the thread's business
    tracked.close("KILLED")
    said = capsys.readouterr().out
    assert str(folder / JOURNAL) in said
    assert "python -m pipeline.tracking" in said

    process = server(tmp_path, port)
    try:
        command = [sys.executable, "-m", "pipeline.tracking", str(folder), "--uri", uri]
        subprocess.run(command, check=True, timeout=180, cwd=ROOT)
        _, run = the_run(uri)
        history = MlflowClient(uri).get_metric_history(run.info.run_id, "train/loss")
        assert [m.step for m in history] == list(range(50))
    finally:
        stop(process)


def test_no_password_is_printed_or_recorded(tmp_path: Path, capsys) -> None:
    assert mask("http://me:hunter2@host:1/x") == "http://***@host:1/x"
    tracked = tracker(tmp_path, "http://me:hunter2@127.0.0.1:1", flush_s=2.0)
    tracked.log(1, {"a": 1.0})
    time.sleep(1)
    tracked.close("FINISHED")
    assert "hunter2" not in capsys.readouterr().out
    for file in tmp_path.iterdir():
        assert b"hunter2" not in file.read_bytes()


def test_journal_dir() -> None:
    assert journal_dir("runs/a") == Path("runs/a")
    assert journal_dir("file:///x/a") == Path("/x/a")
    remote = journal_dir("s3://bucket/team/a")
    assert remote.parent == Path("runs")
    assert remote.name.startswith("a-")
    assert remote != journal_dir("s3://bucket/other/a")


def test_records_are_plain_json_lines(tmp_path: Path) -> None:
    tracked = tracker(tmp_path, "none")
    tracked.epoch(0, -5)
    tracked.epoch(0, -5)
    tracked.close("FINISHED")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert kinds == ["run", "epoch", "status"]


def test_the_runs_of_a_study_are_children_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        child = tracker(tmp_path / name, uri, parent="ladder")
        child.log(3, {"train/loss": 1.0, "compute/train_flops": 3.0})
        child.evaluation(3, {"eval/nll": 4.0}, {})
        child.close("FINISHED")
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    (parent,) = [run for run in runs if run.data.tags["iddpm.uid"] == "ladder"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2
    for child in children:
        assert child.data.metrics == {"train/loss": 1.0, "eval/nll": 4.0, "compute/train_flops": 3.0}
        (measured,) = client.get_metric_history(child.info.run_id, "eval/nll")
        assert measured.step == 3
