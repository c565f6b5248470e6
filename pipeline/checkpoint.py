"""Checkpoints: written beside training, committed as a whole or not at all, verified when read.

Under a run's URL:

    checkpoints/data/{step}-{sha}-{part}.safetensors    the tensors, one file a part
    checkpoints/log/{sequence}.json                     an append-only log of records

A record is written last, by a conditional put of the next sequence number. Two kinds exist: a *checkpoint* names
its parts with their sizes and hashes; a *claim* says that a new attempt has taken over the run. So an attempt that
was thought dead cannot commit: the number that it would write next is already the claim of its successor. Claims
are never deleted for that reason; the newest checkpoints are kept, older ones go record first, data after.
"""

import dataclasses
import hashlib
import json
import queue
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pipeline.storage import DamagedError, Store

Parts = dict[str, dict[str, torch.Tensor]]


class StaleAttempt(RuntimeError):
    """A newer attempt at this run has taken over: this one must stop, and has written nothing."""


class DamagedCheckpoint(ValueError):
    """A checkpoint's data is missing, or is not what its record says."""


@dataclass(frozen=True)
class Record:
    """One entry of the log."""

    sequence: int
    kind: str  # "claim" or "checkpoint"
    attempt: str  # a random token, so that no two attempts ever write equal records
    step: int = 0
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"file", "bytes", "sha256"}
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"log/{self.sequence:08d}.json"


class Checkpoints:
    """The checkpoints of one run, under its URL."""

    def __init__(self, run: Store) -> None:
        self.store = run.child("checkpoints")

    # --------------------------------------------------------------------------------- reading

    def records(self) -> list[Record]:
        """The log's whole records, oldest first. A record that cannot be read counts as absent."""
        found = []
        for name in self.store.list("log/"):
            try:
                content = json.loads(self.store.read(name))
                found.append(Record(_sequence(name), **content))
            except (FileNotFoundError, ValueError, TypeError):
                continue  # retention got there first, or it is damaged: `newest` then takes one before
        return found

    def newest(
        self, parts: tuple[str, ...] | None = None, step: int | None = None
    ) -> tuple[Record, Parts] | None:
        """The newest checkpoint (or the one of `step`) whose parts are whole, with them; None where the run has none.

        `parts` names those that are read (default: all). Falls back to the checkpoint before where one is damaged.
        Raises DamagedCheckpoint where there are checkpoints and not one is whole.
        """
        candidates = [r for r in self.records() if r.kind == "checkpoint" and step in (None, r.step)]
        if step is not None and not candidates:
            have = sorted({r.step for r in self.records() if r.kind == "checkpoint"})
            raise ValueError(f"{self.store.url}: no checkpoint of step {step}; there are {have}")
        problems = []
        for record in reversed(candidates):
            try:
                loaded = {name: self._read_part(record, name) for name in parts or record.parts}
            except DamagedCheckpoint as error:
                problems.append(str(error))
                print(f"warning: {error}; trying the checkpoint before it", flush=True)
                continue
            return record, loaded
        if problems:
            raise DamagedCheckpoint(
                f"{self.store.url}: none of the {len(candidates)} checkpoints is whole. "
                + "; ".join(problems)
            )
        return None

    def _read_part(self, record: Record, part: str) -> dict[str, torch.Tensor]:
        where = f"checkpoint of step {record.step}, part {part}"
        if part not in record.parts:
            raise ValueError(f"{where}: not there; it has {', '.join(record.parts)}")
        entry = record.parts[part]
        try:
            data = self.store.read(f"data/{entry['file']}", entry["sha256"])
        except FileNotFoundError:
            raise DamagedCheckpoint(
                f"{where}: {entry['file']} is missing from {self.store.url}/data"
            ) from None
        except DamagedError as error:
            raise DamagedCheckpoint(f"{where}: {error}") from None
        try:
            return load_safetensors(data)
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{where}: {entry['file']} is no safetensors file ({error})") from None

    # --------------------------------------------------------------------------------- writing

    def claim(self, meta: dict[str, Any]) -> "Writer":
        """Take over the run: from now on no earlier attempt can commit. Then remove what those left unfinished."""
        attempt = uuid.uuid4().hex
        while True:
            sequence = max((_sequence(name) for name in self.store.list("log/")), default=0) + 1
            record = Record(sequence, "claim", attempt, meta=meta)
            if self.store.create(record.name, _encode(record)):
                break
        records = self.records()
        known = {entry["file"] for r in records for entry in r.parts.values()}
        for name in self.store.list("data/"):
            if name.removeprefix("data/") not in known:
                self.store.delete(name)
        return Writer(self.store, attempt, sequence, [r for r in records if r.kind == "checkpoint"])


