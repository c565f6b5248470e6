"""Checkpoints: written in the background, committed atomically, verified when read.

Under a run's URL:

    checkpoints/log/{number}.json                               an append-only log of records
    checkpoints/data/{number}-step-{step}-{part}.safetensors    the tensors, one file per part

A record is written last, by a conditional put of the next number. There are two kinds: a *checkpoint* names its parts
with their sizes and hashes; a *claim* says that a new attempt has taken over the run. An attempt that was presumed dead
therefore cannot commit: the next number is already taken by its successor's claim, which is why claims are never
deleted. Only the writer of record n - 1 ever writes data of number n, so no attempt, however late it wakes up,
overwrites or deletes data that another one has written and needs.
"""

import copy
import dataclasses
import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from pipeline.errors import InputError, PermanentError
from pipeline.storage.errors import DamagedError, StorageError
from pipeline.storage.store import Store

Parts = dict[str, dict[str, torch.Tensor]]
AVERAGES = "normalised"
"""Metadata `averages` of a checkpoint whose moving averages hold nothing of the initial weights."""


THREADS = 4  # concurrent requests for parts or records


class StaleAttempt(PermanentError):
    """A newer attempt has taken over this run: this one must stop and has committed nothing since."""


class DamagedCheckpoint(PermanentError):
    """A checkpoint's data is missing or does not match its record."""


@dataclass(frozen=True)
class Record:
    """One entry of the log."""

    number: int
    kind: str  # "claim" or "checkpoint"
    attempt: str  # a random token, so that two attempts never write equal records
    step: int = 0
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"file", "bytes", "sha256"}
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"log/{self.number:08d}.json"

    def encode(self) -> bytes:
        content = dataclasses.asdict(self)
        del content["number"]  # it is in the name
        return json.dumps(content | {"sha256": _digest(content)}, indent=1).encode()

    @classmethod
    def decode(cls, number: int, data: bytes) -> "Record":
        """Read what `encode` wrote; raises ValueError, TypeError or AttributeError if it is damaged."""
        content = json.loads(data)
        digest = content.pop("sha256", None)  # earlier versions wrote none
        if digest not in (None, _digest(content)):
            raise ValueError("its content does not match its sha256")
        return cls(number, **content)


def _digest(content: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(content))  # as it will be read: all keys are texts
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _number(name: str) -> int:
    """Return the number of a record or data file."""
    return int(name.partition("/")[2][:8])


