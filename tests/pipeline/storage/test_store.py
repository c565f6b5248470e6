"""Storage: every operation on a directory, in memory and on a real S3 server, with and without faults."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import small_disk
from s3 import FAULTS, KEY, SECRET, FaultProxy, credentials, s3  # noqa: F401

from pipeline.masking import carries_credentials, mask
from pipeline.storage import backends
from pipeline.storage.backends import StorageConfig
from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request, tmp_path):
    where = request.node.name.replace("[", "-").rstrip("]")
    if request.param == "local":
        return Store(tmp_path / "store")
    if request.param == "memory":
        return Store(f"memory://{where}")
    return Store(f"s3://train/{where}", StorageConfig(request.getfixturevalue("s3"), deadline_s=20))


def test_operations(store):
    store.check(write=True, once=True)
    assert store.list() == []
    assert not store.exists("a")
    store.write("a", b"old")
    store.write("a", b"new")
    store.write("d/e/f", b"")
    store.write("d/e2", b"12345")
    assert store.read("a") == b"new"
    assert store.read("d/e/f") == b""
    assert store.list() == ["a", "d/e/f", "d/e2"]
    assert store.list("d/e") == ["d/e/f", "d/e2"]
    assert store.list("d/e/") == ["d/e/f"]
    assert store.list("x/y") == []
    assert (store.size("d/e2"), store.exists("d/e2")) == (5, True)
    assert store.child("d").read("e2") == b"12345"
    store.delete("a")
    store.delete("a")
    assert store.list() == ["d/e/f", "d/e2"]


def test_create_only_if_absent(store):
    assert store.create("k", b"first")
    assert not store.create("k", b"second")
    assert store.create("k", b"first")  # as after a lost reply
    assert store.read("k") == b"first"


def test_missing_names(store, tmp_path):
    for operation in (store.read, store.size, lambda name: store.download(name, tmp_path / "copy")):
        with pytest.raises(FileNotFoundError, match="nothing"):
            operation("nothing")


def test_download_and_hashes(store, tmp_path):
    data = os.urandom(9 << 20)
    import hashlib

    right, wrong = hashlib.sha256(data).hexdigest(), hashlib.sha256(b"").hexdigest()
    store.write("big", data)
    store.download("big", tmp_path / "copy", right)
    assert (tmp_path / "copy").read_bytes() == data
    assert store.read("big", right) == data
    with pytest.raises(StorageError, match="damaged in the store"):
        store.read("big", wrong)


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a//b", "a/"])
def test_names_that_leave_the_store(name, tmp_path):
    with pytest.raises(ValueError, match="storage name"):
        Store(tmp_path).read(name)


def test_race_has_one_winner(store):
    start, won = threading.Barrier(12), []

    def compete(number):
        start.wait()
        won.append(store.create("race", f"attempt {number}".encode()))

    threads = [threading.Thread(target=compete, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 11 + [True]


def test_url_forms(tmp_path, monkeypatch):
    Store(f"file://{tmp_path}/x").write("k", b"1")
    monkeypatch.chdir(tmp_path)
    assert Store("x").read("k") == b"1"
    assert Store("x/").child("y").url == "x/y"
    assert [Store(url).child("y").url for url in ("/", "file:///", "memory://")] == ["/y", "file:///y", "memory://y"]
    for url in ("s3://", "s3://key:pass@bucket/x", "ftp://user:pass@host/x", "nosuchscheme://x"):
        with pytest.raises(ValueError, match="storage URL") as caught:
            Store(url)
        assert "pass" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://me:hunter2@host:1/x", "http://***@host:1/x"),
        ("postgresql://me:p@hunter2@host/db", "postgresql://***@host/db"),
        ("postgresql://me:p/hunter2@host/db", "postgresql://***@host/db"),
        ("https://hunter2@host/x", "https://***@host/x"),
        ("https://host/x?sig=hunter2&part=1", "https://host/x?sig=***&part=1"),
        ("https://host/x?X-Amz-Signature=hunter2", "https://host/x?X-Amz-Signature=***"),
        ("mysql://host/db?password=hunter2", "mysql://host/db?password=***"),
    ],
)
def test_credentials_are_masked_and_refused(text, masked):
    assert mask(text) == masked
    assert carries_credentials(text)


def test_what_only_looks_like_credentials_is_none():
    for url in (
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://b/a@b/c",
        "/data/tokens=4096/x",
        "sftp://me@h/x",
        "http://h:80/x@y",
    ):
        assert not carries_credentials(url)
    assert mask("s3://b/a@b/c: 404 at 10:30") == "s3://b/a@b/c: 404 at 10:30"


def test_a_store_that_overwrites_is_for_data_only(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    real = MemoryFileSystem.pipe_file
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value, mode="": real(self, path, value))
    store = Store("memory://overwrites")
    store.check(write=True)
    with pytest.raises(StorageError, match="overwrites what must be created once"):
        store.check(write=True, once=True)
    assert not store._backend.names("")


def test_folders_that_cannot_be_read_are_no_empty_ones(tmp_path, monkeypatch):
    store = Store(tmp_path, StorageConfig(deadline_s=1.0))
    store.write("log/1", b"")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "private").mkdir()
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) in ("lost+found", "private"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert store.list("log/") == store.list("lo") == ["log/1"]
    with pytest.raises(StorageError, match=r"private.*check the owner"):
        store.list()


def test_config_refuses_secrets():
    with pytest.raises(ValueError, match="carries credentials") as caught:
        StorageConfig("http://user:hunter2@host:9000")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match=r"--storage\.endpoint-url"):
        StorageConfig("host:9000")
    with pytest.raises(ValueError, match=r"--storage\.deadline-s: got 0, expected a number above 0"):
        StorageConfig(deadline_s=0)


def test_readers_never_see_half(tmp_path):
    store, stop = Store(tmp_path), threading.Event()
    values = {bytes([c]) * 1_000_000 for c in b"ab"}
    store.write("k", next(iter(values)))

    def write():
        while not stop.is_set():
            for value in values:
                store.write("k", value)

    thread = threading.Thread(target=write)
    thread.start()
    seen = {store.read("k") for _ in range(100)}
    stop.set()
    thread.join()
    assert seen <= values


def test_temporaries_are_hidden_and_swept(tmp_path):
    old, new = tmp_path / f".{0:016x}.tmp", tmp_path / f".{1:016x}.tmp"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    store = Store(tmp_path)
    assert store.list() == []
    store.write("k", b"1")
    assert (old.exists(), new.exists(), store.list()) == (False, True, ["k"])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_errors_fail_at_once(tmp_path, monkeypatch, code):
    store = Store(tmp_path)
    store.write("k", b"good")

    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(backends.os, "fsync", fsync)
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot write .*/k: .*(full|read-only|permission)") as caught:
        store.write("k", b"new")
    assert caught.value.errno == code
    assert time.monotonic() - start < 5
    assert (store.read("k"), [path.name for path in tmp_path.iterdir()]) == (b"good", ["k"])


def test_full_disk(disk):
    store = Store(disk)
    store.write("k", b"good")
    with pytest.raises(StorageError, match="the disk is full"):
        store.write("k", bytes(2 << 20))
    source = Store(f"memory://{disk}")
    source.write("k", bytes(2 << 20))
    with pytest.raises(StorageError, match="the disk is full"):
        source.download("k", disk / "copy")
    (disk / "copy").unlink()
    assert (store.read("k"), store.list()) == (b"good", ["k"])


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path, "1m") as disk:
        yield disk


def test_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="is a file"):
        Store(tmp_path / "file" / "x").check(write=True)
    with pytest.raises(StorageError, match="not a readable directory"):
        Store(tmp_path / "missing").check(write=False)


def test_transient_local_error_is_tried_again(tmp_path, monkeypatch, caplog):
    store, fail = Store(tmp_path), [OSError(errno.EIO, "flaky"), OSError(errno.ESTALE, "flaky")]
    real = os.replace

    def replace(*paths):
        if fail:
            raise fail.pop()
        real(*paths)

    monkeypatch.setattr(backends.os, "replace", replace)
    store.write("k", b"1")
    assert store.read("k") == b"1"
    assert len([r for r in caplog.records if "retrying" in r.message]) == 1  # one line per burst


def test_import_is_light():
    code = "import sys, pipeline.storage; print({'fsspec', 's3fs', 'numpy', 'asyncio'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.s3
def test_s3_survives_faults(s3):  # noqa: F811
    with FaultProxy(s3, rate=0.3, seed=1) as proxy:
        proxy.stall_s = 2.0
        store = Store("s3://train/faults", StorageConfig(proxy.url, deadline_s=60))
        store._backend.patience = 1.0
        for i in range(8):
            data = os.urandom(30_000)
            store.write(f"w{i}", data)
            assert store.read(f"w{i}") == data
            assert store.create(f"c{i}", data)
            assert not store.create(f"c{i}", data[1:])
            assert store.size(f"c{i}") == len(data)
            store.delete(f"c{i}")
        assert store.list() == [f"w{i}" for i in range(8)]
        assert sum(proxy.counts[fault] for fault in FAULTS) > 10


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["truncate", "short", "flip"])
def test_s3_damage_in_transit_is_seen(s3, fault, tmp_path):  # noqa: F811
    data = os.urandom(100_000)
    Store("s3://train/transit", StorageConfig(s3)).write(fault, data)
    with FaultProxy(s3, rate=0.6, seed=2, faults=[fault]) as proxy:
        store = Store("s3://train/transit", StorageConfig(proxy.url, deadline_s=60))
        for _ in range(5):
            store.download(fault, tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == data
        assert proxy.counts[fault] > 0


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["500", "reset", "stall", "short"])
def test_s3_gives_up_at_its_deadline(s3, fault):  # noqa: F811
    Store("s3://train/endless", StorageConfig(s3)).write("k", b"0123456789")
    with FaultProxy(s3, rate=1.0, faults=[fault]) as proxy:
        store = Store("s3://train/endless", StorageConfig(proxy.url, deadline_s=2))
        start = time.monotonic()
        with pytest.raises(StorageError, match="gave up after"):
            store.read("k")
        assert time.monotonic() - start < 10


@pytest.mark.s3
def test_s3_lost_reply_that_won(s3):  # noqa: F811
    class Losing(FaultProxy):
        async def _handle(self, request):
            self.rate = float(self.counts["lost"] == 0)
            return await super()._handle(request)

    with Losing(s3, faults=["lost"]) as proxy:
        store = Store("s3://train/lost", StorageConfig(proxy.url, deadline_s=30))
        assert store.create("k", b"mine")
        assert proxy.counts["lost"] == 1
        assert not store.create("k", b"other")


@pytest.mark.s3
@pytest.mark.parametrize(
    ("key", "secret", "url", "advice"),
    [
        ("nobody", SECRET, "s3://train/x", "does not know this access key"),
        (KEY, "wrong-secret", "s3://train/x", "the secret key is wrong"),
        (None, None, "s3://train/x", "no credentials were found"),
        (KEY, SECRET, "s3://no-such-bucket/x", "create the bucket"),
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_s3_hopeless_fails_with_advice(s3, key, secret, url, advice, write):  # noqa: F811
    backends._s3_filesystem.cache_clear()
    try:
        with credentials(key, secret):
            start = time.monotonic()
            with pytest.raises(StorageError, match=advice) as caught:
                Store(url, StorageConfig(s3)).check(write=write)
    finally:
        backends._s3_filesystem.cache_clear()
    assert time.monotonic() - start < 10
    for text in (SECRET, "wrong-secret"):
        assert text not in str(caught.value)


@pytest.mark.s3
def test_s3_credentials_may_take_longer_than_a_request(s3, tmp_path, monkeypatch):  # noqa: F811
    given = json.dumps({"Version": 1, "AccessKeyId": KEY, "SecretAccessKey": SECRET})
    program, config = tmp_path / "program", tmp_path / "config"
    program.write_text(f"#!/bin/sh\nsleep 4\necho '{given}'\n")
    program.chmod(0o755)
    config.write_text(f"[profile slow]\ncredential_process = {program}\nregion = us-east-1\n")
    with credentials(None, None):
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        Store("s3://train", StorageConfig(s3, profile="slow")).check(write=True, once=True)


def test_s3_unknown_profile_and_dead_endpoint():
    with credentials(KEY, SECRET):
        with pytest.raises(StorageError, match="choose a profile"):
            Store("s3://train/x", StorageConfig("http://127.0.0.1:9", profile="nobody")).check(write=False)
        with pytest.raises(StorageError, match="check that the server is up"):
            Store("s3://train/x", StorageConfig("http://127.0.0.1:9", deadline_s=2)).read("k")


def _read_in_child(url, endpoint, queue):
    queue.put(Store(url, StorageConfig(endpoint, deadline_s=20)).read("k"))


@pytest.mark.s3
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_s3_after_fork(s3):  # noqa: F811
    store = Store("s3://train/fork", StorageConfig(s3, deadline_s=20))
    store.write("k", b"1")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(store.url, s3, queue))
    child.start()
    assert queue.get(timeout=30) == b"1"
    child.join(30)
    assert store.read("k") == b"1"


@pytest.mark.s3
def test_s3_large_object_survives_faults(s3):  # noqa: F811
    """Eight requests that must all succeed, each failing with probability 1/2."""
    data = os.urandom(1 << 20) * 100
    with FaultProxy(s3, rate=0.5, seed=3, faults=["500", "reset", "lost", "stall"]) as proxy:
        proxy.stall_s = 0.2
        store = Store("s3://ckpt/parts", StorageConfig(proxy.url, deadline_s=300))
        for name in "ab":
            store.write(name, memoryview(data))
    assert all(Store("s3://ckpt/parts", StorageConfig(s3)).read(name) == data for name in "ab")


@pytest.mark.s3
def test_s3_upload_whose_last_reply_is_lost(s3):  # noqa: F811
    class Losing(FaultProxy):
        lost = False

        async def _handle(self, request):
            finishing = request.method == "POST" and "uploadId" in request.query and not self.lost
            self.rate, self.lost = float(finishing), self.lost or finishing
            return await super()._handle(request)

    data = os.urandom(1 << 20) * 40
    with Losing(s3, rate=0, faults=["lost"]) as proxy:
        store = Store("s3://ckpt/last", StorageConfig(proxy.url, deadline_s=60))
        store.write("k", data)
        assert proxy.counts["lost"] == 1
        assert store.read("k") == data


@pytest.mark.s3
def test_s3_large_objects(s3, tmp_path):  # noqa: F811
    store = Store("s3://ckpt/large", StorageConfig(s3, deadline_s=60))
    data = os.urandom(1 << 20) * 101  # more than one part
    store.write("k", data)
    assert store.size("k") == len(data)
    store.download("k", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert not store.create("k", data + b"1")
