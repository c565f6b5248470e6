"""Write a dataset's shards and index, and check them."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from iddpm.bounds import Count, check_bounds
from pipeline.data.order import permutation
from pipeline.data.shards import Encoding, ShardIndex, damage, index_json, load_index, pack_shard, parse_index
from pipeline.data.sources import BAR, Split
from pipeline.errors import InputError
from pipeline.images import Unreadable
from pipeline.storage.backends import StorageConfig
from pipeline.storage.errors import DamagedError, StorageError
from pipeline.storage.store import Store

THREADS = min(4, os.cpu_count() or 1)
REPORT = ".part.json"  # next to a finished shard until the index is written


@dataclass(frozen=True, kw_only=True)
class Output:
    out: str
    """Where to write: a directory or any fsspec URL, e.g. s3://bucket/digits."""
    seed: int = 0
    """Seed of the order in which images are written."""
    encoding: Encoding = "raw"
    """raw: decoded pixels, several times faster to read; png: smaller, for larger images."""
    shard_size: Count = 4096
    """Images per shard; 4096 raw images of 64x64 take 58 MB."""
    workers: Count = THREADS
    """Threads, each with one shard in memory."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        check_bounds(self, error=InputError)


def write_split(store: Store, split: Split, options: Output) -> tuple[ShardIndex, list[str]]:
    """Write the missing shards, then the index; return it and a line for each skipped file."""
    # What makes the shards what they are; those of an earlier run with the same recipe are kept.
    settings = [split.fingerprint, options.seed, options.encoding, options.shard_size, split.shape, *split.class_names]
    recipe = hashlib.sha256(repr(settings).encode()).hexdigest()[:32]
    finished = _finished(store, split.name, recipe)
    order = permutation(len(split.labels), "write", options.seed)

    def write(first: int) -> dict[str, Any]:
        """Write the shard that begins at this place in the order; return its index entry and the skipped files."""
        name = f"{split.name}-{first // options.shard_size:05d}"
        ids = order[first : first + options.shard_size]
        report = finished.get(f"{name}.tar")
        if report and _intact(store, report["entry"]):
            bar.update(len(ids))
            return report
        skipped: list[str] = []
        data, entry = pack_shard(_load(split, ids, first, skipped, bar), options.encoding)
        if entry["label"]:
            store.write(f"{name}.tar", data)
        report = {"recipe": recipe, "entry": {"name": f"{name}.tar", **entry}, "skipped": skipped}
        store.write(f"{name}{REPORT}", json.dumps(report).encode())
        return report

    # Write the shards, each with a report, so that an interrupted run can be continued.
    firsts = range(0, len(order), options.shard_size)
    progress = tqdm(total=len(order), desc=split.name, unit="image", **BAR)
    with progress as bar, ThreadPoolExecutor(options.workers) as pool:
        reports = list(pool.map(write, firsts))  # which cancels the rest if one fails
    entries = [report["entry"] for report in reports if report["entry"]["label"]]
    unreadable = sorted(line for report in reports for line in report["skipped"])
    if not entries:
        raise InputError(f"none of the {len(order)} images could be read: {'; '.join(unreadable[:3])}")

    # Write the index last: a dataset without one is incomplete. The reports have then served their purpose.
    name = f"{split.name}.index.json"
    index = index_json(
        entries,
        split=split.name,
        source=split.source,
        recipe=recipe,
        encoding=options.encoding,
        shape=split.shape,
        class_names=split.class_names,
    )
    store.write(name, index)
    for report_name in _reports(store, split.name):
        store.delete(report_name)
    return parse_index(index, name), unreadable


def _load(
    split: Split, ids: np.ndarray, first: int, skipped: list[str], bar: tqdm
) -> Iterator[tuple[str, np.ndarray, int]]:
    for place, i in enumerate(ids.tolist(), first):
        try:
            yield f"{place:09d}", split.load(i), int(split.labels[i])
        except Unreadable as error:
            skipped.append(str(error))
        bar.update()


def _finished(store: Store, split: str, recipe: str) -> dict[str, dict[str, Any]]:
    """Return the reports of shards written earlier, by name. Raises InputError if they are of another dataset."""
    reports = [json.loads(store.read(name)) for name in _reports(store, split)]
    name = f"{split}.index.json"
    with contextlib.suppress(FileNotFoundError):
        data = store.read(name)
        try:
            earlier = parse_index(data, name).recipe
            entries = json.loads(data)["shards"]
            reports += [{"recipe": earlier, "entry": entry, "skipped": []} for entry in entries]
        except StorageError as error:
            print(f"warning: {error}; rewriting all of {split}", file=sys.stderr)
    if any(report["recipe"] != recipe for report in reports):
        raise InputError(
            f"out: {store} contains {split} shards from another source or other options; choose another "
            "--out, or delete that dataset"
        )
    return {report["entry"]["name"]: report for report in reports}


def _reports(store: Store, split: str) -> list[str]:
    return [name for name in store.list(f"{split}-") if name.endswith(REPORT)]


def _intact(store: Store, entry: dict[str, Any]) -> bool:
    # A shard of unreadable files only was not written.
    return not entry["label"] or _fault(store, entry["name"], entry["sha256"]) is None


def _fault(store: Store, shard: str, sha256: str) -> str | None:
    """Read a shard; return "missing" or "damaged" if it is."""
    try:
        store.read(shard, sha256)
    except FileNotFoundError:
        return "missing"
    except DamagedError:
        return "damaged"
    return None


def card(index: ShardIndex) -> str:
    """Summarise a dataset in a few lines: counts, classes, source, digest, bytes."""
    classes = "none"
    if index.num_classes:
        counts = np.bincount(index.label, minlength=index.num_classes)
        names = ", ".join(index.class_names[:10]) + ("…" if index.num_classes > 10 else "")
        classes = f"{index.num_classes} ({names}), {counts.min()} to {counts.max()} images each"
    total = sum(shard.bytes for shard in index.shards)
    return (
        f"{index.split}: {index.num_samples:,} images, uint8 {list(index.shape)}, {index.encoding}\n"
        f"  classes  {classes}\n"
        f"  source   {index.source}\n"
        f"  digest   {index.digest}\n"
        f"  bytes    {total:,} in {len(index.shards)} shards"
    )


def verify(store: Store) -> list[str]:
    """Check every shard's size and sha256 and print a summary; return a line for each damaged shard."""
    splits = [n.removesuffix(".index.json") for n in store.list() if n.endswith(".index.json") and "/" not in n]
    if not splits:
        raise InputError(f"url: {store} contains no dataset (no *.index.json)")
    faults = []
    for split in splits:
        index = load_index(store, split)
        print(card(index), flush=True)
        for number, shard in enumerate(tqdm(index.shards, f"{split}: checking", unit="shard", **BAR)):
            fault = _fault(store, shard.name, shard.sha256)
            details = f": {damage(index, number, store.read(shard.name))}" if fault == "damaged" else ""
            if fault:
                faults.append(f"{shard.name} is {fault}{details}")
    return faults
