"""The format of a dataset: WebDataset shards and their index."""

import hashlib
import io
import json
import re
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

FORMAT = 1  # of the index


@dataclass(frozen=True)
class Shard:
    name: str
    bytes: int
    sha256: str
    num_samples: int

    def __post_init__(self) -> None:
        """Check what becomes part of a path, so that no index can name a file elsewhere."""
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise InputError(f"shard name: got {self.name!r}, expected a file name such as train-00000.tar")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise InputError(f"shard {self.name}: got sha256 {self.sha256!r}, expected 64 hex digits")


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
    out = io.BytesIO()
    table: dict[str, list[int]] = {"offset": [], "size": [], "crc32": [], "label": []}
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


def index_json(entries: Sequence[dict[str, Any]], **properties: Any) -> bytes:
    """Return the content of `{split}.index.json`; `entries` are `pack_shard`'s, each with a "name".

    The properties are a `ShardIndex`'s split, source, recipe, encoding, shape and class_names.
    """
    content = {"format": FORMAT, "shards": entries, **properties}
    return _canonical({**content, "digest": _digest(_canonical(content))})


def _encode(image: np.ndarray, encoding: Encoding) -> bytes:
    assert (image.dtype, image.ndim) == (np.uint8, 3), (image.dtype, image.shape)
    out = io.BytesIO()
    if encoding == "raw":
        np.save(out, np.ascontiguousarray(image), allow_pickle=False)
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


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def load_index(store: Store, split: str, check: bool = True) -> ShardIndex:
    """Read and check `{split}.index.json`; FileNotFoundError if absent, StorageError if damaged.

    Without `check`, its bytes are not hashed: enough where another process of this machine does so.
    """
    name = f"{split}.index.json"
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no {split!r} dataset at {store}: {name} is missing; write one with python -m pipeline.prepare"
        ) from None
    return parse_index(data, f"{name} at {store}", check)


def parse_index(data: bytes, where: str, check: bool = True) -> ShardIndex:
    try:
        content = json.loads(data)
        if (version := content.pop("format")) != FORMAT:
            raise StorageError(f"{where} has format {version}, expected {FORMAT}: prepare it again")

        # The file is the canonical JSON of what was hashed, and of the hash.
        digest = content["digest"]
        if not re.fullmatch(r"[0-9a-f]{32}", digest):
            raise InputError(f"digest: got {digest!r}, expected 32 hex digits")
        if check and digest != _digest(data.replace(f'"digest":"{digest}",'.encode(), b"", 1)):
            raise InputError("its digest does not match")

        entries = content.pop("shards")
        shards = [Shard(entry["name"], entry["bytes"], entry["sha256"], len(entry["label"])) for entry in entries]
        counts = [shard.num_samples for shard in shards]
        columns: dict[str, Any] = {
            name: np.concatenate([np.array(entry[name], np.int64) for entry in entries])
            for name in ("offset", "size", "crc32", "label")
        }
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        for name in ("shape", "class_names"):
            content[name] = tuple(content[name])
        return ShardIndex(shards=tuple(shards), starts=starts, **columns, **content)
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