class Checkpoints:
    """The checkpoints of one run, under its URL."""

    def __init__(self, run: Store) -> None:
        self.store = run.child("checkpoints")

    # --------------------------------------------------------------------------------- reading

    def records(self) -> list[Record]:
        """Return the log's readable records, oldest first, with a warning for each unreadable one.

        Raises DamagedCheckpoint if the run may have checkpoints but none of their records can be read.
        """
        problems = []

        def read(name: str) -> Record | None:
            try:
                return Record.decode(_number(name), self.store.read(name))
            except FileNotFoundError:  # deleted by retention meanwhile
                return None
            except (ValueError, TypeError, AttributeError) as error:
                problems.append(f"{self.store}/{name} is not a checkpoint record ({error})")
                return None

        with ThreadPoolExecutor(THREADS) as pool:
            records = [record for record in pool.map(read, self._names("log/")) if record]
        lost = problems and not any(record.kind == "checkpoint" for record in records)
        if lost and self._names("data/"):
            raise DamagedCheckpoint(f"{'; '.join(problems)}. Start over with another --out")
        for problem in problems:
            print(f"warning: {problem}; skipping it", flush=True)
        return records

    def committed(self) -> list[Record]:
        """Return the records of checkpoints, oldest first; raises as `records` does."""
        return [record for record in self.records() if record.kind == "checkpoint"]

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, ascending."""
        return sorted({record.step for record in self.committed()})

    def load(self, parts: tuple[str, ...] | None = None, step: int | None = None) -> tuple[Record, Parts] | None:
        """Load the newest intact checkpoint (or the one at `step`) and its parts; None if the run has no checkpoint.

        `parts` names the parts to read (default: all). If a checkpoint is damaged, falls back to the one before it.
        Raises DamagedCheckpoint if all of them are damaged, InputError if there is no checkpoint of `step`.
        """
        committed = self.committed()
        candidates = [record for record in committed if step in (None, record.step)]
        if step is not None and not candidates:
            available = sorted({record.step for record in committed})
            raise InputError(f"{self.store}: no checkpoint of step {step}; available steps: {available}")

        problems = []
        for record in reversed(candidates):
            names = parts or tuple(record.parts)
            try:
                with ThreadPoolExecutor(THREADS) as pool:
                    loaded = pool.map(lambda name, record=record: self._read_part(record, name), names)
                    return record, dict(zip(names, loaded, strict=True))
            except DamagedCheckpoint as error:
                if not self.store.exists(record.name):  # training has continued, and retention has deleted it
                    return self.load(parts, step)
                problems.append(str(error))
                print(f"warning: {error}; trying the checkpoint before it", flush=True)
        if not problems:
            return None
        raise DamagedCheckpoint(f"{self.store}: all {len(candidates)} checkpoints are damaged. {'; '.join(problems)}")

    def _read_part(self, record: Record, part: str) -> dict[str, torch.Tensor]:
        where = f"checkpoint of step {record.step}, part {part}"
        if part not in record.parts:
            raise InputError(f"{where}: no such part; expected one of {', '.join(record.parts)}")
        file, sha256 = record.parts[part]["file"], record.parts[part]["sha256"]
        try:
            return load_safetensors(self.store.read(f"data/{file}", sha256))
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{where}: {file} is missing from {self.store}/data") from None
        except DamagedError as error:
            raise DamagedCheckpoint(f"{where}: {error}") from None
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{where}: {file} is not a safetensors file ({error})") from None

    def _names(self, folder: str) -> list[str]:
        """List record or data files, ignoring any foreign files."""
        return [name for name in self.store.list(folder) if re.match(r"\w+/\d{8}[-.]", name)]

    # --------------------------------------------------------------------------------- writing

    def claim(self, meta: dict[str, Any]) -> "Writer":
        """Take over the run, so that no earlier attempt can commit, and remove what those left unfinished."""
        # Take the next number in the log; another attempt may be faster.
        attempt = uuid.uuid4().hex
        for _ in range(100):
            number = max(map(_number, self._names("log/")), default=0) + 1
            claim = Record(number, "claim", attempt, meta=meta)
            if self.store.create(claim.name, claim.encode()):
                break
        else:
            raise StorageError(
                f"{self.store}: {claim.name} exists, but is not listed, or other attempts take the run over again and"
                " again; check that the store lists what was written, and that only one job writes to this run"
            )
        self._sweep(claim)
        earlier = [record for record in self.committed() if record.number < number]
        return Writer(self.store, claim, earlier)

    def _sweep(self, claim: Record) -> None:
        """Delete earlier attempts' data that no record refers to and that no record can refer to any more."""
        recorded = {_number(name) for name in self._names("log/")} - {claim.number}
        for name in self._names("data/"):
            number = _number(name)
            if number <= claim.number and number not in recorded:
                self.store.delete(name)


