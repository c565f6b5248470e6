"""Bits/dim over many images: unbiased, the same on any number of ranks, resumable, paired."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from ranks import Ranks, in_world

from iddpm.likelihood import pilot_timesteps
from pipeline.data.shards import load_index
from pipeline.data.stream import Reader
from pipeline.distributed.world import World
from pipeline.evaluation import nll as module
from pipeline.evaluation import resumable as blocks
from pipeline.evaluation.nll import Nll, NllPlan, measure_nll
from pipeline.model import Trained, load_trained
from pipeline.storage.store import Store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(small_run: str) -> Trained:
    return load_trained(Store(small_run), World())


@pytest.fixture(scope="module")
def early(small_run: str) -> Trained:
    return load_trained(Store(small_run), World(), step=20)


@pytest.fixture
def val(digits: str) -> Reader:
    store = Store(digits)
    return Reader(store, load_index(store, "val"))


def measured(
    val: Reader, *models: Trained, world: World | None = None, store: Store | None = None, seed: int = 0, **plan: Any
) -> Nll:
    return measure_nll(models, NllPlan(**plan), val, world or World(), seed=seed, store=store)


def test_sampled_agrees_with_exact_and_costs_less(val: Reader, trained: Trained) -> None:
    exact = measured(val, trained, images=48, exact=True)
    sampled = measured(val, trained, images=48, draws=8)
    assert exact.vb.shape == exact.mse.shape == (1, 20)
    assert (exact.prior + exact.vb.sum(1))[0] == pytest.approx(exact.mean(), rel=1e-12)
    assert exact.decoder[0] == exact.vb[0, 0]
    assert sampled.vb.shape == sampled.mse.shape == (1, 0)
    # The same images, and for L_T and L_0 the same noise.
    assert sampled.prior[0] == pytest.approx(exact.prior[0].item(), rel=1e-12)
    assert sampled.decoder[0] == pytest.approx(exact.decoder[0].item(), rel=1e-12)
    gap = sampled.total[0] - exact.total[0]
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(48)
    assert gap.std() < 0.5 * exact.total[0].std()
    assert exact.evaluations == 48 * 20
    assert sampled.evaluations == 48 * 9 + 19 * 16


def test_evaluations_are_counted_as_the_pilot_takes_them() -> None:
    assert [len(pilot_timesteps(steps)) for steps in (4000, 50, 20, 2)] == [73, 41, 19, 1]
    assert NllPlan(10, draws=16).evaluations(50) == 10 * 17 + 41 * 16


def test_the_seed_chooses_images_and_noise(val: Reader, trained: Trained) -> None:
    a, again, b = (measured(val, trained, images=20, seed=seed).total for seed in (1, 1, 2))
    assert torch.equal(a, again)
    assert not set(a[0].tolist()) & set(b[0].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"draws": 3}, {"exact": True, "images": 20}, {"draws": 3, "target_se": 0.09}])
def test_any_number_of_ranks_measures_the_same(small_run: str, digits: str, tmp_path: Path, options: dict) -> None:
    for size in (1, 3):
        with Ranks(size, tmp_path / str(size), in_world, _measure, small_run, digits, str(tmp_path), options) as ranks:
            assert ranks.join() == [0] * size, ranks.said(0)
    one = torch.load(tmp_path / "1-0.pt")
    assert one["total"].shape[1] == (options.get("images") or (64 if "target_se" in options else 70))
    for rank in range(3):
        there = torch.load(tmp_path / f"3-{rank}.pt")
        assert torch.equal(there["total"], one["total"])
        assert torch.equal(there["prior"], one["prior"])


def _measure(world: World, run: str, digits: str, folder: str, options: dict[str, Any]) -> None:
    store = Store(digits)
    reader = Reader(store, load_index(store, "val"))
    model = load_trained(Store(run), World())
    nll = measured(reader, model, world=world, **{"images": 70, "images_per_call": 8, **options})
    torch.save({"total": nll.total, "prior": nll.prior}, f"{folder}/{world.size}-{world.rank}.pt")


@pytest.mark.parametrize("exact", [False, True])
def test_a_killed_evaluation_goes_on_where_it_was(
    val: Reader, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    plan = {"images": 50, "images_per_call": 8, "exact": exact, "draws": 2}
    whole = measured(val, trained, **plan)
    monkeypatch.setattr(blocks, "SAVE_S", -1.0)  # after every block
    measure, calls = module._Measurement.block, []

    def dying(self: Any, images: Any) -> Any:
        calls.append(len(images.ids))
        if len(calls) in (4, 6):
            raise KeyboardInterrupt
        return measure(self, images)

    monkeypatch.setattr(module._Measurement, "block", dying)
    store = Store(str(tmp_path))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measured(val, trained, store=store, **plan)
    resumed = measured(val, trained, store=store, **plan)
    assert calls == [8, 8, 8, 8, 8, 8, 8, 8, 2]  # three, two and two blocks, two of which were lost
    assert torch.equal(resumed.total, whole.total)
    assert torch.equal(resumed.prior, whole.prior)
    assert resumed.evaluations == whole.evaluations
    calls.clear()
    assert torch.equal(measured(val, trained, store=store, **plan).total, whole.total)  # already known
    assert calls == []
    measured(val, trained, store=store, seed=1, **{**plan, "images": 8})  # another measurement
    assert calls == [8]


def test_no_flipped_bit_of_a_saved_block_is_believed(val: Reader, trained: Trained, tmp_path: Path) -> None:
    plan, store, rng = {"images": 16, "images_per_call": 8, "draws": 2}, Store(str(tmp_path)), random.Random(0)
    whole = measured(val, trained, store=store, **plan)
    files = {name: store.read(name) for name in store.list("evaluation/")}
    for _ in range(10):
        name = rng.choice(sorted(files))
        content = bytearray(files[name])
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        store.write(name, bytes(content))
        assert torch.equal(measured(val, trained, store=store, **plan).total, whole.total)


def test_it_stops_at_the_target_and_not_before_enough_images(val: Reader, trained: Trained) -> None:
    every = measured(val, trained, images=120, draws=2)
    target = 1.2 * every.standard_error()
    stopped = measured(val, trained, images=120, draws=2, target_se=target)
    n = stopped.total.shape[1]
    assert 64 <= n < 120
    assert stopped.standard_error() <= target
    assert torch.equal(stopped.total, every.total[:, :n])
    assert (every.total[0, : n - 16].std() / math.sqrt(n - 16)).item() > target
    assert measured(val, trained, images=120, draws=2, target_se=9.0).total.shape[1] == 64


def test_two_models_are_compared_on_the_same_images_and_noise(val: Reader, trained: Trained, early: Trained) -> None:
    pair = measured(val, early, trained, images=32, draws=8)
    value, error = pair.difference
    assert value == pytest.approx(pair.mean(0) - pair.mean(1))
    assert value > 5 * error  # training helps
    assert error < 0.7 * math.hypot(pair.standard_error(0), pair.standard_error(1))
    itself = measured(val, trained, trained, images=16)
    assert itself.difference == (0.0, 0.0)


def test_models_of_different_t_share_no_timesteps(val: Reader, trained: Trained, digits: str, tmp_path: Path) -> None:
    from pipeline.loop import train

    train(tiny(digits, tmp_path, "--diffusion.timesteps", "21", "--horizon", "1steps"), World())
    with pytest.raises(ValueError, match=r"differ in --diffusion\.timesteps"):
        measured(val, trained, load_trained(Store(str(tmp_path)), World()), images=4)


def test_shorter_chains_have_bounds_of_their_own(val: Reader, trained: Trained) -> None:
    full = measured(val, trained, images=16, exact=True)
    strided = measured(val, trained, images=16, chain="5")
    best = measured(val, trained, images=16, chain="best5")
    assert strided.timesteps == [0, 5, 10, 14, 19]
    assert best.timesteps != strided.timesteps
    assert (len(best.timesteps), best.timesteps[-1]) == (5, 19)
    assert best.mean() < strided.mean()
    assert measured(val, trained, images=16, chain="20").mean() == pytest.approx(full.mean(), rel=1e-9)
    names = [NllPlan(1, chain=chain).name for chain in (None, "5", "best5")]
    assert names == ["nll", "nll_strided5", "nll_best5"]


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"chain": "x"}, "such as 25 or best25"),
        ({"chain": "21"}, "expected at most the run's 20 timesteps"),
        ({"target_se": 0.0}, "--target-se: got 0.0, expected a number above 0"),
        ({"draws": 0}, "1 or more"),
    ],
)
def test_plans_that_cannot_be_are_refused(val: Reader, trained: Trained, plan: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        measured(val, trained, images=4, **plan)
