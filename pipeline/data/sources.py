"""Where images come from before they are shards."""

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

from pipeline.data.order import permutation
from pipeline.errors import InputError
from pipeline.images import load_image
from pipeline.storage.backends import unless_missing

BAR: dict[str, Any] = {"mininterval": 0.2 if sys.stderr.isatty() else 15.0, "dynamic_ncols": True}
"""How progress bars are shown: in a log file, a line every 15 s."""


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

    def split(name: str, ids: np.ndarray) -> Split:
        return Split(
            name,
            source="scikit-learn digits (UCI optical recognition of handwritten digits, test part)",
            fingerprint=hashlib.sha256(images[ids].tobytes()).hexdigest(),
            shape=(1, 8, 8),
            class_names=[str(name) for name in bunch.target_names],
            labels=bunch.target[ids],
            load=lambda i: images[ids[i]],
        )

    return [split("train", order[:cut]), split("val", order[cut:])]


def imagenet64(source: Path, scratch: Path) -> list[Split]:
    train = [source / f"train_data_batch_{i}.npz" for i in range(1, 11)]
    val = [source / "val_data.npz"]
    if missing := [path.name for path in train + val if not path.is_file()]:
        raise InputError(f"source: {source} lacks {', '.join(missing)}; expected the 11 files of ImageNet 64x64 (npz)")
    return [_npz_split("train", train, scratch), _npz_split("val", val, scratch)]


def _npz_split(name: str, paths: Sequence[Path], scratch: Path) -> Split:
    files = []
    for path in tqdm(paths, f"{name}: reading", unit="file", **BAR):
        files.append(_read_npz(path, scratch))
    labels = np.concatenate([labels for _, labels in files])
    starts = np.cumsum([0] + [len(labels) for _, labels in files])

    def load(i: int) -> np.ndarray:
        number = int(np.searchsorted(starts, i, side="right")) - 1
        pixels, _ = files[number]
        return np.asarray(pixels[i - starts[number]]).reshape(3, 64, 64)  # planes R, G, B

    sizes = [path.stat().st_size for path in paths]
    return Split(
        name,
        source="ImageNet 64x64, official npz, box filter",
        fingerprint=hashlib.sha256(labels.tobytes() + repr(sizes).encode()).hexdigest(),
        shape=(3, 64, 64),
        class_names=[str(number) for number in range(1, 1001)],
        labels=labels,
        load=load,
    )


def _read_npz(path: Path, scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a file's pixels, uint8 [n, 12288], unpacked in `scratch` and mapped into memory, and classes 0..999."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            labels = np.asarray(archive["labels"]).reshape(-1)
        if not np.issubdtype(labels.dtype, np.integer) or np.any((labels < 1) | (labels > 1000)):
            raise InputError("labels: expected whole numbers from 1 to 1000")
        pixels = _map_array(path, scratch)
        if pixels.shape != (len(labels), 3 * 64 * 64) or pixels.dtype != np.uint8:
            got = f"{pixels.dtype} {list(pixels.shape)}"
            raise InputError(f"data: got {got}, expected uint8 [{len(labels)}, 12288]")
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: {error}") from error
    return pixels, labels.astype(np.int64) - 1


def _map_array(path: Path, scratch: Path) -> np.ndarray:
    """Unpack the pixels of an .npz into `scratch`, checking their CRC, and map them into memory."""
    with zipfile.ZipFile(path) as archive:
        free, size = shutil.disk_usage(scratch).free, archive.getinfo("data.npy").file_size
        if free < size:
            raise InputError(f"needs {size:,} bytes in {scratch}, {free:,} are free: give --scratch")
        file = archive.extract("data.npy", scratch / path.stem)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def folder(source: Path, size: int, grey: bool, val_fraction: float) -> list[Split]:
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

    def split(name: str, ids: np.ndarray) -> Split:
        paths = [files[i] for i in np.sort(ids)]
        sizes = [(path, _size(source / path)) for path in paths]
        return Split(
            name,
            source=f"folder {source.resolve().name}, centre crop, box and bicubic reduction to {size}x{size}",
            fingerprint=hashlib.sha256(repr(sizes).encode()).hexdigest(),
            shape=(1 if grey else 3, size, size),
            class_names=class_names,
            labels=np.array([numbers.get(path.split("/")[0], 0) for path in paths], np.int64),
            load=lambda i: load_image(source / paths[i], size, grey),
        )

    splits = [split("train", order[cut:])]
    return splits + [split("val", order[:cut])] if cut else splits


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1  # a broken link: an unreadable file


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
