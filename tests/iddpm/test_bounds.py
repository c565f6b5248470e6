import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from iddpm.bounds import NOT_EMPTY, Count, Fraction, Limit, Natural, NotNegative, Positive, check_bounds


@dataclass(frozen=True)
class Loader:
    batch_size: Count = 1
    retries: Natural = 0
    rate: Positive = 1.0
    decay: NotNegative = 0.0
    deadline_s: Limit = math.inf
    dropout: Fraction = 0.0
    width: Count | None = None
    sizes: Annotated[tuple[Count, ...], NOT_EMPTY] = (1,)
    order: Literal["near", "far"] = "near"
    name: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "data.")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"batch_size": 3, "retries": 7, "width": 2, "sizes": (4, 5), "order": "far", "name": "x"},
        {"rate": 1e-9, "decay": 2, "deadline_s": 0.1, "dropout": 0.999},
    ],
)
def test_values_within_their_bounds_pass(values):
    Loader(**values)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("batch_size", 0, "1 or more"),
        ("batch_size", None, "type int"),
        ("batch_size", 1.5, "type int"),
        ("batch_size", "3", "type int"),
        ("retries", -1, "0 or more"),
        ("rate", 0.0, "a positive number"),
        ("rate", math.inf, "a positive number"),
        ("decay", -0.1, "0 or more"),
        ("decay", math.inf, "0 or more"),
        ("deadline_s", 0.0, "a number above 0"),
        ("dropout", 1.0, "a number in [0, 1)"),
        ("width", 0, "1 or more"),
        ("width", "wide", "type int"),
        ("sizes", (), "one or more"),
        ("sizes", (1, 0), "each 1 or more"),
        ("sizes", (1, "2"), "each type int"),
        ("sizes", [1], "a tuple"),
        ("order", "middle", "one of near, far"),
        ("name", 3, "type str"),
        *((field, math.nan, "") for field in ("rate", "decay", "deadline_s", "dropout")),
    ],
)
def test_the_message_names_the_flag_and_what_it_expects(field, value, expected):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is compared below
        Loader(**{field: value})
    flag = "--data." + field.replace("_", "-")
    assert str(refused.value).startswith(f"{flag}: got {value!r}, expected {expected}")
