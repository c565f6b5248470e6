import pytest
import torch
from golden import arrays

from iddpm.config import DiffusionConfig
from iddpm.diffusion import Diffusion
from iddpm.schedule import make_betas, respace

SCHEDULES = [key for key in arrays() if key.startswith("schedule/")]
RESPACED = [key for key in arrays() if key.startswith("respace/")]


@pytest.mark.parametrize("key", SCHEDULES)
def test_tables_agree_with_the_original(key):
    _, schedule, steps, name = key.split("/")
    table, _, stride = name.partition("[")
    got = getattr(Diffusion(DiffusionConfig(timesteps=int(steps), schedule=schedule)), table)
    expected = torch.from_numpy(arrays()[key])
    assert got.dtype == torch.float64
    assert got.shape == (int(steps),)
    # Compare relative errors of individual values, not only of the largest.
    torch.testing.assert_close(got[::16] if stride else got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("key", RESPACED)
def test_respacing_agrees_with_the_original(key):
    _, steps, spec = key.split("/", 2)
    assert respace(int(steps), spec) == arrays()[key].tolist()


def test_respacing_all_and_one():
    assert respace(100, "100") == list(range(100)) == respace(100, "ddim100")
    assert respace(100, "1") == [0]
    assert respace(7, "2,2") == [0, 3, 4, 6]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "expected a spec"),
        ("ten", "expected a spec"),
        ("0", "expected a spec"),
        ("-5", "expected a spec"),
        ("5,,5", "expected a spec"),
        ("ddim", "expected a spec"),
        ("ddim5,5", "expected a spec"),
        ("101", "section 1 has only 100"),
        ("10,60", "section 2 has only 50"),
        ("ddim51", "no integer stride selects 51 of 100"),
    ],
)
def test_a_wrong_spec_is_refused(spec, says):
    with pytest.raises(ValueError, match=f"timesteps to keep: got '{spec}'.*{says}"):
        respace(100, spec)


def test_linear_schedule_ends_at_the_same_noise_for_every_length():
    final = [make_betas("linear", steps).neg().log1p().sum() for steps in (1000, 4000)]
    assert abs(final[0] - final[1]) < 0.1


def test_cosine_betas_are_at_most_999_thousandths():
    betas = make_betas("cosine", 50)
    assert betas.max() == 0.999
    assert (betas > 0).all()
    assert len(make_betas("cosine", 1)) == 1
