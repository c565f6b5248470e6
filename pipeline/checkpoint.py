"""Checkpoints: written beside training, committed as a whole or not at all, verified when read.

Under a run's URL:

    checkpoints/log/{number}.json                               an append-only log of records
    checkpoints/data/{number}-step-{step}-{part}.safetensors    the tensors, one file a part

A record is written last, by a conditional put of the next number. Two kinds exist: a *checkpoint* names its parts with
their sizes and hashes; a *claim* says that a new attempt has taken over the run. So an attempt that was thought dead
cannot commit: the number that it would write next is already the claim of its successor. Claims are never deleted for
that reason. Only the writer of record n - 1 ever writes data of number n: so no attempt, however late it wakes up,
overwrites or deletes what another one has written and needs.
"""

import copy
import dataclasses
import hashlib
import json
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from pipeline.storage import DamagedError, Store

Parts = dict[str, dict[str, torch.Tensor]]
THREADS = 4  # requests at a time: parts, records


class StaleAttempt(RuntimeError):
    """A newer attempt at this run has taken over: this one must stop, and has committed nothing since."""


class DamagedCheckpoint(ValueError):
    """A checkpoint's data is missing, or is not what its record says."""


@dataclass(frozen=True)
class Record:
    """One entry of the log."""

    number: int
    kind: str  # "claim" or "checkpoint"
    attempt: str  # a random token, so that no two attempts ever write equal records
    step: int = 0
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"file", "bytes", "sha256"}
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"log/{self.number:08d}.json"

    def encode(self) -> bytes:
        content = dataclasses.asdict(self)
        del content["number"]  # the name says it
        return json.dumps(content, indent=1).encode()


def _number(name: str) -> int:
    """Of a record or a data file."""
    return int(name.partition("/")[2][:8])


class Checkpoints:
    """The checkpoints of one run, under its URL."""

    def __init__(self, run: Store) -> None:
        self.store = run.child("checkpoints")

    # --------------------------------------------------------------------------------- reading

    def records(self) -> list[Record]:
        """The log's whole records, oldest first; a warning for one that cannot be read.

        Raises DamagedCheckpoint where there may have been checkpoints, and no record of one can be read.
        """
        problems = []

        def read(name: str) -> Record | None:
            try:
                return Record(_number(name), **json.loads(self.store.read(name)))
            except FileNotFoundError:  # retention got there first
                return None
            except (ValueError, TypeError) as error:
                problems.append(f"{self.store}/{name} is no checkpoint record ({error})")
                return None

        with ThreadPoolExecutor(THREADS) as pool:
            found = [record for record in pool.map(read, self._names("log/")) if record]
        if problems and not any(record.kind == "checkpoint" for record in found) and self._names("data/"):
            raise DamagedCheckpoint(f"{'; '.join(problems)}. Begin anew with another --out")
        for problem in problems:
            print(f"warning: {problem}; it is left out", flush=True)
        return found

    def newest(self, parts: tuple[str, ...] | None = None, step: int | None = None) -> tuple[Record, Parts] | None:
        """The newest checkpoint (or the one of `step`) whose parts are whole, with them; None where the run has none.

        `parts` names those that are read (default: all). Falls back to the checkpoint before where one is damaged.
        Raises DamagedCheckpoint where there are checkpoints and not one is whole.
        """
        committed = [record for record in self.records() if record.kind == "checkpoint"]
        candidates = [record for record in committed if step in (None, record.step)]
        if step is not None and not candidates:
            have = sorted({record.step for record in committed})
            raise ValueError(f"{self.store}: no checkpoint of step {step}; there are {have}")
        problems = []
        for record in reversed(candidates):
            try:
                with ThreadPoolExecutor(THREADS) as pool:
                    names = parts or tuple(record.parts)
                    loaded = pool.map(self._read_part, [record] * len(names), names)
                    return record, dict(zip(names, loaded, strict=True))
            except DamagedCheckpoint as error:
                if not self.store.exists(record.name):  # training has gone on, and kept newer ones instead
                    return self.newest(parts, step)
                problems.append(str(error))
                print(f"warning: {error}; trying the checkpoint before it", flush=True)
        if problems:
            raise DamagedCheckpoint(
                f"{self.store}: none of the {len(candidates)} checkpoints is whole. " + "; ".join(problems)
            )
        return None

    def _read_part(self, record: Record, part: str) -> dict[str, torch.Tensor]:
        where = f"checkpoint of step {record.step}, part {part}"
        if part not in record.parts:
            raise ValueError(f"{where}: not there; it has {', '.join(record.parts)}")
        file, sha256 = record.parts[part]["file"], record.parts[part]["sha256"]
        try:
            return load_safetensors(self.store.read(f"data/{file}", sha256))
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{where}: {file} is missing from {self.store}/data") from None
        except DamagedError as error:
            raise DamagedCheckpoint(f"{where}: {error}") from None
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{where}: {file} is no safetensors file ({error})") from None

    def _names(self, folder: str) -> list[str]:
        """Of records or data files: what else is there is somebody's own."""
        return [name for name in self.store.list(folder) if re.match(r"\w+/\d{8}[-.]", name)]

    # --------------------------------------------------------------------------------- writing

    def claim(self, meta: dict[str, Any]) -> "Writer":
        """Take over the run: from now on no earlier attempt can commit. Then remove what those left unfinished."""
        attempt = uuid.uuid4().hex
        while True:
            number = max(map(_number, self._names("log/")), default=0) + 1
            claim = Record(number, "claim", attempt, meta=meta)
            if self.store.create(claim.name, claim.encode()):
                break
        self._sweep(claim)
        earlier = [r for r in self.records() if r.kind == "checkpoint" and r.number < number]
        return Writer(self.store, claim, earlier)

    def _sweep(self, claim: Record) -> None:
        """Delete the data of earlier attempts that no record stands for, and that none can stand for any more."""
        committed = set(map(_number, self._names("log/")))
        for name in self._names("data/"):
            if _number(name) <= claim.number and _number(name) not in committed - {claim.number}:
                self.store.delete(name)


