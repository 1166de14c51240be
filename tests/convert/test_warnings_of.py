"""Warnings at the top of a report: one-bit layers that the C kernels unpack."""

from made_reports import report, result

from convert.warnings_of import warnings_of


def said(kinds: dict[str, int]) -> list[str]:
    placement = {**result()["placement"], "kinds": kinds}
    return [w for w in warnings_of(report(result(placement=placement))) if "one bit" in w]


def test_layers_whose_bits_are_unpacked_are_recommended_int8() -> None:
    (warning,) = said({"int8-w1 conv": 3, "int8-w1 linear": 1, "int8 add": 2})
    assert "4 layers" in warning
    assert "--recipe int8" in warning


def test_layers_of_signs_and_of_int8_are_not() -> None:
    assert said({"w1a1 conv": 3, "int8 conv": 1, "int8-w4 linear": 2}) == []
