"""The format of a dataset: WebDataset shards and their index."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.errors import InputError
from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store

Encoding = Literal["raw", "png"]


FORMAT = 1


@dataclass(frozen=True)
class Shard:
    name: str
    bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Everything about a split that can be known without opening a shard. Samples are numbered in written order."""

    split: str
    source: str
    recipe: str
    """Hash of what the shards were made from and how."""
    encoding: Encoding
    shape: tuple[int, int, int]
    """(C, H, W) of every image."""
    class_names: tuple[str, ...]
    digest: str
    """32 hex digits of a hash of the whole index, and thus of all images and labels."""
    shards: tuple[Shard, ...]
    starts: np.ndarray
    """int64 [shards + 1]: id of each shard's first sample, then the number of samples."""
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    label: np.ndarray
    """int64 [num_samples] each: an image's byte offset in its shard, its number of bytes, their CRC-32, the class."""

    @property
    def num_samples(self) -> int:
        return int(self.starts[-1])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, ids, side="right") - 1


def pack_shard(samples: Iterable[tuple[str, np.ndarray, int]], encoding: Encoding) -> tuple[bytes, dict[str, Any]]:
    """Pack (key, image uint8 [C, H, W], label) into a tar; return its bytes and its entry for the index.

    The same samples give the same bytes.
    """
    out, table = io.BytesIO(), {"offset": [], "size": [], "crc32": [], "label": []}  # type: ignore[var-annotated]
    suffix = {"raw": "npy", "png": "png"}[encoding]
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, label in samples:
            data = _encode(image, encoding)
            _add(tar, f"{key}.{suffix}", data)
            table["offset"].append(out.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            table["size"].append(len(data))
            table["crc32"].append(zlib.crc32(data))
            table["label"].append(int(label))
            _add(tar, f"{key}.cls", str(int(label)).encode())
    data = out.getvalue()
    return data, {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **table}


def index_json(
    entries: Sequence[dict[str, Any]],
    *,
    split: str,
    source: str,
    recipe: str,
    encoding: Encoding,
    shape: tuple[int, int, int],
    class_names: Sequence[str],
) -> bytes:
    """Return the content of `{split}.index.json`; `entries` are `pack_shard`'s, each with a "name"."""
    content = {
        "format": FORMAT,
        "split": split,
        "source": source,
        "recipe": recipe,
        "encoding": encoding,
        "shape": list(shape),
        "class_names": list(class_names),
        "shards": list(entries),
    }
    return _canonical({**content, "digest": _digest(content)})


def _encode(image: np.ndarray, encoding: Encoding) -> bytes:
    assert (image.dtype, image.ndim) == (np.uint8, 3), (image.dtype, image.shape)
    out = io.BytesIO()
    if encoding == "raw":
        np.lib.format.write_array(out, np.ascontiguousarray(image), version=(1, 0), allow_pickle=False)
    else:
        from PIL import Image

        pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(out, "png", compress_level=6)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, owner: 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _digest(content: Any) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()[:32]


def load_index(store: Store, split: str) -> ShardIndex:
    """Read and check `{split}.index.json`; FileNotFoundError if absent, StorageError if damaged."""
    name = f"{split}.index.json"
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no {split!r} dataset at {store}: {name} is missing; write one with python -m pipeline.prepare"
        ) from None
    return parse_index(data, f"{name} at {store}")


def parse_index(data: bytes, where: str) -> ShardIndex:
    try:
        content = json.loads(data)
        digest = content.pop("digest")
        if content["format"] != FORMAT:
            raise StorageError(f"{where} has format {content['format']}, expected {FORMAT}: prepare it again")
        if _digest(content) != digest:
            raise InputError("its digest does not match")
        entries = content["shards"]
        columns = {
            name: np.concatenate([np.asarray(entry[name], np.int64) for entry in entries] or [np.empty(0, np.int64)])
            for name in ("offset", "size", "crc32", "label")
        }
        counts = [len(entry["label"]) for entry in entries]
        return ShardIndex(
            split=content["split"],
            source=content["source"],
            recipe=content["recipe"],
            encoding=content["encoding"],
            shape=tuple(content["shape"]),
            class_names=tuple(content["class_names"]),
            digest=digest,
            shards=tuple(
                Shard(entry["name"], entry["bytes"], entry["sha256"], count)
                for entry, count in zip(entries, counts, strict=True)
            ),
            starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            **columns,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{where} is damaged ({error}): run the same pipeline.prepare command again") from error


def damage(index: ShardIndex, number: int, content: bytes) -> str:
    """Describe what is wrong with a damaged shard, down to the sample."""
    shard, what = index.shards[number], "bytes between its samples differ"
    for i in range(int(index.starts[number]), int(index.starts[number + 1])):
        data = content[index.offset[i] : index.offset[i] + index.size[i]]
        if zlib.crc32(data) != index.crc32[i]:
            fault = "is truncated" if len(data) < index.size[i] else "does not match its checksum"
            what = f"sample {i} (number {i - int(index.starts[number])} of {shard.num_samples} in the shard) {fault}"
            break
    size = len(content)
    return what if size == shard.bytes else f"{what}; the file has {size} bytes, expected {shard.bytes}"
