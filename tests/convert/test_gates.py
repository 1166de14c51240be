"""Gates: what passes, what fails, and what is refused because it could not fail."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_reports import device_run, latency, report, result, stage

from convert.errors import TightfitError
from convert.gates import GATES, Budget, evaluate
from convert.report.schema import GateResult, Result


def judged(limits: dict[str, float | None], **changes: Any) -> dict[str, GateResult]:
    made = Result.model_validate(result(**changes))
    return {row.gate: row for row in evaluate(made, Budget(limits))}


# For each gate: a limit that the sample result meets, and one that it misses.
CASES = {
    "min_sqnr_db": (26.9, 27.0),
    "min_cosine": (0.9987, 0.9988),
    "min_agreement": (0.984, 0.985),
    "max_accuracy_drop": (0.0015, 0.0014),
    "min_speedup": (2.1, 2.2),
    "max_fallbacks": (1, 0),
    "max_bytes": (312_448, 312_447),
    "max_size_ratio": (0.29, 0.28),
    "max_class_drop": (0.25, 0.2),
    "max_instructions": (12_345_678, 12_345_677),
    "max_p50_ms": (0.65, 0.64),
    "max_p90_ms": (0.68, 0.67),
    "max_p99_ms": (0.94, 0.92),
}


@pytest.mark.parametrize("gate", CASES)
def test_each_gate_passes_at_a_limit_it_meets_and_fails_just_beyond(gate: str) -> None:
    met, missed = CASES[gate]
    assert judged({gate: met})[gate].passed
    failed = judged({gate: missed})[gate]
    assert not failed.passed
    assert "wanted" in failed.reason


def test_every_gate_has_a_case_here() -> None:
    assert set(CASES) | {"require_match"} == set(GATES)


UNMEASURED: list[tuple[str, float, dict[str, Any], str]] = [
    ("max_accuracy_drop", 0.01, {"accuracy": None}, "labels"),
    ("max_class_drop", 0.01, {"accuracy": None}, "labels"),
    ("max_class_drop", 0.01, {"accuracy": {**result()["accuracy"], "per_class": []}}, "convert again"),
    ("max_instructions", 10, {"instructions": None}, "give --on emulated"),
    ("min_speedup", 1.0, {"latency": None, "latency_note": "no Core ML here"}, "no Core ML here"),
    ("max_p50_ms", 9.0, {"latency": None, "latency_note": "no Core ML here"}, "no Core ML here"),
    (
        "min_agreement",
        0.9,
        {"drift": {"stages": [stage("artifact", 30.0, top1_agreement=None)]}},
        "not a classifier",
    ),
    (
        "min_sqnr_db",
        10.0,
        {"drift": {"stages": [stage("artifact", float("nan"), cosine=None, max_abs=None)]}},
        "finite",
    ),
    ("min_cosine", 0.9, {"drift": {"stages": [stage("artifact", 30.0, cosine=None)]}}, "undefined"),
]


@pytest.mark.parametrize(("gate", "limit", "changes", "reason"), UNMEASURED)
def test_a_metric_that_was_not_measured_fails_with_its_reason(
    gate: str, limit: float, changes: dict[str, Any], reason: str
) -> None:
    row = judged({gate: limit}, **changes)[gate]
    assert not row.passed
    assert row.value is None
    assert reason in row.reason


def test_no_float_twin_fails_the_speedup_gate() -> None:
    twin = dict.fromkeys(
        ["float_runs", "float_p50_ms", "float_p90_ms", "float_p99_ms", "float_cv", "speedup", "ratio_interval"]
    )
    row = judged({"min_speedup": 1.0}, latency=latency(**twin))["min_speedup"]
    assert not row.passed
    assert "no float twin" in row.reason


def test_an_exact_artifact_passes_any_sqnr_gate() -> None:
    row = judged({"min_sqnr_db": 150.0}, drift={"stages": [stage("artifact", None)]})["min_sqnr_db"]
    assert row.passed
    assert row.value is None


def test_unstable_times_are_judged_by_their_pessimistic_end() -> None:
    shaky = latency(stable=False, ratio_interval=[1.4, 2.9])
    rows = judged({"min_speedup": 1.5, "max_p50_ms": 0.9}, latency=shaky)
    assert not rows["min_speedup"].passed
    assert not rows["max_p50_ms"].passed  # p99 is 0.93
    rows = judged({"min_speedup": 1.3, "max_p50_ms": 0.94}, latency=shaky)
    assert rows["min_speedup"].passed
    assert rows["max_p50_ms"].passed
    assert "unstable" in rows["min_speedup"].reason


def test_an_artifact_unlike_its_simulation_fails_where_a_match_is_required() -> None:
    bad = {**result()["match"], "exact": False, "max_abs": 3.0, "share_equal": 0.2, "within_one_step": False}
    row = judged({"require_match": 1.0}, match={**bad, "reason": "unknown"})["require_match"]
    assert not row.passed
    assert "unknown" in row.reason
    assert judged({"require_match": 1.0})["require_match"].passed
    assert "require_match" not in judged({"require_match": None})


BAD_LIMITS = [
    ("min_agreement", 1.01),
    ("min_agreement", 0.0),
    ("min_agreement", 98.4),
    ("max_bytes", -1.0),
    ("max_bytes", 0.0),
    ("max_fallbacks", -1.0),
    ("max_fallbacks", 0.5),
    ("min_sqnr_db", 0.0),
    ("min_sqnr_db", 1000.0),
    ("min_cosine", 1.5),
    ("max_accuracy_drop", 0.5),
    ("max_accuracy_drop", -0.1),
    ("min_speedup", 0.0),
    ("max_p50_ms", float("inf")),
    ("max_p50_ms", float("nan")),
]


@pytest.mark.parametrize(("gate", "limit"), BAD_LIMITS)
def test_a_limit_outside_the_range_of_its_metric_is_refused(gate: str, limit: float) -> None:
    with pytest.raises(TightfitError, match=gate):
        Budget({gate: limit})


def test_a_drop_in_points_instead_of_a_share_is_told_so() -> None:
    with pytest.raises(TightfitError, match="half a percentage point"):
        Budget({"max_accuracy_drop": 0.5})


@pytest.mark.parametrize("accuracy", [0.1, 0.15])
def test_an_accuracy_gate_on_a_float_model_that_guesses_is_refused(accuracy: float) -> None:
    facts = {"float": accuracy, "artifact": accuracy, "samples": 100, "classes": 10}
    with pytest.raises(TightfitError, match="no reference"):
        judged({"max_accuracy_drop": 0.01}, accuracy=facts)


def test_an_accuracy_gate_wide_enough_for_guessing_is_refused() -> None:
    facts = {"float": 0.3, "artifact": 0.1, "samples": 100, "classes": 10}
    with pytest.raises(TightfitError, match="would pass a model that guesses"):
        judged({"max_accuracy_drop": 0.2}, accuracy=facts)


def test_an_agreement_gate_that_guessing_passes_is_refused() -> None:
    with pytest.raises(TightfitError, match="guesses"):
        judged({"min_agreement": 0.15})


def test_an_unknown_gate_is_refused_with_the_nearest() -> None:
    with pytest.raises(TightfitError, match="did you mean min_sqnr_db"):
        Budget({"min_sqnr": 20.0})


def test_the_closest_limit_counts() -> None:
    budget = Budget(
        {"min_sqnr_db": 20.0, "max_bytes": 1e6},
        {"raspberry-pi-4b": {"min_sqnr_db": 22.0}},
        {("raspberry-pi-4b", "onnx"): {"min_sqnr_db": None}},
    )
    assert budget.limits("other", "onnx")["min_sqnr_db"] == 20
    assert budget.limits("raspberry-pi-4b", "tflite") == {
        "min_sqnr_db": 22,
        "max_bytes": 1e6,
    }
    assert "min_sqnr_db" not in budget.limits("raspberry-pi-4b", "onnx")


def test_options_that_were_not_given_leave_the_budget_alone() -> None:
    budget = Budget({"min_sqnr_db": 20.0}).with_limits(min_sqnr_db=None, min_speedup=1.2)
    assert budget.gates == {"min_sqnr_db": 20.0, "min_speedup": 1.2}


def test_a_section_without_a_result_is_refused() -> None:
    results = report().results
    Budget(devices={"raspberry-pi-4b": {"max_bytes": 10.0}}).check_sections(results)
    with pytest.raises(TightfitError, match="raspbery-pi-4b"):
        Budget(devices={"raspbery-pi-4b": {"max_bytes": 10.0}}).check_sections(results)
    with pytest.raises(TightfitError, match=r"raspberry-pi-4b\.coreml"):
        Budget(targets={("raspberry-pi-4b", "coreml"): {}}).check_sections(results)


@given(st.floats(0.1, 160), st.floats(-20, 160))
def test_the_sqnr_gate_is_exactly_a_comparison(limit: float, value: float) -> None:
    rows = judged({"min_sqnr_db": limit}, drift={"stages": [stage("artifact", value)]})
    assert rows["min_sqnr_db"].passed == (value >= limit)


def ran(**changes: Any) -> dict[str, Any]:
    """A result that ran on an emulated board and on a real one, where it is slower and drifts more."""
    runs = [device_run(), device_run("ssh://pi", emulated=False, **changes)]
    return {"runs": runs}


def on(limits: dict[str, float | None], address: str = "ssh://pi", **changes: Any) -> dict[str, GateResult]:
    made = Result.model_validate(result(**changes))
    rows = evaluate(made, Budget(on={address: limits}))
    return {row.gate: row for row in rows if row.subject == f"raspberry-pi-4b/tflite on {address}"}


def test_limits_on_an_address_judge_what_was_measured_there_and_not_here() -> None:
    there = ran(latency=latency(p50_ms=8.0, where="ssh://pi"), latency_note=None)
    assert on({"max_p50_ms": 8.1}, **there)["max_p50_ms"].passed
    failed = on({"max_p50_ms": 7.9}, **there)["max_p50_ms"]
    assert not failed.passed
    assert failed.value == 8.0
    assert on({"min_sqnr_db": 20.0}, **there)["min_sqnr_db"].value == 25.5
    assert on({"max_instructions": 12_345_678}, "emulated:raspberry-pi-4b", **there)["max_instructions"].passed


def test_an_emulated_board_has_no_latency_to_hold_to_a_limit() -> None:
    found = on({"max_p50_ms": 1e6}, "emulated:raspberry-pi-4b", **ran())["max_p50_ms"]
    assert not found.passed
    assert "emulated" in found.reason


def test_an_address_without_a_run_fails_with_the_option_that_is_missing() -> None:
    found = on({"max_p50_ms": 5.0}, "ssh://elsewhere", **ran())["max_p50_ms"]
    assert not found.passed
    assert "--on ssh://elsewhere" in found.reason


def test_not_to_run_where_it_was_asked_to_is_a_failed_gate() -> None:
    broken = {"failure": "no runtime there", "drift": None, "samples": 0}
    assert on({}, **ran())["runs"].passed
    failed = on({"min_sqnr_db": 1.0}, **ran(**broken))
    assert not failed["runs"].passed
    assert failed["runs"].reason == "no runtime there"
    assert not failed["min_sqnr_db"].passed


def test_limits_at_an_address_are_for_what_can_be_run_elsewhere() -> None:
    package = {"artifact": "iphone-a17-pro/resnet20.mlpackage", "target": "coreml"}
    made = Result.model_validate(result(**package))
    budget = Budget(on={"ssh://pi": {"min_sqnr_db": 20.0}})
    assert not [row for row in evaluate(made, budget) if "ssh://pi" in row.subject]
    with pytest.raises(TightfitError, match="ssh://pi, where none of these artifacts can be run"):
        budget.check_sections([made])
    budget.check_sections([made, Result.model_validate(result())])


@pytest.mark.parametrize("gate", [g.name for g in GATES.values() if not g.elsewhere])
def test_a_limit_at_an_address_on_what_is_measured_here_alone_is_refused(gate: str) -> None:
    with pytest.raises(TightfitError, match=f"{gate}, which a run at an address does not measure"):
        Budget(on={"ssh://pi": {gate: None}})
