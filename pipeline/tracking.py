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
        journal = journal_dir(run) / JOURNAL
        fetch_journal(run, journal.parent)
        if not journal.exists():
            raise InputError(f"{run}: got no {JOURNAL}, expected the --out of a run")
        uri = TrackingConfig(uri=config.uri).mlflow_uri
        if uri is None:
            raise InputError("--uri: got none, here or in $MLFLOW_TRACKING_URI, expected where to send the history")
        if run.local is None:
            _fetch_images(run, Store(journal.parent))
    shipper = Shipper(journal, uri, config.wait_s)
    shipper.close()
    raise SystemExit(0 if shipper.done else 1)


def _fetch_images(run: Store, folder: Store) -> None:
    """Fetch the pictures that a remote run's journal names, unless they are gone."""
    for record in read_journal(folder):
        if record["kind"] == "image" and not folder.exists(record["file"]):
            with contextlib.suppress(FileNotFoundError):
                folder.write(record["file"], run.read(record["file"]))


if __name__ == "__main__":
    main()
