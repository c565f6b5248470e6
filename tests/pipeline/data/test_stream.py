"""The stream: the same samples in the same order whatever happens, and all damage is detected."""

import errno
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import small_disk
from readers import sample_order, samples
from s3 import FaultProxy

from pipeline.data import cache as cache_module
from pipeline.data.cache import Cache
from pipeline.data.order import Order, epoch_digests, expected_digest, permutation
from pipeline.data.shards import index_json, load_index, pack_shard
from pipeline.data.stream import Reader, stream
from pipeline.storage.backends import StorageConfig
from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store

COUNTS = (7, 10, 1, 13, 9, 4, 6)  # samples of each shard
TOTAL = sum(COUNTS)
PINNED = [47, 46, 13, 16, 12, 44]  # sample_order(seed 0, epoch 0, window 2)[:6]


def images_of(shape, total=TOTAL):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (total, *shape), dtype=np.uint8), rng.integers(0, 5, total)


def write_dataset(store, shape=(3, 5, 4), encoding="raw", counts=COUNTS):
    images, labels = images_of(shape, sum(counts))
    entries, start = [], 0
    for number, count in enumerate(counts):
        ids = range(start, start + count)
        content, entry = pack_shard([(f"{i:09d}", images[i], labels[i]) for i in ids], encoding)
        store.write(f"train-{number:05d}.tar", content)
        entries.append({"name": f"train-{number:05d}.tar", **entry})
        start += count
    index = index_json(
        entries,
        split="train",
        source="test",
        recipe="r",
        encoding=encoding,
        shape=shape,
        class_names=list("abcde"),
    )
    store.write("train.index.json", index)
    return load_index(store, "train")


@pytest.fixture
def local(tmp_path):
    store = Store(tmp_path / "data")
    return store, write_dataset(store)


@pytest.fixture
def remote(request):
    """Yield a store that is not a directory, so that shards go through the cache."""
    store = Store(f"memory://{request.node.name}")
    return store, write_dataset(store)


def take(store, index, batches, position=0, batch_size=11, **options):
    """Return a stream's first batches, after checking their images."""
    images, labels = images_of(index.shape)
    iterator = stream(store, index, seed=3, position=position, batch_size=batch_size, window=2, **options)
    taken = list(itertools.islice(iterator, batches))
    iterator.close()
    for batch in taken:
        assert np.array_equal(batch.images.numpy(), images[batch.ids])
        assert np.array_equal(batch.labels.numpy(), labels[batch.ids])
    return taken


def ids_of(batches):
    return [batch.ids.tolist() for batch in batches]


def joined(ranks):
    """Merge the slices that each rank saw into global batches."""
    return [list(itertools.chain(*slices)) for slices in zip(*ranks, strict=True)]


# --- index and order ---


def test_index(local):
    _, index = local
    assert (index.num_samples, index.num_classes, index.shape) == (TOTAL, 5, (3, 5, 4))
    assert index.starts.tolist() == [0, *np.cumsum(COUNTS)]
    assert index.shard_of(np.array([0, 6, 7, 17, 18, TOTAL - 1])).tolist() == [0, 0, 1, 2, 3, 6]
    assert len(index.digest) == 32


def test_missing_and_damaged_index(local):
    store, _ = local
    with pytest.raises(FileNotFoundError, match=r"pipeline\.prepare"):
        load_index(store, "val")
    whole = store.read("train.index.json")
    changed = whole.replace(b'"label":[', b'"label":[9', 1)
    for damaged in (whole[:-20], changed, b"", b"[]", b"{}", b"\xff" + whole):
        store.write("train.index.json", damaged)
        with pytest.raises(StorageError, match=r"train.index.json at .* is damaged"):
            load_index(store, "train")


