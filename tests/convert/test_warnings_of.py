"""What a reader must know first: sentences made from a report's numbers."""

from typing import Any

from made_reports import report, result, stage

from convert.report.schema import Report
from convert.warnings_of import warnings_of


def made(here_db: float, there_db: float | None) -> Report:
    run: dict[str, Any] = {
        "emulated": True,
        "on": "emulated:x86-no-vnni",
        "executor": "ONNX Runtime 1.31.1",
        "latency_note": "emulated",
    }
    run |= {"drift": None, "failure": "it broke"} if there_db is None else {"drift": stage("artifact", there_db)}
    stages = [stage("captured", None), stage("artifact", here_db)]
    drift = {"stages": stages, "layers": [], "first_jump": None}
    return report(result(drift=drift, runs=[run]))


def test_kernels_that_compute_something_else_elsewhere_are_warned_of() -> None:
    said = [w for w in warnings_of(made(40.0, 10.5)) if "kernels there" in w]
    assert len(said) == 1
    assert "on emulated:x86-no-vnni it drifts to 10.5 dB against float, here 40.0 dB" in said[0]


def test_the_same_drift_elsewhere_is_no_warning() -> None:
    assert not [w for w in warnings_of(made(40.0, 38.0)) if "kernels there" in w]
    assert not [w for w in warnings_of(made(150.0, 95.0)) if "kernels there" in w], "rounding alone"
    assert not [w for w in warnings_of(made(40.0, None)) if "kernels there" in w]


def said(kinds: dict[str, int]) -> list[str]:
    placement = {**result()["placement"], "kinds": kinds}
    return [w for w in warnings_of(report(result(placement=placement))) if "one bit" in w]


def test_layers_whose_bits_are_unpacked_are_recommended_int8() -> None:
    (warning,) = said({"int8-w1 conv": 3, "int8-w1 linear": 1, "int8 add": 2})
    assert "4 layers" in warning
    assert "--recipe int8" in warning


def test_layers_of_signs_and_of_int8_are_not() -> None:
    assert said({"w1a1 conv": 3, "int8 conv": 1, "int8-w4 linear": 2}) == []
