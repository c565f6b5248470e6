"""The journal is complete and has each step once; MLflow receives all of it, whatever happens to its server."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, small_disk
from mlflow import MlflowClient
from PIL import Image
from ports import free_port

from pipeline.config import TrackingConfig
from pipeline.run.journal import JOURNAL, Journal, fetch_journal, journal_dir, put_evaluation, read_journal
from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store
from pipeline.tracking import main

CONFIG = {"lr": 0.1, "model": {"channels": 32}}
DATASET = {"url": "data/digits", "name": "digits", "digest": "0" * 32}


def journal(folder: Path, uri: str | None, uid: str | None = None, lr: float = 0.1, **options: object) -> Journal:
    tracking = TrackingConfig(uri=uri, **{"experiment": "study", "flush_s": 120.0, **options})
    return Journal(Store(folder), tracking, uid=uid, config=CONFIG | {"lr": lr}, dataset=DATASET)


def kill(journal: Journal) -> None:
    """Close its file without a last record, as the end of its process would."""
    journal._file.close()


def steps(folder: Path) -> list[int]:
    return [r["step"] for r in read_journal(folder) if r["kind"] == "metrics"]


def the_run(uri: str):
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    return client, run


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    first = journal(tmp_path, "none")
    for step in (1, 2, 3):
        first.log(step, {"train/loss": 1.0 / step})
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"kind": "metrics", "st')  # killed while writing
    kill(first)
    second = journal(tmp_path, "none")  # of the same configuration, so the same run
    assert second.uid == first.uid
    for step in (2, 3, 4, 5):  # back at the checkpoint of step 1
        second.log(step, {"train/loss": 1.0 / step})
    second.close("FINISHED")
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert sum(r["kind"] == "run" for r in read_journal(tmp_path)) == 1


def test_an_evaluation_elsewhere_is_added_to_whole_lines(tmp_path: Path) -> None:
    here, run = journal(tmp_path / "here", "none"), Store(f"memory://{tmp_path}")
    here.log(1, {"train/loss": 1.0})
    run.write(JOURNAL, here.path.read_bytes())
    elsewhere = journal(tmp_path / "elsewhere", "none", uid=here.uid)
    for value in (4.0, 4.0, 5.0):  # one is measured twice
        put_evaluation(run, elsewhere.evaluation(1, {"eval/nll": value}, {}))
    here.log(2, {"train/loss": 0.5})
    with here.path.open("ab") as file:
        file.write(b'{"kind": "metrics", "st')  # killed while writing
    run.write(JOURNAL, here.path.read_bytes())
    kill(here)
    kill(elsewhere)
    fetch_journal(run, tmp_path / "here")
    fetch_journal(run, tmp_path / "here")
    for records in (read_journal(run), read_journal(tmp_path / "here")):
        assert [r["kind"] for r in records] == ["run", "metrics", "metrics", "evaluation", "evaluation"]
        assert {r["metrics"]["eval/nll"] for r in records[3:]} == {4.0, 5.0}


def test_a_damaged_line_is_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = journal(tmp_path, "none")
    for step in (1, 2, 3):
        first.log(step, {"train/loss": 1.0})
    first.close("KILLED")
    lines = (tmp_path / JOURNAL).read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b'"step"', b'step"')
    (tmp_path / JOURNAL).write_bytes(b"\n".join(lines))
    assert steps(tmp_path) == [1, 3]
    assert f"{tmp_path}/{JOURNAL}, line 3 is damaged; skipping it" in capsys.readouterr().out
    second = journal(tmp_path, "none", uid=first.uid)
    second.log(4, {"train/loss": 1.0})
    second.close("FINISHED")
    assert steps(tmp_path) == [1, 3, 4]


def test_a_journal_without_its_beginning_is_kept_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = journal(tmp_path, "none")
    first.log(1, {"train/loss": 1.0})
    first.close("KILLED")
    content = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(content[5:])
    second = journal(tmp_path, "none", uid=first.uid)
    second.close("FINISHED")
    assert second.uid == first.uid
    (aside,) = tmp_path.glob("journal-damaged-*.jsonl")
    assert aside.read_bytes() == content[5:]
    assert f"it is kept as {aside}" in capsys.readouterr().out


def test_a_new_run_in_an_old_folder_keeps_the_old_journal(tmp_path: Path) -> None:
    first = journal(tmp_path, "none")
    first.log(1, {"a": 1.0})
    first.close("FAILED")
    second = journal(tmp_path, "none", lr=0.2)
    assert second.uid != first.uid
    assert steps(tmp_path) == []
    kill(second)
    assert (tmp_path / f"journal-{first.uid}.jsonl").exists()


def test_mlflow_has_everything_the_journal_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)  # where MLflow puts the artifacts
    first = journal(tmp_path / "run", uri)
    first.tags({"world_size": "2"})
    for step in range(300):  # more than one batch of the shipper
        first.log(step, {"train/loss": float(step), "compute/train_flops": 10.0 * step})
    png = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(png)
    first.image(299, "samples", png.read_bytes())
    first.close("KILLED")
    (tmp_path / "run" / "journal.shipped").unlink()  # as on another machine: everything is sent again
    second = journal(tmp_path / "run", uri, uid=first.uid)
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


def server(folder: Path, port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "art")]
    return subprocess.Popen(
        command,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # seven processes that tests do not need
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def stop(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def shipped(folder: Path) -> int:
    """Return how many bytes of the journal have arrived."""
    state = folder / "journal.shipped"
    return json.loads(state.read_text())["offset"] if state.exists() else 0


def until(what: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 240
    while not what():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.1)


@pytest.mark.slow
def test_a_server_that_is_absent_then_killed_gets_everything_once(digits: str, tmp_path: Path) -> None:
    """Training starts without the server, sees it come up, loses it to SIGKILL, and ends without it."""
    port = free_port()
    uri, folder = f"http://127.0.0.1:{port}", tmp_path / "run"
    flags = ["--data.url", digits, "--out", str(folder), "--horizon", "1e6steps", "--log-every", "1"]
    flags += ["--tracking.uri", uri, "--tracking.flush-s", "2", "--tracking.experiment", "study"]
    # Slow steps keep the journal short.
    command = [sys.executable, "-m", "pipeline.train", *TINY, "--batch-size", "64", "--sample-every", "20", *flags]
    with (tmp_path / "said").open("w") as said:
        training = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
    processes = [training]
    try:
        until(lambda: "does not answer" in (tmp_path / "said").read_text(), training)
        processes.append(server(tmp_path, port))
        until(lambda: shipped(folder) > 0, training)
        stop(processes.pop())
        logged = len(steps(folder))
        until(lambda: len(steps(folder)) > logged + 5, training)
        training.send_signal(signal.SIGTERM)
        assert training.wait(120) == 75
        assert shipped(folder) < (folder / JOURNAL).stat().st_size
        assert f"python -m pipeline.tracking {folder}" in (tmp_path / "said").read_text()

        processes.append(server(tmp_path, port))
        command = [sys.executable, "-m", "pipeline.tracking", str(folder), "--uri", uri]
        subprocess.run(command, check=True, timeout=240, cwd=ROOT)
        client, run = the_run(uri)
        for name in ("train/loss", "compute/train_flops"):
            expected = [(r["step"], r["metrics"][name]) for r in read_journal(folder) if r["kind"] == "metrics"]
            assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == expected
        pictures = [f.path for f in client.list_artifacts(run.info.run_id, "images") if f.path.endswith(".png")]
        assert len(pictures) == len(list((folder / "samples").iterdir()))
        assert run.info.status == "KILLED"
    finally:
        for process in processes:
            if process.poll() is None:
                stop(process)


def test_a_new_database_gets_the_whole_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{name}.db")
        tracked = journal(tmp_path, None, uid="x" * 32)
        tracked.log(1, {"train/loss": 1.0})
        tracked.close("FINISHED")
    _, run = the_run("sqlite:///b.db")
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/loss": 1.0})


def test_a_remote_run_is_sent_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The journal and images of a remote run are sent from its URL; a URL without a run is an error."""
    gone, run = journal(tmp_path / "gone", "none"), Store(f"memory://{tmp_path}/r")
    gone.log(1, {"train/loss": 1.0})
    png = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(png)
    gone.image(1, "samples", png.read_bytes())
    gone.close("FINISHED")
    for name in (JOURNAL, "samples/samples-0000001.png"):
        run.write(name, (gone.folder / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr(sys, "argv", ["tracking", run.url, "--uri", uri])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    client, sent = the_run(uri)
    assert sent.data.metrics == {"train/loss": 1.0}
    assert client.list_artifacts(sent.info.run_id, "images")
    monkeypatch.setattr(sys, "argv", ["tracking", f"{run.url}/none", "--uri", uri])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "got no journal.jsonl, expected the --out of a run" in capsys.readouterr().err


def test_the_environment_turns_tracking_off_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert TrackingConfig(uri="sqlite:///here.db").mlflow_uri == "sqlite:///here.db"  # the flag comes first
    tracked = journal(tmp_path, None)
    tracked.close("FINISHED")
    assert tracked.shipper is None
    monkeypatch.setattr(sys, "argv", ["tracking", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "--uri: got none" in capsys.readouterr().err


def test_no_password_is_printed_or_recorded(tmp_path: Path, capsys) -> None:
    tracked = journal(tmp_path, "http://me:hunter2@127.0.0.1:1", flush_s=2.0)
    tracked.log(1, {"a": 1.0})
    time.sleep(1)
    tracked.close("FINISHED")
    assert "hunter2" not in capsys.readouterr().out
    for file in tmp_path.iterdir():
        assert b"hunter2" not in file.read_bytes()


def test_journal_dir() -> None:
    assert journal_dir(Store("runs/a")) == Path("runs/a")
    assert journal_dir(Store("file:///x/a")) == Path("/x/a")
    remote = journal_dir(Store("s3://bucket/team/a"))
    assert remote.parent == Path("runs")
    assert remote.name.startswith("a-")
    assert remote != journal_dir(Store("s3://bucket/other/a"))
    assert remote == journal_dir(Store("s3://bucket/team/a/"))


def test_records_are_plain_json_lines(tmp_path: Path) -> None:
    tracked = journal(tmp_path, "none")
    tracked.epoch(0, -5)
    tracked.epoch(0, -5)
    tracked.close("FINISHED")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert kinds == ["run", "epoch", "status"]


def test_a_journal_that_cannot_be_written_is_one_error_with_its_path(tmp_path: Path) -> None:
    with small_disk(tmp_path, "64k") as disk:
        full = journal(disk / "run", "none")
        with pytest.raises(StorageError, match=r"cannot write .*run/journal\.jsonl: .*No space left.*free some space"):
            full.tags({"much": "x" * 100_000})
        with contextlib.suppress(StorageError):
            full.close("FAILED")
    deleted = journal(tmp_path / "run", "none")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StorageError, match=r"run/journal\.jsonl: .*deleted .*run the same command again"):
        deleted.log(1, {"train/loss": 1.0})
    deleted.close(None)


def test_a_picture_that_cannot_be_sent_costs_nothing_but_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is no picture, one names a file outside the run; the metrics, the status and the third arrive."""
    uri, secret = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    first = journal(tmp_path / "run", uri)
    for step in (1, 2, 3):
        first.image(step, "grid", secret.read_bytes() if step == 3 else b"not a picture")
    first.log(3, {"train/loss": 1.0})
    path = tmp_path / "run" / JOURNAL
    path.write_bytes(path.read_bytes().replace(b"samples/grid-0000002.png", b"samples/../../secret.png"))
    first.close("FINISHED")
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/loss": 1.0})
    files = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "samples")]
    assert "samples/grid-0000003.png" in files
    assert not [file for file in files if "secret" in file]
    said = capsys.readouterr().out
    assert "MLflow did not take" in said
    assert "expected samples/NAME.png" in said


@pytest.mark.slow
def test_a_new_database_survives_a_kill_and_a_race(tmp_path: Path) -> None:
    """While MLflow makes its tables, for seconds, one process is killed and three more want the same database."""
    open_it = "import sys; from pipeline.run.mlflow import open_run; open_run(sys.argv[1], 'e', sys.argv[2], 'r')"

    def start(uid: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", open_it, f"sqlite:///{tmp_path}/mlflow.db", uid], cwd=ROOT)

    victim = start("killed")
    while not (tmp_path / "mlflow.db.tmp").exists():
        time.sleep(0.01)
    others = [start(uid) for uid in "abc"]
    victim.kill()
    victim.wait()
    assert [other.wait(timeout=120) for other in others] == [0, 0, 0]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("e")
    assert {run.data.tags["iddpm.uid"] for run in client.search_runs([experiment.experiment_id])} == set("abc")


def test_the_runs_of_a_study_are_children_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        child = journal(tmp_path / name, uri, parent="ladder")
        child.log(3, {"train/loss": 1.0, "compute/train_flops": 3.0})
        child.evaluation(3, {"eval/nll": 4.0}, {})
        child.close("FINISHED")
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    (parent,) = [run for run in runs if run.data.tags["iddpm.uid"] == "ladder"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2
    for child in children:
        evaluated = {"eval/nll": 4.0, "eval/log10_nll": math.log10(4.0)}
        assert child.data.metrics == {"train/loss": 1.0, "compute/train_flops": 3.0, **evaluated}
        (measured,) = client.get_metric_history(child.info.run_id, "eval/nll")
        assert measured.step == 3