@pytest.mark.parametrize("name", ["../x.tar", "/x.tar", "a/../../x.tar", ".x", "", 5])
@pytest.mark.parametrize("field", ["name", "sha256"])
def test_an_index_names_no_file_elsewhere(tmp_path, field, name):
    """A digest proves nothing here: whoever writes a hostile index can compute it."""
    store = Store(tmp_path / "data")
    write_dataset(store)
    content = json.loads(store.read("train.index.json"))
    content["shards"][2][field] = name
    entries = content.pop("shards")
    del content["digest"], content["format"]
    store.write("train.index.json", index_json(entries, **content))
    for check in (True, False):
        with pytest.raises(StorageError, match=r"train.index.json at .* is damaged"):
            load_index(store, "train", check)


def test_an_index_is_hashed_as_its_bytes(local):
    store, index = local
    whole = store.read("train.index.json")
    assert load_index(store, "train", check=False).digest == index.digest
    for wrong in (whole.replace(b'"a"', b'"z"'), whole.replace(b",", b", ", 1), whole + b"\n"):
        store.write("train.index.json", wrong)
        with pytest.raises(StorageError, match="digest does not match"):
            load_index(store, "train")
        assert load_index(store, "train", check=False).digest == index.digest
    for name in ('"digest":"', f'"digest":"{"0" * 32}",'):  # as a class's name
        entries = json.loads(whole)["shards"]
        properties = {"split": "train", "source": "test", "recipe": "r", "encoding": "raw", "shape": (3, 5, 4)}
        store.write("train.index.json", index_json(entries, **properties, class_names=[name]))
        assert load_index(store, "train").class_names == (name,)


def test_order_is_a_shuffle_of_its_own(local):
    _, index = local
    orders = [sample_order(index, seed, epoch, 2) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(TOTAL))
    assert len({tuple(order) for order in orders}) == 4
    # Never change these numbers: no run could resume correctly.
    assert orders[0][:6].tolist() == PINNED
    shards = index.shard_of(sample_order(index, 0, 0, 1))
    assert len(list(itertools.groupby(shards))) == len(COUNTS)  # window 1: shard after shard


def test_permutation_is_uniform():
    firsts = np.bincount([permutation(5, "test", seed)[0] for seed in range(5000)])
    assert np.all(np.abs(firsts - 1000) < 150)


# --- the sequence ---


def test_sequence_is_the_order(local):
    store, index = local
    batches = take(store, index, 15)
    sequence = np.concatenate([sample_order(index, 3, epoch, 2) for epoch in range(4)])
    assert np.concatenate(ids_of(batches)).tolist() == sequence[: 15 * 11].tolist()
    assert np.concatenate([batch.index for batch in batches]).tolist() == list(range(15 * 11))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("position", [0, 5, 47, 50 * 11])
def test_any_world_sees_the_same(local, world, position):
    store, index = local
    whole = ids_of(take(store, index, 8, position))
    cuts = [round(11 * rank / world) for rank in range(world + 1)]  # uneven slices
    parts = [ids_of(take(store, index, 8, position, lo=lo, hi=hi)) for lo, hi in itertools.pairwise(cuts)]
    assert joined(parts) == whole


def test_ranks_begin_with_different_shards(local):
    """Ranks start with different shards of a window, so that ranks sharing a cache do not wait for one download."""
    _, index = local
    order = Order(index, seed=0, window=3)
    plans = [order.shards_from(0, turn=rank / 3) for rank in range(3)]
    for window in (slice(0, 3), slice(3, 6)):
        assert len({plan[window][0] for plan in plans}) == 3
        assert {frozenset(plan[window]) for plan in plans} == {frozenset(plans[0][window])}


@pytest.mark.parametrize("workers", [1, 3, 5])
@pytest.mark.parametrize("ahead", [1, 7])
def test_any_number_of_workers_sees_the_same(local, workers, ahead):
    store, index = local
    assert ids_of(take(store, index, 12, workers=workers, ahead=ahead)) == ids_of(take(store, index, 12))


