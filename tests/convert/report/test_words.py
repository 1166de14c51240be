"""Numbers in words."""

import pytest
from made_reports import latency

from convert.report import words
from convert.report.schema import Accuracy, Latency


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (312_448, "312 kB"), (999_600, "1.00 MB"), (1_092_616, "1.09 MB")],
)
def test_sizes_are_decimal_with_three_digits(count: int, text: str) -> None:
    assert words.size(count) == text


@pytest.mark.parametrize(("value", "text"), [(0.642, "0.642 ms"), (12.34, "12.3 ms"), (0.0042, "4.20 µs")])
def test_times_have_three_digits(value: float, text: str) -> None:
    assert words.milliseconds(value) == text


@pytest.mark.parametrize(("artifact", "text"), [(0.9, "0.00"), (0.89, "−1.00"), (0.91, "+1.00")])
def test_points_carry_their_sign(artifact: float, text: str) -> None:
    facts = {"float": 0.9, "artifact": artifact, "samples": 100, "classes": 10}
    assert words.points(Accuracy.model_validate(facts)) == text


def test_slower_is_called_slower() -> None:
    slow = Latency.model_validate(latency(speedup=0.834, ratio_interval=[0.8, 0.9]))
    assert words.speed(slow) == "0.83x, slower"
    assert words.speed(None) == "not measured"
