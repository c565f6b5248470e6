"""Write a dataset as shards: `python -m pipeline.prepare digits|imagenet64|folder`, or check one: `--verify URL`.

Images are shuffled over the whole split by a hash of the seed, so the same source, seed and options give the same
bytes. After an interruption, the same command continues: it keeps finished shards whose hash verifies. The index is
written last, so a dataset without one is incomplete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from pipeline.data import Encoding, ShardIndex, damage, index_json, load_index, pack_shard, parse_index, permutation
from pipeline.storage import DamagedError, StorageConfig, StorageError, Store, unless_missing


@dataclass(frozen=True, kw_only=True)
class Output:
    out: str
    """Where to write: a directory or any fsspec URL, e.g. s3://bucket/digits."""
    seed: int = 0
    """Seed of the order in which images are written."""
    encoding: Encoding = "raw"
    """raw: decoded pixels, several times faster to read; png: smaller, for larger images."""
    shard_size: int = 4096
    """Images per shard; 4096 raw images of 64x64 take 58 MB."""
    workers: int = min(4, os.cpu_count() or 1)
    """Threads, each with one shard in memory."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        for name in ("shard_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Digits(Output):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 10 classes: about 80 % train, the rest val."""

    shard_size: int = 256


@dataclass(frozen=True, kw_only=True)
class ImageNet64(Output):
    """The official downsampled ImageNet 64x64: train_data_batch_1.npz to _10.npz and val_data.npz.

    Needs a few hundred MB of memory, and 16 GB in a scratch directory, into which the batches are first unpacked.
    """

    source: Path
    """Directory with the 11 .npz files."""
    scratch: Path | None = None
    """Directory to unpack the batches into; default: the system's temporary directory."""


@dataclass(frozen=True, kw_only=True)
class Folder(Output):
    """A tree of PNG and JPEG files; the first level of subfolders, if any, are the classes.

    Images are rotated by EXIF, alpha is flattened on white, the short side is reduced to --size (by halves with a box
    filter, then bicubic) and the centre is cropped. Unreadable files are skipped and listed.
    """

    source: Path
    """Directory of images."""
    size: int
    """Height and width to write, in pixels."""
    grey: bool = False
    """Write one channel instead of RGB."""
    val_fraction: float = 0.05
    """Fraction of the images that become the val split; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size: got {self.size}, expected at least 1 pixel")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction: got {self.val_fraction}, expected 0 <= fraction < 1")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read a dataset back, check every hash and print a summary; also spelt --verify URL."""

    url: tyro.conf.Positional[str]
    """The dataset's directory or URL."""
    storage: StorageConfig = field(default_factory=StorageConfig)


class Unreadable(Exception):
    """A source image cannot be read: it is skipped, and listed at the end."""


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


# --- sources ---


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
        raise ValueError(f"source: {source} lacks {', '.join(missing)}; expected the 11 files of ImageNet 64x64 (npz)")
    return [_npz_split(name, paths, scratch) for name, paths in files.items()]


def _npz_split(name: str, paths: Sequence[Path], scratch: Path) -> Split:
    labels, pixels = [], []
    for path in tqdm(paths, f"{name}: reading", unit="file", **_BAR):
        with _naming(path), np.load(path, allow_pickle=False) as archive:
            if not {"data", "labels"} <= set(archive.files):
                raise ValueError(f"has {', '.join(archive.files)}, expected data and labels")
            labels.append(np.asarray(archive["labels"]).reshape(-1))
            if not np.issubdtype(labels[-1].dtype, np.integer) or np.any((labels[-1] < 1) | (labels[-1] > 1000)):
                raise ValueError("labels: expected whole numbers from 1 to 1000")
            pixels.append(_map_array(path, "data.npy", scratch))
            if pixels[-1].shape != (len(labels[-1]), 3 * 64 * 64) or pixels[-1].dtype != np.uint8:
                got = f"{pixels[-1].dtype} {list(pixels[-1].shape)}"
                raise ValueError(f"data: got {got}, expected uint8 [{len(labels[-1])}, 12288]")
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
            raise ValueError(f"needs {size:,} bytes in {scratch}, {free:,} are free: give --scratch")
        with target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    return np.load(target, mmap_mode="r", allow_pickle=False)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error


def folder(source: Path, size: int, grey: bool, val_fraction: float) -> list[Split]:
    if not source.is_dir():
        raise ValueError(f"source: {source} is not a directory")
    files = sorted(_images(source))
    if not files:
        raise ValueError(f"source: {source} contains no .png, .jpg or .jpeg file")
    class_names = sorted({path.split("/")[0] for path in files if "/" in path})
    loose = [path for path in files if "/" not in path]
    if class_names and loose:
        raise ValueError(
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


def load_image(path: Path, size: int, grey: bool = False) -> np.ndarray:
    """Load an image as uint8 [3 or 1, size, size]. Raises `Unreadable` if the file is not an intact image."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits per pixel
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = image.convert("L" if grey else "RGB")
    except Exception as error:  # Pillow raises many types on broken files
        raise Unreadable(f"{path}: {error}") from error
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


# --- writing ---


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
        raise ValueError(f"none of the {len(order)} images could be read: {'; '.join(unreadable[:3])}")
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
    """Return the reports of shards written earlier, by name. Raises ValueError if they are of another dataset."""
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
        raise ValueError(
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


def prepare_digits(out_url: str, config: StorageConfig | None = None) -> None:
    """Write the digits dataset (train and val) to a URL, or repair it there."""
    prepare(Digits(out=out_url, storage=config or StorageConfig()))


def prepare(options: Digits | ImageNet64 | Folder) -> None:
    """Write all splits of a dataset and print what was written."""
    store = Store(options.out, options.storage)
    store.check(write=True)
    with contextlib.ExitStack() as stack:
        if isinstance(options, ImageNet64):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="imagenet64-", dir=options.scratch))
            splits = imagenet64(options.source, Path(scratch))
        elif isinstance(options, Folder):
            splits = folder(options.source, options.size, options.grey, options.val_fraction)
        else:
            splits = digits()
        for split in splits:
            index, unreadable = write_split(store, split, options)
            print(card(index), flush=True)
            if unreadable:
                print(f"  skipped {len(unreadable)} unreadable files:")
                print(*(f"    {line}" for line in unreadable[:50]), *["    …"][: len(unreadable) > 50], sep="\n")
    print(f"wrote {store.url}")


# --- checking ---


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
        raise ValueError(f"url: {store} contains no dataset (no *.index.json)")
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
_BAR: dict[str, Any] = {"file": sys.stderr, "mininterval": 0.2 if sys.stderr.isatty() else 15.0, "dynamic_ncols": True}


def main(arguments: Sequence[str] | None = None) -> int:
    given = ["verify" if a == "--verify" else a for a in (sys.argv[1:] if arguments is None else arguments)]
    try:
        options = tyro.cli(
            Annotated[Digits, tyro.conf.subcommand("digits")]
            | Annotated[ImageNet64, tyro.conf.subcommand("imagenet64")]
            | Annotated[Folder, tyro.conf.subcommand("folder")]
            | Annotated[Verify, tyro.conf.subcommand("verify")],
            prog="python -m pipeline.prepare",
            description=__doc__,
            args=given,
        )
        if not isinstance(options, Verify):
            prepare(options)
            return 0
        lines = verify(Store(options.url, options.storage))
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        print("all hashes match" if not lines else "run the same pipeline.prepare command again to repair it")
        return 1 if lines else 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
