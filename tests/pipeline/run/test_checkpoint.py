"""Checkpoints are complete or absent, verified when read, and committed by one attempt only."""

import json
import multiprocessing
import random
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import pytest
import safetensors.torch
import torch
from s3 import FaultProxy

from pipeline.run.checkpoint import Checkpoints, DamagedCheckpoint, PartFile, StaleAttempt, Writer
from pipeline.storage.backends import StorageConfig
from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store


def parts(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(8, 4, generator=generator), "b": torch.randn(4, generator=generator)},
        "progress": {"count": torch.tensor(step)},
    }


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[p][n], b[p][n]) for p in b for n in b[p]) and a.keys() == b.keys()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def checkpoints(request, tmp_path: Path) -> Checkpoints:
    if request.param == "local":
        return Checkpoints(Store(tmp_path / "run"))
    name = request.node.name.replace("[", "-").rstrip("]")
    return Checkpoints(Store(f"s3://ckpt/{name}", StorageConfig(request.getfixturevalue("s3"), deadline_s=300)))


def commit(checkpoints: Checkpoints, *steps: int, keep_last: int = 3, keep_every: int | None = None) -> None:
    writer = checkpoints.claim({})
    for step in steps:
        writer.save(step, parts(step), {"step": step}, keep_last, keep_every)
    writer.close()


def data_files(checkpoints: Checkpoints) -> list[str]:
    return checkpoints.store.list("data/")


def test_a_store_that_hides_what_was_written_ends_the_claim(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(Store(tmp_path / "run"))
    commit(checkpoints, 5)
    monkeypatch.setattr(Store, "list", lambda *_: [])
    with pytest.raises(StorageError, match=r"log/00000001\.json exists, but is not listed"):
        checkpoints.claim({})


def test_round_trip(checkpoints: Checkpoints) -> None:
    assert checkpoints.load() is None
    commit(checkpoints, 5)
    record, loaded = checkpoints.load()
    assert (record.step, record.meta) == (5, {"step": 5})
    assert same(loaded, parts(5))
    _, model_only = checkpoints.load(parts=("model",))
    assert model_only.keys() == {"model"}


def test_a_snapshot_is_of_the_moment(checkpoints: Checkpoints) -> None:
    writer = checkpoints.claim({})
    live, meta = parts(1), {"digests": {"0": 5}}
    go_on = threading.Event()
    writer.save(1, live, meta, 3, None, first=lambda: assert_(go_on.wait(60)))
    live["model"]["w"].zero_()  # training continues while the thread writes
    meta["digests"]["0"] += 7
    go_on.set()
    writer.close()
    record, loaded = checkpoints.load()
    assert same(loaded, parts(1))
    assert record.meta == {"digests": {"0": 5}}


def assert_(condition: bool) -> None:
    assert condition


def test_newest_is_the_last_committed_whatever_its_step(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 8)
    commit(checkpoints, 6)  # a resumed run that fell back
    assert checkpoints.load()[0].step == 6
    assert checkpoints.load(step=8)[0].step == 8
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; available steps: \[6, 8\]"):
        checkpoints.load(step=7)


def test_retention_keeps_the_last_and_the_multiples(checkpoints: Checkpoints) -> None:
    commit(checkpoints, *range(1, 12), keep_last=2, keep_every=5)
    kept = checkpoints.committed()
    assert [r.step for r in kept] == [5, 10, 11]
    assert len(data_files(checkpoints)) == len(kept) * 2
    for record in kept:
        assert same(checkpoints.load(step=record.step)[1], parts(record.step))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "record"])
