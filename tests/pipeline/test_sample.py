"""Drawing: the same images on any number of ranks, in files for people and for evaluators."""

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_module
from PIL import Image
from ranks import Ranks, in_world

from pipeline.distributed.world import World
from pipeline.drawing import Recipe, draw, draw_batches
from pipeline.images import grid_png
from pipeline.model import Trained, load_trained
from pipeline.sample import SampleConfig, main
from pipeline.storage.store import Store

CPU = torch.device("cpu")
ANCESTRAL, DDIM = Recipe("ancestral", 5, 0.0, 3), Recipe("ddim", 5, 0.0, 3)


@pytest.fixture(scope="module")
def trained(small_run: str) -> Trained:
    return load_trained(Store(small_run), World())


def drawn(trained: Trained, recipe: Recipe, count: int = 10, **options: Any) -> torch.Tensor:
    images = draw(trained, recipe, count, World(), **options)
    assert images is not None
    return images


@pytest.mark.parametrize("recipe", [ANCESTRAL, DDIM, Recipe("ddim", 5, 1.0, 3)])
def test_an_image_depends_on_the_seed_and_its_number_alone(trained: Trained, recipe: Recipe) -> None:
    whole = drawn(trained, recipe)
    assert whole.shape == (10, 1, 8, 8)
    assert whole.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in whole}) == 10
    for cuts in ((0, 4, 7, 10), (0, 1, 10)):
        parts = [draw_batches(trained, recipe, lo, hi, device=CPU, batch_size=3) for lo, hi in pairwise(cuts)]
        assert torch.equal(torch.cat([batch for part in parts for batch in part]), whole)
    other = drawn(trained, Recipe(recipe.sampler, 5, recipe.eta, 4))
    assert not torch.equal(other, whole)


def test_classes_are_gone_through_in_turn(trained: Trained) -> None:
    by_default = drawn(trained, DDIM)
    for kind in (2, 7):
        assert torch.equal(drawn(trained, DDIM, classes=[kind])[kind], by_default[kind])
    assert not torch.equal(drawn(trained, DDIM, classes=[2])[7], by_default[7])


@pytest.mark.parametrize("recipe", [ANCESTRAL, DDIM])
@pytest.mark.parametrize("frames", [1, 3, 5])
def test_progressive_frames_end_in_the_image(trained: Trained, recipe: Recipe, frames: int) -> None:
    strip = drawn(trained, recipe, 2, frames=frames)
    assert strip.shape == (2, frames, 1, 8, 8)
    assert torch.equal(strip[:, -1], drawn(trained, recipe, 2))


def saved(run: str, out: Path, **options: Any) -> Any:
    main(SampleConfig(run, str(out), **{"count": 4, "steps": 5, **options}), World())
    return np.load(out, allow_pickle=False) if out.suffix == ".npz" else np.asarray(Image.open(out))


def test_files_hold_what_was_drawn(small_run: str, trained: Trained, tmp_path: Path) -> None:
    images = drawn(trained, Recipe("ancestral", 5, 0.0, 0), 4, classes=[1, 2])
    npz = saved(small_run, tmp_path / "a.npz", classes=(1, 2))
    assert npz["arr_0"].dtype == np.uint8
    assert np.array_equal(npz["arr_0"], images.permute(0, 2, 3, 1).numpy())
    assert npz["arr_1"].tolist() == [1, 2, 1, 2]
    grid = saved(small_run, tmp_path / "new" / "folder" / "a.png", classes=(1, 2))
    assert grid.shape == (134, 134, 3)
    assert (grid[2:66:8, 2:66:8, 0] == images[0, 0].numpy()).all()
    assert (grid[68:132:8, 2:66:8, 0] == images[2, 0].numpy()).all()
    strip = saved(small_run, tmp_path / "strip.png", progressive=3)
    assert strip.shape == (4 * 66 + 2, 3 * 66 + 2, 3)


