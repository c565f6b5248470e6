"""A value's interval, and how it is printed."""

import pytest
from scipy.stats import norm, t

from pipeline.evaluation.measured import Measured


def measured(n: int, standard_error: float | None) -> Measured:
    return Measured("nll", 4.0, 10, {"n": n}, standard_error)


@pytest.mark.parametrize(("n", "quantile"), [(2, t.ppf(0.975, 1)), (29, t.ppf(0.975, 28)), (30, norm.ppf(0.975))])
def test_few_images_get_an_interval_by_students_t(n: int, quantile: float) -> None:
    value = measured(n, 0.1)
    assert value.interval == pytest.approx((4.0 - 0.1 * quantile, 4.0 + 0.1 * quantile))
    assert (f"by Student's t for {n} images" in str(value)) == (n < 30)


def test_one_image_has_no_interval() -> None:
    value = measured(1, None)
    assert value.interval is None
    assert str(value) == f"{'nll':24s} 4.0000   [n 1]"