def test_falls_back_to_the_checkpoint_before(checkpoints: Checkpoints, damage: str, capsys) -> None:
    commit(checkpoints, 1, 2)
    newest, store = checkpoints.load()[0], checkpoints.store
    if damage == "record":
        store.write(newest.name, b'{"kind": "checkpoi')
    else:
        file = f"data/{newest.parts['model']['file']}"
        content = bytearray(store.read(file))
        content[len(content) // 2] ^= 1
        if damage == "delete":
            store.delete(file)
        else:
            store.write(file, bytes(content[:-7] if damage == "truncate" else content))
    record, loaded = checkpoints.load()
    assert record.step == 1
    assert same(loaded, parts(1))
    said = "skipping it" if damage == "record" else "trying the checkpoint before it"
    assert said in capsys.readouterr().out


def test_no_flipped_byte_of_a_record_is_believed(tmp_path: Path) -> None:
    """Whatever happens to the newest record, the checkpoint before it is loaded, as it was."""
    checkpoints = Checkpoints(Store(tmp_path))
    commit(checkpoints, 1, 2)
    newest, rng = checkpoints.load()[0], random.Random(0)
    content = checkpoints.store.read(newest.name)
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        checkpoints.store.write(newest.name, bytes(damaged))
        record, loaded = checkpoints.load()
        # White space between its fields is not content.
        assert record == newest or (record.step == 1 and same(loaded, parts(1)))


def test_a_record_of_an_earlier_version_has_no_hash(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    commit(checkpoints, 1)
    newest = checkpoints.load()[0]
    content = json.loads(checkpoints.store.read(newest.name))
    del content["sha256"]
    checkpoints.store.write(newest.name, json.dumps(content).encode())
    assert checkpoints.load()[0] == newest


def test_all_damaged_is_an_error_that_names_them(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 1, 2)
    for name in data_files(checkpoints):
        checkpoints.store.write(name, b"x")
    with pytest.raises(DamagedCheckpoint, match=r"all 2 checkpoints are damaged.*step 2.*step 1"):
        checkpoints.load()


def test_a_reader_beside_training_takes_a_newer_one_for_what_retention_deletes(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 10, 17, keep_last=1, keep_every=10)
    writer, read_part = checkpoints.claim({}), checkpoints._read_part

    def later(record, part):
        if record.step == 17 and writer.records[-1].step != 18:
            writer.save(18, parts(18), {}, 1, 10)
            writer.wait()
        return read_part(record, part)

    checkpoints._read_part = later  # type: ignore[method-assign]
    assert checkpoints.load(parts=("model",))[0].step == 18
    writer.close()


def test_what_is_not_ours_and_a_broken_claim_are_passed_over(checkpoints: Checkpoints, capsys) -> None:
    checkpoints.store.write("log/notes.txt", b"mine")
    checkpoints.claim({}).close()
    checkpoints.store.write("log/00000002.json", b"")  # a crash on a store without atomic writes
    assert checkpoints.load() is None
    assert "00000002.json is not a checkpoint record" in capsys.readouterr().out
    commit(checkpoints, 1)
    assert checkpoints.load()[0].step == 1
    checkpoints.store.write(checkpoints.load()[0].name, b"x")
    with pytest.raises(DamagedCheckpoint, match="Start over"):
        checkpoints.load()


def test_a_stale_attempt_cannot_commit(checkpoints: Checkpoints) -> None:
    stale = checkpoints.claim({})
    stale.save(1, parts(1), {}, 1, None)
    stale.wait()
    commit(checkpoints, 2, 3, 4, keep_last=1)
    stale.save(9, parts(9), {}, 1, None)
    with pytest.raises(StaleAttempt, match="newer attempt"):
        stale.close()
    record, loaded = checkpoints.load()
    assert record.step == 4
    assert same(loaded, parts(4))
    commit(checkpoints, 5)  # its claim removes what the stale attempt left
    named = {e["file"] for r in checkpoints.records() for e in r.parts.values()}
    assert {name.removeprefix("data/") for name in data_files(checkpoints)} == named


def test_a_failed_save_is_noticed_and_ends_the_writer(checkpoints: Checkpoints) -> None:
    stale = checkpoints.claim({})
    stale.save(1, parts(1), {}, 1, None)
    stale.wait()
    stale.check()
    commit(checkpoints, 2)
    stale.save(3, parts(3), {}, 1, None)
    wait([stale._last])
    for again in (stale.check, stale.wait, lambda: stale.save(4, parts(4), {}, 1, None), stale.close):
        with pytest.raises(StaleAttempt, match="cannot commit step 3"):
            again()
    assert not [name for name in data_files(checkpoints) if "step-3" in name]  # it wrote nothing


def test_an_attempt_that_wakes_up_late_deletes_nothing_of_its_successor(checkpoints: Checkpoints) -> None:
    """A late cleanup and retention may run after the successor has written data but before it commits them."""
    commit(checkpoints, 1, 2)
    late = checkpoints.claim({})
    late.save(3, parts(3), {}, 9, None)
    late.wait()
    writing, go_on = threading.Event(), threading.Event()

    class Slow(Store):
        def create(self, name: str, data: bytes) -> bool:
            writing.set()  # the data is written, the record is not
            assert go_on.wait(60)
            return super().create(name, data)

    successor = checkpoints.claim({})
    successor.store = Slow(checkpoints.store.url, checkpoints.store.config)
    successor.save(3, parts(3), {}, 9, None)  # the same content
    assert writing.wait(60)
    before = data_files(checkpoints)
    checkpoints._sweep(next(r for r in checkpoints.records() if r.attempt == late.attempt))
    assert data_files(checkpoints) == before
    late._retain(1, None)
    late.records[:0] = [late.records[-1]]
    late._retain(1, None)  # even of its own checkpoint of that step
    go_on.set()
    successor.close()
    record, loaded = checkpoints.load()
    assert record.attempt == successor.attempt
    assert same(loaded, parts(3))


def test_files_are_safetensors(checkpoints: Checkpoints) -> None:
    dtypes = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
    state = {f"{dtype}": (torch.arange(5) % 3).to(dtype) for dtype in dtypes} | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "turned": torch.arange(12.0).view(3, 4).T,
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    file = PartFile(state)
    file.copy(state)
    loaded = safetensors.torch.load(bytes(file.data))
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_slow_store_holds_training_up_and_says_so(checkpoints: Checkpoints, capsys, monkeypatch) -> None:
    commit_ = Writer._commit
    monkeypatch.setattr(Writer, "_commit", lambda *a: (time.sleep(1.2), commit_(*a)))
    commit(checkpoints, 1, 2, 3)
    assert "training waited" in capsys.readouterr().out
    assert [r.step for r in checkpoints.committed()] == [1, 2, 3]  # every requested checkpoint


def test_of_racing_attempts_exactly_one_commits(checkpoints: Checkpoints) -> None:
    committed, refused = [], []
    barrier = threading.Barrier(6)

    def attempt(number: int) -> None:
        barrier.wait()
        writer = checkpoints.claim({"number": number})
        barrier.wait()  # all have claimed
        try:
            writer.save(number, parts(number), {}, 3, None)
            writer.close()
            committed.append(number)
        except StaleAttempt:
            refused.append(number)

    threads = [threading.Thread(target=attempt, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(committed) == 1
    assert len(refused) == 5
    assert checkpoints.load()[0].step == committed[0]


class Crash(BaseException):
    pass


def test_a_crash_at_any_operation_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    """The process may die at every write and delete of a commit, before or after it takes effect."""

    class Dying(Store):
        left = 10**9
        after = False

        def child(self, name: str) -> "Dying":
            return self

        def _step(self, operation, *arguments):
            Dying.left -= 1
            if Dying.left < 0 and not Dying.after:
                raise Crash
            result = operation(*arguments)
            if Dying.left < 0:
                raise Crash
            return result

        def write(self, name, data):
            return self._step(super().write, name, data)

        def create(self, name, data):
            return self._step(super().create, name, data)

        def delete(self, name):
            return self._step(super().delete, name)

    url = tmp_path / "run"
    commit(Checkpoints(Dying(url)), 1, 2)
    crashes = 0
    for seed in range(20):
        rng = random.Random(seed)
        before = Checkpoints(Dying(url)).load()[0].step
        Dying.left, Dying.after = rng.randrange(12), rng.random() < 0.5
        try:
            commit(Checkpoints(Dying(url)), before + 1, before + 2, keep_last=2)
        except Crash:
            crashes += 1
        Dying.left = 10**9
        record, loaded = Checkpoints(Dying(url)).load()
        assert record.step >= before
        assert same(loaded, parts(record.step))
    assert crashes >= 15


def _save_for_ever(url: str, config: StorageConfig, telling) -> None:
    checkpoints = Checkpoints(Store(url, config))
    found = checkpoints.load()
    step = found[0].step if found else 0
    writer = checkpoints.claim({})
    while True:
        step += 1
        writer.save(step, parts(step), {}, 2, None)
        telling.send(step)


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_20_crashes_on_s3_leave_a_valid_checkpoint(s3) -> None:
    """A process that writes checkpoints continuously, with failing requests, is killed at a random moment."""
    url, context, rng = "s3://ckpt/crashes", multiprocessing.get_context("fork"), random.Random(0)
    checkpoints, reached, unfinished = Checkpoints(Store(url, StorageConfig(s3, deadline_s=300))), 0, 0
    with FaultProxy(s3, rate=0.3, seed=4) as proxy:
        proxy.stall_s = 0.3
        for crash in range(20):
            ours, theirs = context.Pipe()
            child = context.Process(target=_save_for_ever, args=(url, StorageConfig(proxy.url, deadline_s=300), theirs))
            child.start()
            for _ in range(2 if crash == 0 else 1):  # the first crash needs a committed checkpoint
                assert ours.poll(300)
                ours.recv()
            time.sleep(rng.random() * 1.5)
            assert child.is_alive()
            child.kill()
            child.join()
            record, loaded = checkpoints.load()
            assert record.step >= reached
            assert same(loaded, parts(record.step))
            reached = record.step
            kept = checkpoints.committed()
            assert all(same(checkpoints.load(step=r.step)[1], parts(r.step)) for r in kept)
            numbers = {f"{r.number:08d}" for r in kept}
            unfinished += any(name[5:13] not in numbers for name in data_files(checkpoints))
        assert sum(proxy.counts.values()) - proxy.counts["passed"] > 50
    assert unfinished >= 5  # crashes between the first part and the record
    checkpoints.claim({}).close()
    assert {name[5:13] for name in data_files(checkpoints)} == numbers


@pytest.mark.s3
@pytest.mark.parametrize("together", [True, False])
def test_racing_attempts_through_lost_replies(s3, together: bool) -> None:
    """Every reported commit holds, and after a claim only the claimant commits."""
    url = f"s3://ckpt/race-{together}"
    committed, refused = set(), []
    with FaultProxy(s3, rate=0.4, seed=1, faults=["lost", "500", "reset"]) as proxy:

        def attempt(number: int, barrier: threading.Barrier) -> None:
            writer = Checkpoints(Store(url, StorageConfig(proxy.url, deadline_s=300))).claim({"attempt": number})
            if together:
                barrier.wait(300)  # both have claimed
            try:
                for step in range(3):
                    writer.save(step, parts(number), {"attempt": number}, 99, None)
                    writer.wait()
                    committed.add((number, step))
            except StaleAttempt:
                refused.append(number)

        for race in range(4):
            barrier = threading.Barrier(2)
            threads = [threading.Thread(target=attempt, args=(2 * race + n, barrier)) for n in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert proxy.counts["lost"] > 10
    checkpoints, owner = Checkpoints(Store(url, StorageConfig(s3))), None
    records = checkpoints.records()
    for record in records:
        if record.kind == "claim":
            owner = record.meta["attempt"]
        else:
            assert record.meta["attempt"] == owner
            loaded = {part: checkpoints._read_part(record, part) for part in record.parts}
            assert same(loaded, parts(record.meta["attempt"]))
    assert {(r.meta["attempt"], r.step) for r in records if r.kind == "checkpoint"} == committed
    if together:
        assert len(refused) == 4
        assert len({number for number, _ in committed}) == 4  # exactly one of each pair


@pytest.mark.s3
def test_a_store_that_goes_away_ends_the_writer_at_its_deadline(s3) -> None:
    with FaultProxy(s3, rate=0.0, faults=["500", "reset"]) as proxy:
        checkpoints = Checkpoints(Store("s3://ckpt/away", StorageConfig(proxy.url, deadline_s=8)))
        writer = checkpoints.claim({})
        writer.save(1, parts(1), {}, 3, None)
        writer.wait()
        proxy.rate = 1.0
        writer.save(2, parts(2), {}, 3, None)
        with pytest.raises(StorageError, match="gave up after"):
            writer.close()
        proxy.rate = 0.0
        assert checkpoints.load()[0].step == 1


def test_no_pickle_is_ever_read(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 1)
    assert all(name.endswith(".safetensors") for name in data_files(checkpoints))
    for name in checkpoints.store.list("log/"):
        json.loads(checkpoints.store.read(name))
