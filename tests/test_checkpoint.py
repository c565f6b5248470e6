"""Checkpoints are whole or absent, found again when damaged, and committed by one attempt only."""

import json
import random
import threading
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import Checkpoints, DamagedCheckpoint, StaleAttempt
from pipeline.storage import Store


def parts(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(8, 4, generator=generator), "b": torch.randn(4, generator=generator)},
        "progress": {"count": torch.tensor(step)},
    }


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[p][n], b[p][n]) for p in b for n in b[p]) and a.keys() == b.keys()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(Store(tmp_path / "run"))


def commit(checkpoints: Checkpoints, *steps: int, keep_last: int = 3, keep_every: int | None = None) -> None:
    writer = checkpoints.claim({})
    for step in steps:
        writer.save(step, parts(step), {"step": step}, keep_last, keep_every)
    writer.close()


def data_files(checkpoints: Checkpoints) -> list[str]:
    return checkpoints.store.list("data/")


def test_round_trip(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    commit(checkpoints, 5)
    record, loaded = checkpoints.newest()
    assert (record.step, record.meta) == (5, {"step": 5})
    assert same(loaded, parts(5))
    _, model_only = checkpoints.newest(parts=("model",))
    assert model_only.keys() == {"model"}


def test_a_snapshot_is_of_the_moment(checkpoints: Checkpoints) -> None:
    writer = checkpoints.claim({})
    live = parts(1)
    writer.save(1, live, {}, 3, None)
    live["model"]["w"].zero_()  # training goes on while the thread writes
    writer.close()
    assert same(checkpoints.newest()[1], parts(1))


def test_newest_is_the_last_committed_whatever_its_step(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 8)
    commit(checkpoints, 6)  # a resumed run that fell back
    assert checkpoints.newest()[0].step == 6
    assert checkpoints.newest(step=8)[0].step == 8
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; there are \[6, 8\]"):
        checkpoints.newest(step=7)


def test_retention_keeps_the_last_and_the_multiples(checkpoints: Checkpoints) -> None:
    commit(checkpoints, *range(1, 12), keep_last=2, keep_every=5)
    kept = [r for r in checkpoints.records() if r.kind == "checkpoint"]
    assert [r.step for r in kept] == [5, 10, 11]
    assert len(data_files(checkpoints)) == len(kept) * 2
    for record in kept:
        assert same(checkpoints.newest(step=record.step)[1], parts(record.step))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "record"])
def test_falls_back_to_the_checkpoint_before(checkpoints: Checkpoints, damage: str, capsys) -> None:
    commit(checkpoints, 1, 2)
    newest = checkpoints.newest()[0]
    root = checkpoints.store.local
    if damage == "record":
        (root / newest.name).write_text('{"kind": "checkpoi')
    else:
        file = root / "data" / newest.parts["model"]["file"]
        content = bytearray(file.read_bytes())
        if damage == "delete":
            file.unlink()
        elif damage == "truncate":
            file.write_bytes(content[:-7])
        else:
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    record, loaded = checkpoints.newest()
    assert record.step == 1
    assert same(loaded, parts(1))
    if damage != "record":
        assert "trying the checkpoint before it" in capsys.readouterr().out


def test_all_damaged_is_an_error_that_names_them(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 1, 2)
    for name in data_files(checkpoints):
        checkpoints.store.write(name, b"x")
    with pytest.raises(DamagedCheckpoint, match="none of the 2 checkpoints is whole.*step 2.*step 1"):
        checkpoints.newest()


def test_a_stale_attempt_cannot_commit(checkpoints: Checkpoints) -> None:
    stale = checkpoints.claim({})
    stale.save(1, parts(1), {}, 1, None)
    stale.wait()
    commit(checkpoints, 2, 3, 4, keep_last=1)
    with pytest.raises(StaleAttempt, match="newer attempt"):
        stale.save(9, parts(9), {}, 1, None)
        stale.close()
    record, loaded = checkpoints.newest()
    assert record.step == 4
    assert same(loaded, parts(4))
    commit(checkpoints, 5)  # whose claim removes what the stale attempt left behind
    named = {e["file"] for r in checkpoints.records() for e in r.parts.values()}
    assert {name.removeprefix("data/") for name in data_files(checkpoints)} == named


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
    assert checkpoints.newest()[0].step == committed[0]


class Crash(BaseException):
    pass


def test_a_crash_at_any_operation_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    """Every write and delete of a commit is a place to die, before or after it took effect."""

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
        before = Checkpoints(Dying(url)).newest()[0].step
        Dying.left, Dying.after = rng.randrange(12), rng.random() < 0.5
        try:
            commit(Checkpoints(Dying(url)), before + 1, before + 2, keep_last=2)
        except Crash:
            crashes += 1
        Dying.left = 10**9
        record, loaded = Checkpoints(Dying(url)).newest()
        assert record.step >= before
        assert same(loaded, parts(record.step))
    assert crashes >= 15


def test_no_pickle_is_ever_read(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 1)
    assert all(name.endswith(".safetensors") for name in data_files(checkpoints))
    for name in checkpoints.store.list("log/"):
        json.loads(checkpoints.store.read(name))
