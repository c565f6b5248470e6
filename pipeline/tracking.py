"""Send what MLflow is missing of a run's history: `python -m pipeline.tracking RUN`."""

import contextlib
import dataclasses
import sys

import tyro

from pipeline.cli import errors_exit, parse_flags
from pipeline.config import TrackingConfig
from pipeline.errors import InputError
from pipeline.run.journal import JOURNAL, fetch_journal, journal_dir, read_journal
from pipeline.run.mlflow import Shipper
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store


@dataclasses.dataclass(frozen=True)
class ShipConfig:
    """Send what MLflow is missing of a run's journal."""

    run: tyro.conf.Positional[str]
    """The run: its --out, a folder or URL; or the folder named in a warning."""
    uri: str | None = None
    """MLflow tracking URI; default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    wait_s: float = 300.0
    """Longest time to keep trying, in seconds."""
    storage: StorageConfig = dataclasses.field(default_factory=StorageConfig)


def main() -> None:
    config = parse_flags(ShipConfig, sys.argv[1:], ShipConfig.__doc__ or "")
    with errors_exit():
        run = Store(config.run, config.storage)
        folder = journal_dir(run)
        if run.local is None:
            fetch_journal(run, folder)
            for record in read_journal(folder):
                if record["kind"] == "image" and not (picture := folder / record["file"]).exists():
                    picture.parent.mkdir(exist_ok=True)
                    with contextlib.suppress(FileNotFoundError):
                        picture.write_bytes(run.read(record["file"]))
        if not (folder / JOURNAL).exists():
            raise InputError(f"{run}: got no {JOURNAL}, expected the --out of a run")
        uri = TrackingConfig(uri=config.uri).mlflow_uri
        if uri is None:
            raise InputError("--uri: got none, here or in $MLFLOW_TRACKING_URI, expected where to send the history")
    shipper = Shipper(folder, uri, config.wait_s)
    shipper.close()
    raise SystemExit(0 if shipper.done else 1)


if __name__ == "__main__":
    main()
