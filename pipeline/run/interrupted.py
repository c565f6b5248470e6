"""How a run that a signal stopped says so, to whoever started it."""

import json
import os

from pipeline.storage.store import Store

INTERRUPTED_FILE = "interrupted.json"
"""In a run's folder from a stop by a signal until the next start: whoever started the run may start it again."""


INTERRUPTED_STATUS = 75
"""Exit status after a signal and a checkpoint: the same command resumes (BSD's EX_TEMPFAIL)."""


def mark_interrupted(run: Store, step: int) -> None:
    """Record that a signal has stopped the run at a step."""
    run.write(INTERRUPTED_FILE, json.dumps({"step": step, "attempt": _slurm_attempt()}).encode())


def was_interrupted(run: Store) -> bool:
    """Whether a signal stopped the run's last attempt, by its own record: a launcher may hide its exit status."""
    try:
        mark = json.loads(run.read(INTERRUPTED_FILE))
    except FileNotFoundError:
        return False
    return "SLURM_JOB_ID" not in os.environ or bool(mark.get("attempt") == _slurm_attempt())


def _slurm_attempt() -> str:
    """Identify the current start of the Slurm job, if any; an earlier start's mark says nothing about this one."""
    return f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"