class Writer:
    """Writes one attempt's checkpoints from a background thread; training waits only for the snapshot.

    There is one snapshot at a time: a `save` during the previous write waits for it and prints a warning. Every
    requested checkpoint is thus written, and memory holds one copy of the state instead of a queue.
    """

    def __init__(self, store: Store, claim: Record, records: list[Record]) -> None:
        self.store = store
        self.attempt = claim.attempt
        self.number = claim.number
        """Number of this attempt's last record."""
        self.records = records
        """The run's checkpoints, oldest first; no other attempt can add one."""
        self.stall_s = 0.0
        """Seconds for which the last `save` blocked its caller."""
        self._files: dict[str, PartFile] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None  # the last commit; once one has failed, there is no other

    def save(
        self,
        step: int,
        parts: Parts,
        meta: dict[str, Any],
        keep_last: int,
        keep_every: int | None,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the tensors and `meta` and commit them in the background, after calling `first` there.

        Raises the error of an earlier save (StorageError, StaleAttempt).
        """
        # Wait for the save before this one, which still needs the memory of the snapshot.
        start = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - start
        if waited > 1.0:
            print(
                f"warning: training waited {waited:.1f} s at step {step} for the previous checkpoint: {self.store} is"
                " too slow for --checkpoint-every; increase it",
                flush=True,
            )

        # The snapshot: training may change everything once it is complete.
        for part, tensors in parts.items():
            if part not in self._files:
                self._files[part] = PartFile(tensors)
            self._files[part].copy(tensors)
        for device in {t.device for tensors in parts.values() for t in tensors.values() if t.is_cuda}:
            torch.cuda.synchronize(device)
        self.stall_s = time.perf_counter() - start

        record = Record(self.number + 1, "checkpoint", self.attempt, step, {}, copy.deepcopy(meta))
        self._last = self._thread.submit(self._commit, record, keep_last, keep_every, first)

    def check(self) -> None:
        """Raise the error of a background save, if any; cheap enough to call at every step."""
        if self._last and self._last.done():
            self._last.result()

    def wait(self) -> None:
        """Wait until the last save is committed; raises its error."""
        if self._last:
            self._last.result()

    def close(self) -> None:
        """Finish the last save and end the thread; raises the save's error."""
        self._thread.shutdown()
        self.check()

    def _commit(self, record: Record, keep_last: int, keep_every: int | None, first: Callable[[], None]) -> None:
        stale = StaleAttempt(
            f"{self.store}: a newer attempt at this run has taken over, so this one cannot commit step {record.step}."
            " Two jobs must not write to the same run; stop one, or give it another --out."
        )
        if self.store.exists(record.name):  # do not write data that cannot be committed
            raise stale
        first()

        # The data, then the record, with which the checkpoint begins to exist.
        def write(part: str) -> dict[str, Any]:
            data = self._files[part].data
            file = f"{record.number:08d}-step-{record.step}-{part}.safetensors"
            self.store.write(f"data/{file}", data)
            return {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        with ThreadPoolExecutor(THREADS) as pool:
            record.parts.update(zip(self._files, pool.map(write, self._files), strict=True))
        if not self.store.create(record.name, record.encode()):
            raise stale
        self.number = record.number
        self.records.append(record)

        self._retain(keep_last, keep_every)

    def _retain(self, keep_last: int, keep_every: int | None) -> None:
        """Delete old checkpoints, records first, so that no record ever names deleted data."""
        for record in self.records[:-keep_last]:
            if keep_every and record.step % keep_every == 0:
                continue
            self.store.delete(record.name)
            for entry in record.parts.values():
                self.store.delete(f"data/{entry['file']}")
            self.records.remove(record)


_DTYPES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class PartFile:
    """One part's tensors in memory, laid out as a safetensors file, so that a snapshot is the file itself.

    The safetensors format is the header's length (8 bytes), the header (JSON), then the tensors.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        header: dict[str, Any] = {}
        end = 0
        self.names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # keeps all aligned
        for name in self.names:
            tensor = tensors[name]
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        # Reused between saves, because allocating new pages costs more than the copy itself.
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        file = torch.empty(8 + len(text) + end, dtype=torch.uint8, pin_memory=pinned)
        self.data = file.numpy().data
        self.data[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
        content = file[8 + len(text) :]
        self.views = []
        for name in self.names:
            start, end = header[name]["data_offsets"]
            self.views.append(content[start:end].view(tensors[name].dtype).view(tensors[name].shape))

    def copy(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy the tensors' values; copies from a GPU may still be in progress on return."""
        assert tensors.keys() == set(self.names), "a part always holds the same tensors"
        torch._foreach_copy_(self.views, [tensors[name] for name in self.names], non_blocking=True)
