"""Published weights become a run that can be sampled and evaluated."""

from pathlib import Path

import pytest
import torch
from conftest import run_module, tiny
from golden import released
from PIL import Image

from iddpm.openai import load_published
from iddpm.unet import UNet
from pipeline.convert import convert
from pipeline.distributed.world import World
from pipeline.loop import train
from pipeline.model import load_trained
from pipeline.presets import PRESETS
from pipeline.sample import SampleConfig, main
from pipeline.storage.store import Store


def published(digits: str, folder: Path) -> tuple[str, UNet]:
    """Write a file as published, with the tiny run's model."""
    config = tiny(digits, folder)
    model = UNet(config.model, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.05)
    path = folder / "published.pt"
    torch.save(model.state_dict(), path)
    return str(path), model


def test_converted_weights_are_sampled_and_evaluated(digits: str, tmp_path: Path) -> None:
    path, model = published(digits, tmp_path)
    config = tiny(digits, tmp_path / "run")
    convert(path, config)
    for rate in (None, 0.0):
        trained = load_trained(Store(config.out), World(), rate)
        assert isinstance(trained.model, UNet)
        for name, tensor in model.state_dict().items():
            assert torch.equal(trained.model.state_dict()[name], tensor), name
    main(SampleConfig(config.out, str(tmp_path / "grid.png"), count=4), World())
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (134, 134)
    with pytest.raises(ValueError, match="already has a checkpoint; give another"):
        convert(path, config)
    with pytest.raises(ValueError, match="holds converted weights"):
        train(config, World())


def test_another_models_weights_are_refused_and_leave_nothing(digits: str, tmp_path: Path) -> None:
    path, _ = published(digits, tmp_path)
    with pytest.raises(ValueError, match="not the weights of this model config"):
        convert(path, tiny(digits, tmp_path / "run", "--model.channels", "64"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("preset", "file"),
    [
        ("imagenet64", "imagenet64_uncond_100M_1500K"),
        ("imagenet64-cond", "imagenet64_cond_270M_250K"),
        ("cifar10", "cifar10_uncond_50M_500K"),
    ],
)
def test_the_presets_are_the_published_models(preset: str, file: str, tmp_path: Path) -> None:
    """Every name and shape matches; the file is small because its tensors are views of one number."""
    shapes = released()[file]["state_dict"]
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, tmp_path / "x.pt")
    assert load_published(tmp_path / "x.pt", PRESETS[preset].model, 6).keys() == shapes.keys()


@pytest.mark.slow
def test_the_command_line(digits: str, tmp_path: Path) -> None:
    path, _ = published(digits, tmp_path)
    flags = ["--model.num-res-blocks", "1", "--model.channel-mult", "1", "1", "--diffusion.timesteps", "20"]
    flags += ["--sample-steps", "4", "--data.url", digits, "--out", str(tmp_path / "run")]
    said = run_module("pipeline.convert", "openai", path, "--preset", "digits", *flags).stdout
    assert "written as a checkpoint of" in said
    said = run_module(
        "pipeline.evaluate", str(tmp_path / "run"), "--images", "4", "--draws", "2", "--tracking.uri", "none"
    ).stdout
    assert "nll " in said
    refused = run_module("pipeline.convert", "openai", path, "--preset", "digits", check=False)
    assert (refused.returncode, "--out: expected" in refused.stderr) == (2, True)
    dry = run_module("pipeline.convert", "openai", path, *flags, "--dry-run", check=False)
    assert (dry.returncode, "--dry-run: not supported" in dry.stderr) == (2, True)
    wrong = run_module(
        "pipeline.convert", "openai", path, "--preset", "cifar10", "--out", str(tmp_path / "b"), check=False
    )
    assert (wrong.returncode, "not the weights of this model config" in wrong.stderr) == (1, True)
    assert "Traceback" not in wrong.stderr