def test_resuming_on_other_worlds(local):
    store, index = local
    whole, position, seen = take(store, index, 9), 0, []
    for batches, cuts in ((2, [0, 11]), (3, [0, 4, 11]), (4, [0, 3, 3, 11])):
        ranks = [ids_of(take(store, index, batches, position, lo=lo, hi=hi)) for lo, hi in itertools.pairwise(cuts)]
        seen += joined(ranks)
        position += batches * 11
    assert seen == ids_of(whole)


def test_batch_longer_than_the_dataset(local):
    store, index = local
    (batch,) = take(store, index, 1, batch_size=3 * TOTAL + 1)
    assert np.bincount(batch.ids[: 3 * TOTAL]).tolist() == [3] * TOTAL


def test_cold_warm_and_no_cache_see_the_same(remote, tmp_path):
    store, index = remote
    cache = Cache(tmp_path / "cache", 1 << 20)
    bare = ids_of(take(store, index, 12))
    assert ids_of(take(store, index, 12, cache=cache)) == bare
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(COUNTS)
    assert ids_of(take(store, index, 12, cache=cache)) == bare


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 5)])
def test_encodings(tmp_path, encoding, shape):
    store = Store(tmp_path)
    take(store, write_dataset(store, shape, encoding), 5)


def test_samples_in_the_order_asked_for(local, remote, tmp_path):
    images, labels = images_of((3, 5, 4))
    ids = [TOTAL - 1, 0, 17, 0]
    for (store, index), cache in ((local, None), (remote, None), (remote, Cache(tmp_path / "c", 1 << 20))):
        got, classes = samples(store, index, ids, cache)
        assert np.array_equal(got.numpy(), images[ids])
        assert np.array_equal(classes.numpy(), labels[ids])
    assert samples(store, index, [])[0].shape == (0, 3, 5, 4)


def digests(index, batch):
    return epoch_digests(index, batch.index.numpy(), batch.ids.numpy())


def test_digest_adds_up_over_ranks_and_resumes(local):
    store, index = local
    sums: dict[int, int] = {}
    for lo, hi in ((0, 4), (4, 11)):
        for first, batches in ((0, 3), (33, 10)):
            for batch in take(store, index, batches, first, lo=lo, hi=hi):
                for epoch, part in digests(index, batch).items():
                    sums[epoch] = int(np.int64(np.uint64((sums.get(epoch, 0) + part) % 2**64)))
    assert 2 * TOTAL <= 13 * 11
    assert [sums[epoch] for epoch in (0, 1)] == [expected_digest(index, epoch) for epoch in (0, 1)]
    assert expected_digest(index, 0) != expected_digest(index, 1)
    (batch,) = take(store, index, 1, batch_size=TOTAL)
    batch.ids[3] = batch.ids[4]  # one sample twice, one never
    assert digests(index, batch)[0] != expected_digest(index, 0)


def test_wrong_arguments(local):
    store, index = local
    good = {"seed": 0, "position": 0, "batch_size": 8}
    for wrong in ({"lo": 5, "hi": 4}, {"hi": 9}):
        with pytest.raises(AssertionError):
            next(stream(store, index, **good, **wrong))
    with pytest.raises(ValueError, match="two windows"):
        next(stream(Store("memory://x"), index, **good, cache=Cache("unused", 1000)))


# --- threads ---


def test_closing_ends_the_threads(remote, tmp_path):
    store, index = remote
    before = set(threading.enumerate())
    iterator = stream(store, index, seed=0, position=0, batch_size=4, cache=Cache(tmp_path / "c", 1 << 20))
    next(iterator)
    started = set(threading.enumerate()) - before
    assert len(started) == 4
    iterator.close()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


