"""The figures: those of schedules without runs, and all others from a tiny run."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import tiny
from PIL import Image

from iddpm.config import DiffusionConfig
from iddpm.diffusion import Diffusion
from jobs.figures import FiguresConfig, _noise_scale, alphas, main, variances
from pipeline.distributed.world import World
from pipeline.loop import train


def test_the_tables_are_what_is_drawn() -> None:
    rows, _ = variances()
    first = {row["T"]: row["ratio"] for row in reversed(rows)}
    for steps, ratio in first.items():
        d = Diffusion(DiffusionConfig(timesteps=steps, schedule="linear"))
        assert ratio == float(d.posterior_variance[1] / d.betas[1])
    assert first[100] < first[1000] < first[4000]  # the more steps, the sooner the two variances agree
    rows, _ = alphas()
    half = {row["schedule"]: row["alpha_bar"] for row in rows if row["t_over_T"] == 0.5}
    assert half["linear"] < 0.1
    assert half["cosine"] == pytest.approx(0.49, abs=0.02)


def test_the_gradient_noise_scale_is_found_with_its_error() -> None:
    """The estimate of tr(covariance) / |mean|^2 from a few vectors with known mean and covariance."""
    generator, true, inside = torch.Generator().manual_seed(0), 200 * 4.0 / 9.0, []
    mean = torch.zeros(200, dtype=torch.float64)
    mean[0] = 3.0
    for _ in range(40):
        x = mean + 2.0 * torch.randn(32, 16, 200, generator=generator, dtype=torch.float64)
        sums = x.mean(1)
        value, se = _noise_scale(sums @ sums.T, x.square().sum(2).mean(1))
        assert value == pytest.approx(true, rel=0.5)
        inside.append(abs(value - true) < 1.96 * se)
    assert 30 <= sum(inside) <= 40


@pytest.mark.slow
def test_every_figure_has_a_picture_and_its_data(digits: str, tmp_path: Path) -> None:
    for name in ("cosine", "linear"):
        flags = ("--horizon", "2steps", "--checkpoint-every", "2", "--diffusion.schedule", name)
        flags += ("--diffusion.timesteps", "21", "--sample-every", "0")
        train(tiny(digits, tmp_path / name, *flags), World())
    flags = ("--horizon", "2steps", "--diffusion.timesteps", "21", "--diffusion.loss", "rescaled_kl")
    train(tiny(digits, tmp_path / "vlb", *flags, "--sample-every", "0"), World())
    runs = {"hybrid": str(tmp_path / "cosine"), "linear": str(tmp_path / "linear"), "vlb": str(tmp_path / "vlb")}
    main(FiguresConfig(str(tmp_path / "out"), digits, **runs, images=2, samples=8, gradients=64, steps=(2, 4)))
    expected = {"alphas", "curves", "ddim-consistency", "ddim-interpolation", "gradient-noise", "nll-over-steps"}
    expected |= {"noised", "quality-over-steps", "skipped-prefix", "terms", "variances"}
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == expected
    for name in expected:
        with (tmp_path / "out" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) > 1, name
        if name == "gradient-noise":
            assert {(row["objective"], row["weights"]) for row in rows} == {
                ("L_hybrid, cosine", "L_hybrid, cosine"),
                ("L_vlb", "L_vlb"),
                ("L_vlb, importance sampled", "L_vlb"),
            }
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.convert("L").getextrema()[0] < 128, name


def test_a_class_conditional_run_is_refused(small_run: str, digits: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got a class-conditional model"):
        main(FiguresConfig(str(tmp_path), digits, hybrid=small_run))
