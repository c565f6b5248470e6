"""Where images come from before they are shards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.data.stream import permutation
from pipeline.errors import InputError
from pipeline.images import load_image
from pipeline.storage.backends import unless_missing


@dataclass(frozen=True)
class Split:
    """Images to write: their labels, and a thread-safe function that loads one as uint8 [C, H, W]."""

    name: str
    source: str
    fingerprint: str
    """Distinguishes this source from others."""
    shape: tuple[int, int, int]
    class_names: Sequence[str]
    labels: np.ndarray
    load: Callable[[int], np.ndarray]


def digits() -> list[Split]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images[:, None] * (255 / 16)).astype(np.uint8)  # levels 0..16
    order = permutation(len(images), "digits split")
    cut = round(0.8 * len(images))

    def split(name: str, chosen: np.ndarray) -> Split:
        content = hashlib.sha256(images[chosen].tobytes()).hexdigest()
        names = [str(n) for n in bunch.target_names]
        source = "scikit-learn digits (UCI optical recognition of handwritten digits, test part)"
        labels = bunch.target[chosen]
        return Split(name, source, content, (1, 8, 8), names, labels, lambda i: images[chosen[i]])

    return [split("train", order[:cut]), split("val", order[cut:])]


def imagenet64(source: Path, scratch: Path) -> list[Split]:
    files = {"train": [source / f"train_data_batch_{i}.npz" for i in range(1, 11)], "val": [source / "val_data.npz"]}
    missing = [path.name for paths in files.values() for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"source: {source} lacks {', '.join(missing)}; expected the 11 files of ImageNet 64x64 (npz)")
    return [_npz_split(name, paths, scratch) for name, paths in files.items()]


def _npz_split(name: str, paths: Sequence[Path], scratch: Path) -> Split:
    labels, pixels = [], []
    for path in tqdm(paths, f"{name}: reading", unit="file", **_BAR):
        with _naming(path), path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not {"data", "labels"} <= set(archive.files):
                raise InputError(f"has {', '.join(archive.files)}, expected data and labels")
            labels.append(np.asarray(archive["labels"]).reshape(-1))
            if not np.issubdtype(labels[-1].dtype, np.integer) or np.any((labels[-1] < 1) | (labels[-1] > 1000)):
                raise InputError("labels: expected whole numbers from 1 to 1000")
            pixels.append(_map_array(path, "data.npy", scratch))
            if pixels[-1].shape != (len(labels[-1]), 3 * 64 * 64) or pixels[-1].dtype != np.uint8:
                got = f"{pixels[-1].dtype} {list(pixels[-1].shape)}"
                raise InputError(f"data: got {got}, expected uint8 [{len(labels[-1])}, 12288]")
    starts = np.cumsum([0] + [len(part) for part in labels])

    def load(i: int) -> np.ndarray:
        part = int(np.searchsorted(starts, i, side="right")) - 1
        return np.asarray(pixels[part][i - starts[part]]).reshape(3, 64, 64)  # planes R, G, B

    classes = np.concatenate(labels).astype(np.int64) - 1
    content = hashlib.sha256(classes.tobytes() + repr([path.stat().st_size for path in paths]).encode()).hexdigest()
    names = [str(number) for number in range(1, 1001)]
    return Split(name, "ImageNet 64x64, official npz, box filter", content, (3, 64, 64), names, classes, load)


def _map_array(path: Path, member: str, scratch: Path) -> np.ndarray:
    """Unpack an array of an .npz into `scratch`, checking its CRC, and map it into memory."""
    target = scratch / f"{path.stem}.npy"
    with zipfile.ZipFile(path) as archive, archive.open(member) as packed:
        free, size = shutil.disk_usage(scratch).free, archive.getinfo(member).file_size
        if free < size:
            raise InputError(f"needs {size:,} bytes in {scratch}, {free:,} are free: give --scratch")
        with target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    return np.load(target, mmap_mode="r", allow_pickle=False)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: {error}") from error


def folder(source: Path, size: int, grey: bool, val_fraction: float) -> list[Split]:
    if not source.is_dir():
        raise InputError(f"source: {source} is not a directory")
    files = sorted(_images(source))
    if not files:
        raise InputError(f"source: {source} contains no .png, .jpg or .jpeg file")
    class_names = sorted({path.split("/")[0] for path in files if "/" in path})
    loose = [path for path in files if "/" not in path]
    if class_names and loose:
        raise InputError(
            f"source: {source} contains both class folders ({class_names[0]}…) and {len(loose)} images of "
            f"no class ({loose[0]}…): move those into a class folder or elsewhere"
        )
    numbers = {name: i for i, name in enumerate(class_names)}
    order = permutation(len(files), "folder split")
    cut = round(val_fraction * len(files))

    def split(name: str, chosen: np.ndarray) -> Split:
        paths = [files[i] for i in np.sort(chosen)]
        sizes = [(path, _size(source / path)) for path in paths]
        labels = np.array([numbers.get(path.split("/")[0], 0) for path in paths], np.int64)
        return Split(
            name,
            f"folder {source.resolve().name}, centre crop, box and bicubic reduction to {size}x{size}",
            hashlib.sha256(repr(sizes).encode()).hexdigest(),
            (1 if grey else 3, size, size),
            class_names,
            labels,
            lambda i: load_image(source / paths[i], size, grey),
        )

    return [split("train", order[cut:]), *([split("val", order[:cut])] if cut else [])]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a broken link: an unreadable file
        return -1


def _images(source: Path) -> Iterator[str]:
    """Yield the paths of image files, relative to `source`, following links."""
    seen = set()
    for directory, folders, names in os.walk(source, followlinks=True, onerror=unless_missing):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in names:
            if not name.startswith(".") and name.lower().endswith((".png", ".jpg", ".jpeg")):
                yield (Path(directory) / name).relative_to(source).as_posix()


_BAR: dict[str, Any] = {"file": sys.stderr, "mininterval": 0.2 if sys.stderr.isatty() else 15.0, "dynamic_ncols": True}