def test_files_are_closed(local):
    store, index = local
    take(store, index, 3)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        take(store, index, 20)
    deadline = time.monotonic() + 10  # the last reader's threads may be at work still
    while len(os.listdir("/proc/self/fd")) > before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_s_error_reaches_the_consumer(remote):
    store, index = remote
    iterator = stream(store, index, seed=0, position=0, batch_size=2, window=1)
    next(iterator)
    for shard in index.shards:
        store.delete(shard.name)
    with pytest.raises(StorageError, match=r"train-0000..tar is missing"):
        list(itertools.islice(iterator, TOTAL))
    with pytest.raises(StopIteration):
        next(iterator)


# --- damage ---


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x20
    path.write_bytes(content)


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("where", ["image", "between"])
def test_flipped_byte(tmp_path, encoding, where):
    store = Store(tmp_path)
    index = write_dataset(store, encoding=encoding)
    flip(
        tmp_path / "train-00003.tar",
        int(index.offset[20]) + (index.size[20] - 1 if where == "image" else -512),
    )
    with pytest.raises(StorageError) as caught:
        take(store, index, 8)
    assert "train-00003.tar is damaged" in str(caught.value)
    assert "pipeline.prepare" in str(caught.value)
    assert ("sample 20 (number 2 of 13 in the shard)" in str(caught.value)) == (where == "image")


def test_truncated_shard(local):
    store, index = local
    path = store.local / "train-00003.tar"
    os.truncate(path, int(index.offset[25]) + 10)
    with pytest.raises(StorageError, match=r"train-00003.tar is damaged: sample 25 .* is truncated; the file has"):
        take(store, index, 8)
    path.unlink()
    with pytest.raises(StorageError, match=r"train-00003\.tar is missing"):
        take(store, index, 8)


def test_damage_after_opening(local):
    store, index = local
    reader = Reader(store, index)
    reader.read(np.arange(18, 31))
    flip(store.local / "train-00003.tar", int(index.offset[20]) + 130)
    reader.read(np.array([19]))
    with pytest.raises(StorageError, match=r"sample 20 .* checksum"):
        reader.read(np.array([19, 20]))
    os.truncate(store.local / "train-00003.tar", int(index.offset[24]))
    with pytest.raises(StorageError, match="is damaged"):
        reader.read(np.array([30]))
    reader.close()


def test_damaged_store_and_damaged_cache(remote, tmp_path, caplog):
    store, index = remote
    cache = Cache(tmp_path / "cache", 1 << 20)
    take(store, index, 6, cache=cache)
    cached = tmp_path / "cache" / f"{index.shards[3].sha256}.tar"
    flip(cached, 700)
    take(store, index, 6, cache=cache)  # fetched again
    assert "damaged: fetching it again" in caplog.text
    cached.unlink()
    content = bytearray(store.read("train-00003.tar"))
    content[700] ^= 1
    store.write("train-00003.tar", bytes(content))
    with pytest.raises(StorageError, match=r"train-00003.tar is damaged in the store"):
        take(store, index, 6, cache=cache)
    assert not list((tmp_path / "cache").glob("*.tmp"))


# --- the cache ---


def test_cache_keeps_its_bound(remote, tmp_path):
    store, index = remote
    sizes = [shard.bytes for shard in index.shards]
    cache = Cache(tmp_path / "cache", sum(sorted(sizes)[-4:]))
    assert cache.max_bytes < sum(sizes)
    seen = []
    real = cache._make_room

    def make_room(incoming):
        real(incoming)
        seen.append(incoming + sum(path.stat().st_size for path in cache.directory.glob("*.tar")))

    cache._make_room = make_room
    assert ids_of(take(store, index, 30, cache=cache)) == ids_of(take(store, index, 30))
    assert len(seen) > len(sizes)
    assert max(seen) <= cache.max_bytes


def test_cache_evicts_the_least_recently_used(remote, tmp_path):
    store, index = remote
    a, b, c = index.shards[:3]
    cache = Cache(tmp_path / "cache", a.bytes + b.bytes)
    for shard in (a, b, a, c):
        cache.open(store, shard)
        time.sleep(0.01)
    assert {path.stem for path in cache.directory.glob("*.tar")} == {a.sha256, c.sha256}


