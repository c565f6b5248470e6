"""Write a dataset's shards and index, and check them."""

from __future__ import annotations

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
from pipeline.data.shards import Encoding, ShardIndex, damage, index_json, load_index, pack_shard, parse_index
from pipeline.data.sources import _BAR, Split
from pipeline.data.stream import permutation
from pipeline.errors import InputError
from pipeline.images import Unreadable
from pipeline.storage.backends import StorageConfig
from pipeline.storage.errors import DamagedError, StorageError
from pipeline.storage.store import Store

THREADS = min(4, os.cpu_count() or 1)


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
    settings = [split.fingerprint, options.seed, options.encoding, options.shard_size, split.shape, *split.class_names]
    recipe = hashlib.sha256(repr(settings).encode()).hexdigest()[:32]
    finished = _finished(store, split.name, recipe)
    order = permutation(len(split.labels), "write", options.seed)

    def write(number: int) -> dict[str, Any]:
        """Write a shard; return its report: its index entry and the skipped files."""
        name, first = f"{split.name}-{number:05d}.tar", number * options.shard_size
        chosen = order[first : first + options.shard_size]
        if name in finished and _intact(store, finished[name]["entry"]):
            bar.update(len(chosen))
            return finished[name]
        skipped: list[str] = []
        data, entry = pack_shard(_load(split, chosen, first, skipped, bar), options.encoding)
        if entry["label"]:
            store.write(name, data)
        report = {"recipe": recipe, "entry": {"name": name, **entry}, "skipped": skipped}
        store.write(name.replace(".tar", _PART), json.dumps(report).encode())
        return report

    pool = ThreadPoolExecutor(options.workers)
    with tqdm(total=len(order), desc=split.name, unit="image", **_BAR) as bar:
        try:
            reports = list(pool.map(write, range(-(-len(order) // options.shard_size))))
        finally:
            pool.shutdown(cancel_futures=True)
    entries = [report["entry"] for report in reports if report["entry"]["label"]]
    unreadable = sorted(name for report in reports for name in report["skipped"])
    if not entries:
        raise InputError(f"none of the {len(order)} images could be read: {'; '.join(unreadable[:3])}")
    index = index_json(
        entries,
        split=split.name,
        source=split.source,
        recipe=recipe,
        encoding=options.encoding,
        shape=split.shape,
        class_names=split.class_names,
    )
    store.write(f"{split.name}.index.json", index)
    for name in _parts(store, split.name):
        store.delete(name)
    return parse_index(index, f"{split.name}.index.json"), unreadable


def _load(
    split: Split, chosen: np.ndarray, first: int, skipped: list[str], bar: tqdm[Any]
) -> Iterator[tuple[str, np.ndarray, int]]:
    for place, i in enumerate(chosen.tolist(), first):
        try:
            yield f"{place:09d}", split.load(i), int(split.labels[i])
        except Unreadable as error:
            skipped.append(str(error))
        bar.update()


def _finished(store: Store, split: str, recipe: str) -> dict[str, dict[str, Any]]:
    """Return the reports of shards written earlier, by name. Raises InputError if they are of another dataset."""
    found = [json.loads(store.read(name)) for name in _parts(store, split)]
    with contextlib.suppress(FileNotFoundError):
        data = store.read(f"{split}.index.json")
        try:
            earlier = parse_index(data, f"{split}.index.json").recipe
            entries = json.loads(data)["shards"]
            found += [{"recipe": earlier, "entry": entry, "skipped": []} for entry in entries]
        except StorageError as error:
            print(f"warning: {error}; rewriting all of {split}", file=sys.stderr)
    if any(report["recipe"] != recipe for report in found):
        raise InputError(
            f"out: {store} contains {split} shards from another source or other options; choose another "
            "--out, or delete that dataset"
        )
    return {report["entry"]["name"]: report for report in found}


def _parts(store: Store, split: str) -> list[str]:
    return [name for name in store.list(f"{split}-") if name.endswith(_PART)]


def _intact(store: Store, entry: dict[str, Any]) -> bool:
    if not entry["label"]:
        return True  # all its files were unreadable
    try:
        store.read(entry["name"], entry["sha256"])
    except (FileNotFoundError, DamagedError):
        return False
    return True


def card(index: ShardIndex) -> str:
    """Summarise a dataset in a few lines: counts, classes, source, digest, bytes."""
    counts = np.bincount(index.label, minlength=max(index.num_classes, 1))
    names = ", ".join(index.class_names[:10]) + ("…" if index.num_classes > 10 else "")
    classes = f"{index.num_classes} ({names}), {counts.min()} to {counts.max()} images each" if names else "none"
    total = sum(shard.bytes for shard in index.shards)
    return "\n".join(
        [
            f"{index.split}: {index.num_samples:,} images, uint8 {list(index.shape)}, {index.encoding}",
            f"  classes  {classes}",
            f"  source   {index.source}",
            f"  digest   {index.digest}",
            f"  bytes    {total:,} in {len(index.shards)} shards",
        ]
    )


def verify(store: Store) -> list[str]:
    """Check every shard's size and sha256 and print a summary; return a line for each damaged shard."""
    splits = [n.removesuffix(".index.json") for n in store.list() if n.endswith(".index.json") and "/" not in n]
    if not splits:
        raise InputError(f"url: {store} contains no dataset (no *.index.json)")
    found = []
    for split in splits:
        index = load_index(store, split)
        print(card(index), flush=True)
        for number, shard in enumerate(tqdm(index.shards, f"{split}: checking", unit="shard", **_BAR)):
            try:
                store.read(shard.name, shard.sha256)
            except FileNotFoundError:
                found.append(f"{shard.name} is missing")
            except DamagedError:
                found.append(f"{shard.name} is damaged: {damage(index, number, store.read(shard.name))}")
    return found


_PART = ".part.json"  # next to a finished shard until the index is written
