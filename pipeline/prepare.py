"""Write a dataset as shards: `python -m pipeline.prepare digits|imagenet64|folder`, or check one: `--verify URL`.

Images are shuffled over the whole split by a hash of the seed, so the same source, seed and options give the same
bytes. After an interruption, the same command continues: it keeps finished shards whose hash verifies. The index is
written last, so a dataset without one is incomplete.
"""

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from iddpm.bounds import Count, Fraction
from pipeline.cli import errors_exit
from pipeline.config import TrainConfig
from pipeline.data.sources import digits, folder, imagenet64
from pipeline.data.writing import Output, card, verify, write_split
from pipeline.errors import InputError
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class Digits(Output):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 10 classes: about 80 % train, the rest val."""

    shard_size: Count = 256


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
    """A tree of images (PNG, JPEG, WebP, TIFF, GIF, …); the first level of subfolders, if any, are the classes.

    Images are rotated by EXIF, alpha is flattened on white, the short side is reduced to --size (by halves with a box
    filter, then bicubic) and the centre is cropped. Unreadable files are skipped and listed.
    """

    source: Path
    """Directory of images."""
    size: Count
    """Height and width to write, in pixels."""
    grey: bool = False
    """Write one channel instead of RGB."""
    val_fraction: Fraction = 0.05
    """Fraction of the images that become the val split; 0: none."""
    val_source: Path | None = None
    """Directory of the val split's images, with the same classes; then --val-fraction does not apply."""
    labels_from_names: bool = False
    """Classes are the parts of the files' names before the first "_", as in n01440764_1.png, instead of folders."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read a dataset back, check every hash and print a summary; also spelt --verify URL."""

    url: tyro.conf.Positional[str]
    """The dataset's directory or URL."""
    storage: StorageConfig = field(default_factory=StorageConfig)


def prepare_digits(out_url: str, config: StorageConfig | None = None) -> None:
    """Write the digits dataset (train and val) to a URL, or repair it there."""
    prepare(Digits(out=out_url, storage=config or StorageConfig()))


def prepare(options: Digits | ImageNet64 | Folder) -> None:
    """Write all splits of a dataset and print what was written."""
    for name in ("source", "val_source"):
        folder_given = getattr(options, name, None)
        if folder_given and not folder_given.is_dir():
            raise InputError(f"{name}: {folder_given} is not a directory")
    store = Store(options.out, options.storage)
    store.check(write=True)  # before the source is read, which may take long
    with contextlib.ExitStack() as stack:
        if isinstance(options, ImageNet64):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="imagenet64-", dir=options.scratch))
            splits = imagenet64(options.source, Path(scratch))
        elif isinstance(options, Folder):
            splits = folder(
                options.source,
                options.size,
                options.grey,
                options.val_fraction,
                options.val_source,
                options.labels_from_names,
            )
        else:
            splits = digits()
        for split in splits:
            index, unreadable = write_split(store, split, options)
            print(card(index), flush=True)
            if unreadable:
                print(f"  skipped {len(unreadable)} unreadable files:")
                shown = unreadable[:50] + ["…"] * (len(unreadable) > 50)
                print(*(f"    {line}" for line in shown), sep="\n")
    print(f"wrote {store.url}")


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = tyro.extras.subcommand_cli_from_dict(
        {"digits": Digits, "imagenet64": ImageNet64, "folder": Folder, "verify": Verify},
        prog="python -m pipeline.prepare",
        description=__doc__,
        args=["verify" if word == "--verify" else word for word in words],
    )
    with errors_exit():
        if not isinstance(options, Verify):
            prepare(options)
            return 0
        lines = verify(Store(options.url, options.storage))
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        print("all hashes match" if not lines else "run the same pipeline.prepare command again to repair it")
        return 1 if lines else 0


def provide_digits(config: TrainConfig) -> None:
    """Prepare the digits, which come with scikit-learn, if a run needs them and they are missing."""
    if config.data.url == "data/digits" and not Path(config.data.url, "val.index.json").exists():  # written last
        prepare_digits(config.data.url)


if __name__ == "__main__":
    sys.exit(main())
