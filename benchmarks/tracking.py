"""Time logged steps while MLflow's server is up, stopped and dead: `python -m benchmarks.tracking`.

Uses a real server and a real training run that logs every step, fifty times as often as by default.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

from benchmarks.table import Row, show_with_digits
from pipeline.run.journal import read_journal

SMALL = "--model.channel-mult 1 --model.num-res-blocks 1 --batch-size 32 --sample-steps 1 --sample-count 1"
ENDLESS = "--horizon 1e6steps --log-every 1 --sample-every 0 --checkpoint-every 1000000 --tracking.flush-s 120"
PHASE_S = 6.0


def rows(folder: Path, cycles: int = 3) -> list[Row]:
    """Expects the digits dataset in `folder`/digits."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run, uri = folder / "tracked", f"http://127.0.0.1:{port}"
    command = f"-m pipeline.train {SMALL} {ENDLESS} --data.url {folder}/digits --out {run} --tracking.uri {uri}"
    server = _serve(folder, port)
    with (folder / "output").open("w") as output:
        training = subprocess.Popen(
            [sys.executable, *command.split()], stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        while not (run / "journal.shipped").exists():
            assert training.poll() is None, (folder / "output").read_text()
            time.sleep(0.5)
        phases: dict[str, list[tuple[float, float]]] = {"up": [], "stopped": [], "dead": []}
        for _ in range(cycles):
            phases["up"].append(_phase())
            os.killpg(server.pid, signal.SIGSTOP)
            phases["stopped"].append(_phase())
            _kill(server)
            phases["dead"].append(_phase())
            server = _serve(folder, port)
        training.send_signal(signal.SIGTERM)
        training.wait()
        there = _steps_at(uri)
    finally:
        for process in (training, server):
            if process.poll() is None:
                _kill(process) if process is server else process.kill()
    records = [r for r in read_journal(run) if r["kind"] == "metrics"]
    ends = [r["time"] for r in records]
    medians = {
        name: statistics.median(b - a for lo, hi in spans for a, b in pairwise(ends) if lo < a < b < hi)
        for name, spans in phases.items()
    }
    up = f"up {1e3 * medians['up']:.1f} ms"
    return [
        Row(
            f"logged step, MLflow {name}", f"{1e3 * medians[name]:.1f} ms", up, medians[name] / medians["up"], 1.1, True
        )
        for name in ("stopped", "dead")
    ] + [Row("steps in MLflow afterwards", f"{there:,}", f"journal {len(records):,}", there / len(records), 1.0)]


def _serve(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start an MLflow server and wait until it answers."""
    command = f"-m mlflow server --host 127.0.0.1 --port {port} --workers 1 --backend-store-uri sqlite:///{folder}/m.db"
    process = subprocess.Popen(
        [sys.executable, *command.split(), "--artifacts-destination", str(folder / "artifacts")],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return process
    raise SystemExit(f"error: MLflow's server exited with status {process.returncode}")


def _kill(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _phase() -> tuple[float, float]:
    """Wait until a change of the server has taken effect; return the start and end of a measuring period after it."""
    time.sleep(2)
    start = time.time()
    time.sleep(PHASE_S)
    return start, time.time()


def _steps_at(uri: str) -> int:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return len({point.step for point in client.get_metric_history(run.info.run_id, "train/loss")})


if __name__ == "__main__":
    show_with_digits(rows)