class Writer:
    """Writes one attempt's checkpoints from a thread of its own; training waits only for the snapshot."""

    def __init__(self, store: Store, attempt: str, sequence: int, records: list[Record]) -> None:
        self.store = store
        self.attempt = attempt
        self.sequence = sequence
        self.records = records
        """The run's checkpoints, oldest first; no other attempt can add one."""
        self.buffers: dict[tuple[str, str], torch.Tensor] = {}
        self.error: BaseException | None = None
        self.stall_s = 0.0
        """Seconds that the last `save` held up its caller."""
        self._jobs: queue.Queue[tuple[int, Parts, dict[str, Any], int, int | None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def save(
        self, step: int, parts: Parts, meta: dict[str, Any], keep_last: int, keep_every: int | None
    ) -> None:
        """Copy the tensors and commit them in the background; first waits for the save before it.

        Raises what that save raised (StorageError, StaleAttempt).
        """
        start = time.perf_counter()
        self.wait()
        snapshot: Parts = {}
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                buffer = self.buffers.get((part, name))
                if buffer is None:
                    # Kept between saves: fresh pages cost more than the copy itself.
                    pin = tensor.device.type == "cuda"
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
                    self.buffers[part, name] = buffer
                buffer.copy_(tensor, non_blocking=True)
                snapshot.setdefault(part, {})[name] = buffer
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stall_s = time.perf_counter() - start
        self._jobs.put((step, snapshot, meta, keep_last, keep_every))

    def wait(self) -> None:
        """Until the last save is committed; raises what it raised."""
        self._jobs.join()
        if self.error:
            error, self.error = self.error, None
            raise error

    def close(self) -> None:
        """Finish the last save and end the thread."""
        try:
            self.wait()
        finally:
            self._jobs.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._commit(*job)
            except BaseException as error:
                self.error = error
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _commit(
        self, step: int, parts: Parts, meta: dict[str, Any], keep_last: int, keep_every: int | None
    ) -> None:
        entries = {}
        for part, tensors in parts.items():
            data = save_safetensors(tensors)
            sha = hashlib.sha256(data).hexdigest()
            entries[part] = {
                "file": f"{step:09d}-{sha[:16]}-{part}.safetensors",
                "bytes": len(data),
                "sha256": sha,
            }
            self.store.write(f"data/{entries[part]['file']}", data)
        record = Record(self.sequence + 1, "checkpoint", self.attempt, step, entries, meta)
        if not self.store.create(record.name, _encode(record)):
            raise StaleAttempt(
                f"{self.store.url}: a newer attempt at this run has taken over, so this one cannot commit step {step}."
                " Two jobs must not write one run; stop one, or give it another --out."
            )
        self.sequence += 1
        self.records.append(record)
        self._retain(keep_last, keep_every)

    def _retain(self, keep_last: int, keep_every: int | None) -> None:
        """Delete old checkpoints: their records first, so that no record ever names data that is gone."""
        dropped = [r for r in self.records[:-keep_last] if not (keep_every and r.step % keep_every == 0)]
        self.records = [r for r in self.records if r not in dropped]
        kept = {entry["file"] for r in self.records for entry in r.parts.values()}
        for record in dropped:
            self.store.delete(record.name)
        for file in {entry["file"] for r in dropped for entry in r.parts.values()} - kept:
            self.store.delete(f"data/{file}")


def _sequence(name: str) -> int:
    return int(name.removeprefix("log/").removesuffix(".json"))


def _encode(record: Record) -> bytes:
    content = dataclasses.asdict(record)
    del content["sequence"]  # the name says it
    return json.dumps(content, indent=1).encode()