class Writer:
    """Writes one attempt's checkpoints from a thread of its own; training waits only for the snapshot.

    There is one snapshot at a time: a `save` that comes while the last is still being written waits for it, and
    says so. Every checkpoint that is asked for is thus written, and memory holds one copy of the state, not a queue.
    """

    def __init__(self, store: Store, claim: Record, records: list[Record]) -> None:
        self.store = store
        self.attempt = claim.attempt
        self.number = claim.number
        """Of this attempt's last record."""
        self.records = records
        """The run's checkpoints, oldest first; no other attempt can add one."""
        self.files: dict[str, PartFile] = {}
        self.error: BaseException | None = None
        """What ended this writer; it writes nothing more."""
        self.stall_s = 0.0
        """Seconds that the last `save` held up its caller."""
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def save(
        self,
        step: int,
        parts: Parts,
        meta: dict[str, Any],
        keep_last: int,
        keep_every: int | None,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the tensors and `meta`, and commit them in the background; `first` is called there before all else.

        Raises what an earlier save raised (StorageError, StaleAttempt).
        """
        start = time.perf_counter()
        self.wait()
        if (waited := time.perf_counter() - start) > 1.0:
            print(
                f"warning: training waited {waited:.1f} s for the checkpoint before that of step {step}: {self.store}"
                " is slower than --checkpoint-every; a larger one avoids this",
                flush=True,
            )
        for part, tensors in parts.items():
            if part not in self.files:
                self.files[part] = PartFile(tensors)
            self.files[part].copy(tensors)
        for device in {t.device for tensors in parts.values() for t in tensors.values() if t.is_cuda}:
            torch.cuda.synchronize(device)
        self.stall_s = time.perf_counter() - start
        record = Record(self.number + 1, "checkpoint", self.attempt, step, {}, copy.deepcopy(meta))
        self._jobs.put(lambda: self._commit(record, keep_last, keep_every, first))

    def check(self) -> None:
        """Raise what a save in the background raised; costs nothing, so that it can be asked at each step."""
        if self.error:
            raise self.error

    def wait(self) -> None:
        """Until the last save is committed; raises what it raised."""
        self._jobs.join()
        self.check()

    def close(self) -> None:
        """Finish the last save and end the thread; raises what the save raised."""
        self._jobs.put(None)
        self._thread.join()
        self.check()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:
                self.error = error
            finally:
                self._jobs.task_done()

    def _commit(self, record: Record, keep_last: int, keep_every: int | None, first: Callable[[], None]) -> None:
        stale = StaleAttempt(
            f"{self.store}: a newer attempt at this run has taken over, so this one cannot commit step {record.step}."
            " Two jobs must not write one run; stop one, or give it another --out."
        )
        if self.store.exists(record.name):  # no use in writing anything
            raise stale
        first()
        with ThreadPoolExecutor(THREADS) as pool:

            def write(part: str) -> tuple[str, dict[str, Any]]:
                file, data = f"{record.number:08d}-step-{record.step}-{part}.safetensors", self.files[part].data
                self.store.write(f"data/{file}", data)
                return part, {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

            record.parts.update(pool.map(write, self.files))
        if not self.store.create(record.name, record.encode()):
            raise stale
        self.number = record.number
        self.records.append(record)
        self._retain(keep_last, keep_every)

    def _retain(self, keep_last: int, keep_every: int | None) -> None:
        """Delete old checkpoints: their records first, so that no record ever names data that is gone."""
        for record in self.records[:-keep_last]:
            if keep_every and record.step % keep_every == 0:
                continue
            self.store.delete(record.name)
            for entry in record.parts.values():
                self.store.delete(f"data/{entry['file']}")
            self.records.remove(record)


_DTYPES = {  # as safetensors calls them
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
    """One part's tensors in memory, laid out as the safetensors file that holds them: a snapshot is the file.

    The safetensors format: the header's length (8 bytes), the header (JSON), the tensors.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        header: dict[str, Any] = {}
        end = 0
        self.names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so that all are aligned
        for name in self.names:
            tensor = tensors[name]
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        # Kept between saves: fresh pages cost more than the copy itself.
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
        """Take over the values; from a GPU it is only under way when this returns."""
        assert tensors.keys() == set(self.names), "a part always holds the same tensors"
        torch._foreach_copy_(self.views, [tensors[name] for name in self.names], non_blocking=True)
