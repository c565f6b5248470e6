"""Preparing datasets: correct pixels, the same bytes every time, resumable, with clear errors."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from readers import samples

from pipeline.data import sources
from pipeline.data.shards import load_index
from pipeline.images import load_image
from pipeline.prepare import main, prepare_digits
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(*arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        if end.code == 1:  # after printing an error; 2 is bad usage
            return 1
        raise


# --- digits ---


def test_digits(tmp_path, capsys):
    from sklearn.datasets import load_digits

    prepare_digits(str(tmp_path / "a"))
    store = Store(tmp_path / "a")
    train, val = load_index(store, "train"), load_index(store, "val")
    assert (train.num_samples, val.num_samples) == (1438, 359)
    assert (train.shape, train.class_names) == ((1, 8, 8), tuple("0123456789"))
    written = [samples(store, index, range(index.num_samples)) for index in (train, val)]
    images = np.concatenate([part[0].numpy() for part in written]).reshape(-1, 64)
    labels = np.concatenate([part[1].numpy() for part in written])
    source = load_digits()
    expected = np.round(source.data * 255 / 16).astype(np.uint8)
    assert (images.min(), images.max()) == (0, 255)
    assert sorted(zip(map(bytes, images), labels, strict=True)) == sorted(
        zip(map(bytes, expected), source.target, strict=True)
    )
    assert "1,438 images" in capsys.readouterr().out
    # Another number of threads gives the same bytes; another seed, another order.
    assert run("digits", "--out", tmp_path / "b", "--workers", 1) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert run("digits", "--out", tmp_path / "c", "--seed", 1) == 0
    assert contents(tmp_path / "c")["train-00000.tar"] != contents(tmp_path / "a")["train-00000.tar"]


def test_png_digits_hold_the_same(tmp_path):
    assert run("digits", "--out", tmp_path / "raw") == 0
    assert run("digits", "--out", tmp_path / "png", "--encoding", "png") == 0
    raw, png = (
        samples(store, load_index(store, "val"), range(359))
        for store in (Store(tmp_path / "raw"), Store(tmp_path / "png"))
    )
    assert np.array_equal(raw[0], png[0])
    assert np.array_equal(raw[1], png[1])


def test_second_run_repairs_and_other_options_are_refused(tmp_path, capsys):
    assert run("digits", "--out", tmp_path) == 0
    before = contents(tmp_path)
    (tmp_path / "train-00002.tar").write_bytes(before["train-00002.tar"][:-600])
    (tmp_path / "train-00003.tar").unlink()
    (tmp_path / "val.index.json").write_bytes(before["val.index.json"][:-600])
    assert run("digits", "--out", tmp_path) == 0
    assert contents(tmp_path) == before
    capsys.readouterr()
    assert run("digits", "--out", tmp_path, "--seed", 1) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: out: ")
    assert contents(tmp_path) == before


def test_resume_after_kill(tmp_path):
    """A killed run is continued: finished shards are not rewritten, and the result is the same."""
    out = tmp_path / "killed"
    code = (
        "import sys, time, pipeline.data.writing as p; load = p._load\n"
        "def slow(*a):\n    for sample in load(*a):\n        time.sleep(.001); yield sample\n"
        "p._load = slow; from pipeline.prepare import main; sys.exit(main(sys.argv[1:]))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, "digits", "--out", str(out), "--workers", "1"])
    for _ in range(600):
        if (out / "train-00002.part.json").exists():
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("train-0000[0-2].tar")}
    assert len(finished) == 3
    assert not (out / "train.index.json").exists()
    (out / "train-00001.tar").write_bytes(b"damaged since")
    assert run("digits", "--out", out) == 0
    assert [path.stat().st_mtime_ns == written for path, written in sorted(finished.items())] == [
        True,
        False,
        True,
    ]
    assert run("digits", "--out", tmp_path / "whole") == 0
    kept = {name: data for name, data in contents(out).items() if not name.startswith(".")}
    assert kept == contents(tmp_path / "whole")


# --- verify ---


@pytest.mark.parametrize("form", ["--verify", "verify"])
def test_verify(tmp_path, capsys, form):
    run("digits", "--out", tmp_path)
    capsys.readouterr()
    assert run(form, tmp_path) == 0
    out = capsys.readouterr().out
    index = load_index(Store(tmp_path), "train")
    for text in (
        "1,438 images",
        "10 (0, 1",
        index.digest,
        index.source,
        "all hashes match",
    ):
        assert text in out
    path = tmp_path / "train-00001.tar"
    content = bytearray(path.read_bytes())
    content[int(index.offset[260]) + 5] ^= 1
    path.write_bytes(content)
    (tmp_path / "val-00000.tar").unlink()
    assert run(form, tmp_path) == 1
    err = capsys.readouterr().err
    assert "error: train-00001.tar is damaged" in err
    assert "sample 260 (number 4 of 256 in the shard)" in err
    assert "error: val-00000.tar is missing" in err
    (tmp_path / "empty").mkdir()
    assert run(form, tmp_path / "empty") == 1
    assert "contains no dataset" in capsys.readouterr().err


# --- folder ---


def picture(path, size=(12, 12), colour=(200, 100, 50), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def test_folder(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    picture(source / "cat" / "a.png")
    picture(source / "cat" / "a.jpg", colour=(10, 20, 30), quality=95)  # the same stem
    picture(source / "cat" / "deeper" / "b.PNG", colour=(0, 255, 0))
    picture(source / "dog" / "grey.png", mode="L", colour=90)
    picture(source / "dog" / "clear.png", mode="RGBA", colour=(0, 0, 0, 0))
    (source / "dog" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    whole = (source / "cat" / "a.png").read_bytes()
    (source / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (source / "dog" / "notes.txt").write_text("not an image")
    (source / "dog" / "._hidden.png").write_bytes(b"")
    assert run("folder", "--source", source, "--size", 8, "--out", out, "--val-fraction", 0) == 0
    report = capsys.readouterr().out
    assert "skipped 2 unreadable files" in report
    assert "broken.jpg" in report
    assert "cut.png" in report
    store = Store(out)
    index = load_index(store, "train")
    assert (index.num_samples, index.class_names, index.shape) == (5, ("cat", "dog"), (3, 8, 8))
    images, labels = samples(store, index, range(5))
    got = sorted((int(label), *image[:, 4, 4].tolist()) for image, label in zip(images, labels, strict=True))
    assert got == [(0, 0, 255, 0), (0, 10, 20, 30), (0, 200, 100, 50), (1, 90, 90, 90), (1, 255, 255, 255)]


def test_folder_of_no_classes_grey_with_val(tmp_path):
    for i in range(20):
        picture(tmp_path / "source" / f"{i}.png", mode="L", colour=10 * i)
    arguments = ("folder", "--source", tmp_path / "source", "--size", 4, "--grey", "--val-fraction", 0.25)
    assert run(*arguments, "--out", tmp_path / "out") == 0
    store, seen = Store(tmp_path / "out"), []
    for split, count in (("train", 15), ("val", 5)):
        index = load_index(store, split)
        assert (index.num_samples, index.num_classes, index.shape) == (count, 0, (1, 4, 4))
        seen += samples(store, index, range(count))[0][:, 0, 0, 0].tolist()
    assert sorted(seen) == list(range(0, 200, 10))


def test_image_is_turned_reduced_and_cropped(tmp_path):
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, :50] = (255, 0, 0)
    pixels[:, 50:] = (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = load_image(tmp_path / "wide.png", 10)
    assert image.shape == (3, 10, 10)
    assert (image[:, 5, 1].tolist(), image[:, 5, 8].tolist()) == ([255, 0, 0], [0, 0, 255])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = load_image(tmp_path / "turned.png", 10)
    assert (image[:, 1, 5].tolist(), image[:, 8, 5].tolist()) == ([255, 0, 0], [0, 0, 255])
    assert load_image(tmp_path / "wide.png", 200).shape == (3, 200, 200)  # enlarged
    # Reduction by four is the mean of 4x4 pixels.
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    mean = noise.reshape(8, 4, 8, 4).mean((1, 3))
    assert np.abs(load_image(tmp_path / "noise.png", 8, grey=True)[0] - mean).max() <= 2
    wide = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(wide).save(tmp_path / "deep.png")  # 16 bits per pixel
    assert load_image(tmp_path / "deep.png", 16, grey=True)[0].ravel().tolist() == list(range(256))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([7, 8, 9] + [0] * 765)
    palette.save(tmp_path / "palette.png", transparency=1)
    assert load_image(tmp_path / "palette.png", 4)[:, 0, 0].tolist() == [7, 8, 9]


def test_folder_mistakes(tmp_path, capsys):
    def error(*arguments):
        code = run("folder", "--size", 4, "--out", tmp_path / "out", *arguments)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) == (1, 1)
        return lines[0]

    assert "is not a directory" in error("--source", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert "contains no image file" in error("--source", tmp_path / "empty")
    picture(tmp_path / "mixed" / "a" / "x.png")
    picture(tmp_path / "mixed" / "y.png")
    assert "images of no class" in error("--source", tmp_path / "mixed")
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "x.png").write_bytes(b"nothing")
    assert "none of the 1 images could be read" in error("--source", tmp_path / "broken")
    with pytest.raises(SystemExit) as caught:
        run("folder", "--source", tmp_path, "--size", 0, "--out", tmp_path / "out")
    assert caught.value.code == 2
    assert "size: got 0" in capsys.readouterr().err


def test_linked_folders_are_followed_once(tmp_path):
    picture(tmp_path / "real" / "x.png")
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "b").symlink_to(tmp_path / "real")
    (tmp_path / "source" / "a" / "loop").symlink_to(tmp_path / "source")
    picture(tmp_path / "source" / "a" / "y.png")
    assert sources._images(tmp_path / "source") == ["a/y.png", "b/x.png"]


def test_what_a_folder_holds_beside_images_is_counted(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    for i, suffix in enumerate(("png", "webp", "tif", "gif", "bmp", "jfif")):
        options = {"format": "jpeg"} if suffix == "jfif" else {}
        picture(source / "ab"[i % 2] / f"{i}.{suffix}", **options)
    for folder in (".git", ".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        picture(source / folder / "x.png")
    (source / "a" / "IMG.HEIC").write_bytes(b"")
    (source / "a" / "loop.png").symlink_to("loop.png")
    (source / "b" / "directory.png").mkdir()
    assert run("folder", "--source", source, "--size", 8, "--val-fraction", 0, "--out", out) == 0
    said = capsys.readouterr().out
    assert "not images that can be read: 1 .heic" in said
    assert "hidden and system folders, skipped: 1 " in said
    assert "skipped 1 unreadable files:" in said  # the link to itself
    index = load_index(Store(out), "train")
    assert (index.num_samples, index.class_names) == (6, ("a", "b"))


def test_an_animation_gives_its_first_frame_and_a_strip_its_centre(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "x.gif", 8)[:, 4, 4].tolist() == [255, 0, 0]
    Image.new("L", (1, 65_000), 7).save(tmp_path / "strip.png")  # would be 64 x 4,160,000 pixels
    assert (load_image(tmp_path / "strip.png", 64, grey=True) == 7).all()


def test_a_class_that_would_vanish_is_refused(tmp_path, capsys):
    picture(tmp_path / "source" / "b" / "x.png")
    (tmp_path / "source" / "a").mkdir()
    (tmp_path / "source" / "a" / "x.heic").write_bytes(b"")
    assert run("folder", "--source", tmp_path / "source", "--size", 8, "--out", tmp_path / "out") == 1
    assert "the class folders a contain no image that can be read" in capsys.readouterr().err


def test_an_unreadable_disk_is_not_an_unreadable_image(tmp_path, capsys, monkeypatch):
    picture(tmp_path / "source" / "x.png")

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    assert run("folder", "--source", tmp_path / "source", "--size", 8, "--out", tmp_path / "out") == 1
    assert "Input/output error" in capsys.readouterr().err


def test_labels_from_names(tmp_path, capsys):
    for name in ("cat_1.png", "cat_2.png", "n01440764_10.png"):
        picture(tmp_path / "source" / name)
    arguments = ("folder", "--source", tmp_path / "source", "--size", 8, "--labels-from-names", "--val-fraction", 0)
    assert run(*arguments, "--out", tmp_path / "out") == 0
    index = load_index(Store(tmp_path / "out"), "train")
    assert (index.class_names, sorted(index.label.tolist())) == (("cat", "n01440764"), [0, 0, 1])
    picture(tmp_path / "source" / "3.png")
    assert run(*arguments, "--out", tmp_path / "other") == 1
    assert "labels_from_names: got 3.png, expected names" in capsys.readouterr().err


def test_a_val_split_of_its_own(tmp_path, capsys):
    for split, count in (("train", 6), ("val", 4)):
        for i in range(count):
            picture(tmp_path / split / "ab"[i % 2] / f"{i}.png", colour=(10 * i, 0, 0))
    arguments = ("folder", "--source", tmp_path / "train", "--val-source", tmp_path / "val", "--size", 8)
    assert run(*arguments, "--out", tmp_path / "out") == 0
    counts = [load_index(Store(tmp_path / "out"), split).num_samples for split in ("train", "val")]
    assert counts == [6, 4]
    picture(tmp_path / "val" / "c" / "x.png")
    assert run(*arguments, "--out", tmp_path / "other") == 1
    assert "val_source: got other classes than" in capsys.readouterr().err


# --- imagenet64 ---


def batches(directory, compressed=False, per_file=7):
    """Write short files in the official format; return the images [N, 3, 64, 64] and classes by split."""
    directory.mkdir()
    rng, save = np.random.default_rng(0), np.savez_compressed if compressed else np.savez
    made = {"train": ([], []), "val": ([], [])}
    for name in [f"train_data_batch_{i}" for i in range(1, 11)] + ["val_data"]:
        data = rng.integers(0, 256, (per_file, 12288), dtype=np.uint8)
        labels = rng.integers(1, 1001, per_file)
        labels[:2] = 1, 1000
        extra = {"mean": np.zeros(12288)} if name.startswith("train") else {}
        save(directory / f"{name}.npz", data=data, labels=labels, **extra)
        images, classes = made["train" if extra else "val"]
        images.append(data.reshape(-1, 3, 64, 64))
        classes.append(labels - 1)
    return {split: (np.concatenate(a), np.concatenate(b)) for split, (a, b) in made.items()}


@pytest.mark.parametrize("compressed", [False, True])
def test_imagenet64(tmp_path, compressed):
    made = batches(tmp_path / "npz", compressed)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    arguments = ("--source", tmp_path / "npz", "--scratch", scratch, "--shard-size", 16)
    assert run("imagenet64", *arguments, "--out", tmp_path / "out") == 0
    assert list(scratch.iterdir()) == []
    store = Store(tmp_path / "out")
    for split, (images, classes) in made.items():
        index = load_index(store, split)
        assert (index.num_samples, index.num_classes, index.shape) == (len(images), 1000, (3, 64, 64))
        got, labels = samples(store, index, range(len(images)))
        assert not np.array_equal(labels, classes)  # shuffled
        pairs = sorted((image.numpy().tobytes(), int(label)) for image, label in zip(got, labels, strict=True))
        assert pairs == sorted((image.tobytes(), int(label)) for image, label in zip(images, classes, strict=True))


def _replace(**changes):
    def damage(path):
        with np.load(path) as archive:
            arrays = {"data": archive["data"], "labels": archive["labels"], **changes}
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_replace(labels=np.arange(7)), "labels: expected whole numbers from 1 to 1000"),
        (_replace(labels=np.full(7, 1001)), "labels: expected whole numbers from 1 to 1000"),
        (_replace(labels=np.ones(7)), "labels: expected whole numbers from 1 to 1000"),
        (_replace(labels=np.ones(6, int)), r"data: got uint8 [7, 12288], expected uint8 [6, 12288]"),
        (_replace(data=np.zeros((7, 3072), np.uint8)), "data: got uint8 [7, 3072]"),
        (_replace(data=np.zeros((7, 12288), np.float32)), "data: got float32"),
        (_replace(data=None), "There is no item named 'data.npy' in the archive"),
        (_replace(labels=np.array([{}] * 7)), "Object arrays"),
        (_replace(data=np.array([{}] * 7)), "Python objects"),
        (lambda path: os.truncate(path, 5000), "train_data_batch_3.npz"),
        (lambda path: path.unlink(), "lacks train_data_batch_3.npz"),
    ],
)
def test_imagenet64_mistakes(tmp_path, capsys, damage, message):
    batches(tmp_path / "npz")
    damage(tmp_path / "npz" / "train_data_batch_3.npz")
    assert run("imagenet64", "--source", tmp_path / "npz", "--out", tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "train_data_batch_3.npz" in line


def test_imagenet64_damaged_source(tmp_path, capsys):
    batches(tmp_path / "npz")
    path = tmp_path / "npz" / "val_data.npz"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    assert run("imagenet64", "--source", tmp_path / "npz", "--out", tmp_path / "out") == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert "val_data.npz: Bad CRC-32" in err


# --- the command ---


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "pipeline.prepare"]
    help_text = subprocess.check_output([*command, "--help"], text=True)
    for word in ("digits", "imagenet64", "folder", "--verify URL"):
        assert word in help_text
    (tmp_path / "file").write_text("")
    failed = subprocess.run([*command, "digits", "--out", str(tmp_path / "file")], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


@pytest.mark.s3
def test_straight_to_s3(s3, tmp_path):
    assert run("digits", "--out", "s3://train/prepared", "--storage.endpoint-url", s3) == 0
    assert run("digits", "--out", tmp_path / "local") == 0
    store = Store("s3://train/prepared", StorageConfig(s3))
    assert {name: store.read(name) for name in store.list()} == contents(tmp_path / "local")
    assert run("--verify", "s3://train/prepared", "--storage.endpoint-url", s3) == 0
    store.write("train-00000.tar", b"")
    assert run("--verify", "s3://train/prepared", "--storage.endpoint-url", s3) == 1
    assert run("digits", "--out", "s3://no-such-bucket/x", "--storage.endpoint-url", s3) == 1
