"""Where images come from before they are shards."""

import hashlib
import os
import shutil
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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


SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".avif")
"""Files that `folder` reads; of an animation, its first frame."""
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX", "lost+found")  # of a NAS, an archive, a disk; hidden ones start with a dot


def folder(
    source: Path,
    size: int,
    grey: bool,
    val_fraction: float,
    val_source: Path | None = None,
    labels_from_names: bool = False,
) -> list[Split]:
    """Return a train split of the images below `source`, and a val split: those below `val_source`, or a part of them.

    Raises InputError if what belongs to which class is not clear.
    """
    find = _classes_of_names if labels_from_names else _classes_of_folders
    classes = find(source)
    class_names = sorted(set(classes.values()) - {""})
    if val_source:
        val_classes = find(val_source)
        if different := sorted(set(val_classes.values()) ^ set(classes.values())):
            raise InputError(
                f"val_source: got other classes than {source}, expected the same; only one of the two has"
                f" {', '.join(different[:5])}"
            )
        parts = [("train", source, classes), ("val", val_source, val_classes)]
    else:
        paths = list(classes)
        order = permutation(len(paths), "folder split")
        cut = round(val_fraction * len(paths))
        parts = [("train", source, {paths[i]: classes[paths[i]] for i in np.sort(order[cut:])})]
        if cut:
            parts.append(("val", source, {paths[i]: classes[paths[i]] for i in np.sort(order[:cut])}))
    return [_folder_split(name, root, chosen, class_names, size, grey) for name, root, chosen in parts]


def _folder_split(
    name: str, source: Path, classes: dict[str, str], class_names: list[str], size: int, grey: bool
) -> Split:
    paths, numbers = list(classes), {"": 0} | {name: i for i, name in enumerate(class_names)}
    sizes = [(path, _size(source / path)) for path in paths]
    return Split(
        name,
        source=f"folder {source.resolve().name}, centre crop, box and bicubic reduction to {size}x{size}",
        fingerprint=hashlib.sha256(repr(sizes).encode()).hexdigest(),
        shape=(1 if grey else 3, size, size),
        class_names=class_names,
        labels=np.array([numbers[classes[path]] for path in paths], np.int64),
        load=lambda i: load_image(source / paths[i], size, grey),
    )


def _classes_of_names(source: Path) -> dict[str, str]:
    """Map a folder's images to their classes: the parts of their names before the first "_", as in n01440764_1.png."""
    classes = {path: Path(path).name.partition("_")[0] for path in _images(source)}
    unnamed = [path for path in classes if "_" not in Path(path).name]
    if unnamed:
        raise InputError(f"labels_from_names: got {unnamed[0]}, expected names that begin with a class and _")
    return classes


def _classes_of_folders(source: Path) -> dict[str, str]:
    """Map a folder's images to their classes: the folders in it; "" if it has no folders.

    Raises InputError if only some images are in class folders, if a class folder has none, whose removal would renumber
    the others, or if a class's name is not UTF-8.
    """
    classes = {path: path.split("/")[0] if "/" in path else "" for path in _images(source)}
    class_names = sorted(set(classes.values()) - {""})
    loose = [path for path, name in classes.items() if not name]
    if class_names and loose:
        raise InputError(
            f"source: {source} contains both class folders ({class_names[0]}…) and {len(loose)} images of "
            f"no class ({loose[0]}…): move those into a class folder or elsewhere"
        )
    folders = _visible(path.name for path in source.iterdir() if path.is_dir())
    empty = sorted(set(folders) - set(class_names))
    if class_names and empty:
        raise InputError(
            f"source: the class folders {', '.join(empty[:5])} contain no image that can be read; convert their files,"
            " or move the folders elsewhere, which changes the numbers of the classes after them"
        )
    for name in class_names:
        if not name.isprintable():
            raise InputError(f"source: the class folder {name!r} has a name that is not UTF-8 text: rename it")
    return classes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1  # a broken link: an unreadable file


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(".") and name not in SYSTEM_FOLDERS]


def _images(source: Path) -> list[str]:
    """Find the image files below a folder, following links: their paths relative to it, sorted.

    Prints how many files of other kinds there are, and which folders it skips. Raises InputError if there is no image.
    """
    files, others, skipped = [], Counter[str](), Counter[str]()
    seen = set()
    for directory, folders, names in os.walk(source, followlinks=True, onerror=unless_missing):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        skipped.update(set(folders) - set(_visible(folders)))
        folders[:] = _visible(folders)
        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                others["hidden"] += 1
            elif suffix in SUFFIXES:
                files.append((Path(directory) / name).relative_to(source).as_posix())
            else:
                others[suffix or "without a suffix"] += 1
    for counts, what in ((others, "not images that can be read"), (skipped, "hidden and system folders, skipped")):
        if counts:
            print(f"{source}: {what}: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common(8)), flush=True)
    if not files:
        raise InputError(f"source: {source} contains no image file; expected {', '.join(SUFFIXES)}")
    return sorted(files)