class Slow:
    """Make a store whose downloads are slow and counted."""

    def __init__(self, store, counter=None):
        self.store, self.local, self.counter = store, None, counter

    def download(self, name, path, sha256=None):
        content = self.store.read(name)
        with Path(path).open("wb") as file:
            for byte in content[:1024]:
                file.write(bytes([byte]))
                file.flush()
                time.sleep(0.0005)
            file.write(content[1024:])
        if self.counter is not None:
            with self.counter.get_lock():
                self.counter.value += 1

    def read(self, name, sha256=None):
        return self.store.read(name, sha256)


def _fill(root, directory, counter):
    store = Slow(Store(root), counter)
    cache = Cache(directory, 1 << 20)
    for shard in load_index(store.store, "train").shards:
        cache.open(store, shard)


def test_processes_share_a_cache(local, tmp_path):
    store, _ = local
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    arguments = (str(store.local), str(tmp_path / "cache"), counter)
    children = [context.Process(target=_fill, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert counter.value == len(COUNTS)  # each shard was fetched once
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(COUNTS)


def test_cache_after_kill(local, tmp_path):
    store, index = local
    directory = tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    for delay in (0.1, 0.4, 0.9):
        child = context.Process(target=_fill, args=(str(store.local), str(directory), None))
        child.start()
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert list(directory.glob("*.tmp"))  # the last one was killed while working
    take(Slow(store), index, 6, cache=Cache(directory, 1 << 20))
    assert not list(directory.glob("*.tmp"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_cache_that_cannot_be_written_is_bypassed(remote, tmp_path, monkeypatch, caplog, code):
    store, index = remote
    expected = ids_of(take(store, index, 12))

    def touch(self, **_):
        raise OSError(code, os.strerror(code))

    def slow(*arguments, warning=cache_module.log.warning):  # long enough for every thread to encounter it
        time.sleep(0.1)
        warning(*arguments)

    monkeypatch.setattr(cache_module.Path, "touch", touch)
    monkeypatch.setattr(cache_module.log, "warning", slow)
    assert ids_of(take(store, index, 12, cache=Cache(tmp_path / "cache", 1 << 20))) == expected
    assert caplog.text.count("is bypassed") == 1


def test_cache_on_a_full_disk(remote, tmp_path, caplog):
    store, index = remote
    with small_disk(tmp_path, "32k") as disk:
        expected = ids_of(take(store, index, 12))
        assert ids_of(take(store, index, 12, cache=Cache(disk / "cache", 1 << 20))) == expected
    assert caplog.text.count("the disk is full") == 1


# --- compatibility ---


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_webdataset_opens_the_shards(tmp_path, encoding):
    wds = pytest.importorskip("webdataset")
    store = Store(tmp_path)
    index = write_dataset(store, encoding=encoding)
    images, labels = images_of(index.shape)
    urls = [str(tmp_path / shard.name) for shard in index.shards]
    read = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("npy;png", "cls"))
    assert len(read) == TOTAL
    for i, (image, label) in enumerate(read):
        assert np.array_equal(image if encoding == "raw" else image.transpose(2, 0, 1), images[i])
        assert label == labels[i]


@pytest.mark.s3
def test_stream_from_s3_with_faults(s3, tmp_path):
    config = StorageConfig(s3, deadline_s=60)
    index = write_dataset(Store("s3://train/stream", config))
    expected = ids_of(take(Store("s3://train/stream", config), index, 8))
    with FaultProxy(s3, rate=0.3, seed=5) as proxy:
        store = Store("s3://train/stream", StorageConfig(proxy.url, deadline_s=60))
        store.backend.patience = 1.0
        cache = Cache(tmp_path / "cache", 1 << 20)
        assert load_index(store, "train").digest == index.digest
        assert ids_of(take(store, index, 8, cache=cache)) == expected
        assert ids_of(take(store, index, 8)) == expected