def test_interpolation_begins_and_ends_in_the_seeds_images(small_run: str, trained: Trained, tmp_path: Path) -> None:
    line = saved(small_run, tmp_path / "line.npz", between=("3", "8"), classes=(5,))["arr_0"]
    for frame, seed in ((0, 3), (-1, 8)):
        end = drawn(trained, Recipe("ddim", 5, 0.0, seed), 1, classes=[5])
        assert np.array_equal(line[frame], end[0].permute(1, 2, 0).numpy())
    assert len({frame.tobytes() for frame in line}) == 4


def test_interpolation_between_images_inverts_them(small_run: str, tmp_path: Path) -> None:
    ends = []
    for seed in (3, 8):
        ends.append(str(tmp_path / f"{seed}.png"))
        image = saved(small_run, tmp_path / "x.npz", sampler="ddim", steps=20, count=1, seed=seed, classes=(5,))
        Image.fromarray(image["arr_0"][0, :, :, 0]).save(ends[-1])
    options = {"steps": 20, "classes": (5,)}
    back = saved(small_run, tmp_path / "back.npz", between=tuple(ends), **options)["arr_0"]
    for frame, end in ((0, 0), (-1, 1)):
        image = np.asarray(Image.open(ends[end]))
        near = np.abs(back[frame, :, :, 0].astype(float) - image).mean()
        far = np.abs(back[-1 - frame, :, :, 0].astype(float) - image).mean()
        assert near < 0.5 * far


def test_a_grid_is_near_square_or_has_the_columns_asked_for() -> None:
    for columns, size in ((None, (200, 134)), (6, (398, 68)), (1, (68, 398))):
        with Image.open(io.BytesIO(grid_png(np.zeros((6, 3, 64, 64), np.uint8), columns))) as picture:
            assert picture.size == size


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eta": 0.5}, "only --sampler ddim"),
        ({"sampler": "ddim", "eta": 2.0}, "expected 0 to 1"),
        ({"steps": 21}, "expected 1 to the run's T = 20"),
        ({"out": "x.gif"}, r"ending in \.png or \.npz"),
        ({"classes": (3, 10)}, "expected 0 to 9"),
        ({"progressive": 6, "steps": 5}, "at most the 5 steps"),
        ({"progressive": 2, "out": "x.npz"}, "only final samples"),
        ({"between": ("1", "2"), "eta": 1.0, "sampler": "ddim"}, "cannot be combined with --progressive or --eta"),
        ({"ema_rate": 0.7}, r"expected 0\.9, 0\.5"),
    ],
)
def test_what_cannot_be_drawn_is_refused(small_run: str, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        main(SampleConfig(small_run, **{"out": str(tmp_path / "x.png"), **options}), World())
    assert not list(tmp_path.iterdir())


def test_an_image_of_another_size_is_refused(small_run: str, tmp_path: Path) -> None:
    Image.new("L", (9, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="got an image of 9x8 pixels, expected the run's 8x8"):
        saved(small_run, tmp_path / "out.png", between=(str(tmp_path / "a.png"), "1"))


@pytest.mark.slow
def test_three_ranks_write_the_file_that_one_writes(small_run: str, tmp_path: Path) -> None:
    for size in (1, 3):
        config = SampleConfig(small_run, str(tmp_path / f"{size}.npz"), count=7, steps=5, seed=2)
        with Ranks(size, tmp_path / f"ranks-{size}", in_world, _sample, config) as ranks:
            assert ranks.join() == [0] * size, ranks.said(0)
    one, three = (np.load(tmp_path / f"{size}.npz")["arr_0"] for size in (1, 3))
    assert np.array_equal(one, three)


def _sample(world: World, config: SampleConfig) -> None:
    main(config, world)


@pytest.mark.slow
def test_the_command_line(small_run: str, tmp_path: Path) -> None:
    flags = ("--sampler", "ddim", "--steps", "5", "--eta", "1", "--classes", "1", "2", "--count", "4", "--seed", "9")
    said = run_module("pipeline.sample", small_run, *flags, "--out", str(tmp_path / "a.npz")).stdout
    assert "4 images, ddim, 5 steps, EMA 0.9, step 40" in said
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == [1, 2, 1, 2]
