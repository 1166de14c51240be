"""Baselines: each way of getting worse fails, and only those."""

from typing import Any

import pytest
from made_reports import instructions, report, result, stage

from convert.baseline import Tolerances, compare
from convert.errors import TightfitError


def failures(changes: dict[str, Any], before: dict[str, Any] | None = None) -> set[str]:
    rows = compare(report(result(**changes)), report(result(**(before or {}))))
    assert all(row.reason for row in rows if not row.passed)
    return {row.gate for row in rows if not row.passed}


def drift(sqnr_db: float | None, **changes: Any) -> dict[str, Any]:
    return {"drift": {"stages": [stage("artifact", sqnr_db, **changes)]}}


def test_a_report_is_no_worse_than_itself() -> None:
    rows = compare(report(), report())
    assert len(rows) == 6
    assert all(row.passed for row in rows)


def test_more_drift_fails_beyond_its_tolerance() -> None:
    assert failures(drift(25.0)) == {"baseline_sqnr_db"}
    assert failures(drift(26.0)) == set()  # within 1 dB
    assert failures(drift(40.0)) == set()


def test_an_exact_baseline_forgives_float_rounding_but_not_noise() -> None:
    assert failures(drift(130.0, top1_agreement=1.0), drift(None)) == set()
    assert failures(drift(60.0, top1_agreement=1.0), drift(None)) == {"baseline_sqnr_db"}


def test_lost_accuracy_and_agreement_fail() -> None:
    accuracy = {**result()["accuracy"], "artifact": 0.9}
    assert failures({"accuracy": accuracy}) == {"baseline_accuracy"}
    assert failures(drift(26.9, top1_agreement=0.9)) == {"baseline_agreement"}


def test_a_metric_that_is_no_longer_measured_fails() -> None:
    assert failures({"accuracy": None}) == {"baseline_accuracy"}
    assert failures(drift(float("nan"), cosine=None, max_abs=None)) == {"baseline_sqnr_db"}


def test_growth_and_fallbacks_fail() -> None:
    assert failures({"bytes": 312_448 * 2}) == {"baseline_bytes"}
    assert failures({"bytes": int(312_448 * 1.04)}) == set()
    more = {**result()["placement"], "fallbacks": [{"node": n, "reason": "r"} for n in "ab"]}
    assert failures({"placement": more}) == {"baseline_fallbacks"}


def test_a_missing_result_fails_and_a_new_one_does_not() -> None:
    both = report(result(), result(target="onnx"))
    rows = compare(report(), both)
    assert [(r.gate, r.subject) for r in rows if not r.passed] == [("baseline_result", "raspberry-pi-4b/onnx")]
    assert all(row.passed for row in compare(both, report()))


def test_reports_that_are_no_comparison_are_refused() -> None:
    other = report(model={"name": "vit", "parameters": 1, "fingerprint": "00"})
    with pytest.raises(TightfitError, match="same model"):
        compare(other, report())
    samples = {"samples": 10, "fingerprint": "11", "source": "x", "labelled": False}
    with pytest.raises(TightfitError, match="other evaluation samples"):
        compare(report(evaluation=samples), report())


@pytest.mark.parametrize("bad", [-1.0, float("inf"), float("nan")])
def test_a_tolerance_that_lets_everything_pass_is_refused(bad: float) -> None:
    with pytest.raises(TightfitError, match="sqnr_db"):
        Tolerances(sqnr_db=bad)


def test_a_wider_tolerance_is_used() -> None:
    worse = report(result(**drift(20.0)))
    assert not all(r.passed for r in compare(worse, report()))
    assert all(r.passed for r in compare(worse, report(), tolerances=Tolerances(sqnr_db=10)))


def test_more_instructions_on_the_same_board_fail_beyond_their_share() -> None:
    def counted(count: int, where: str = "emulated:raspberry-pi-4b") -> dict[str, Any]:
        return {"instructions": instructions(all=count, where=where)}

    name = "baseline_instructions on emulated:raspberry-pi-4b"
    assert failures(counted(1_019_000), counted(1_000_000)) == set()
    assert failures(counted(1_021_000), counted(1_000_000)) == {name}
    assert failures(counted(1_000_000, "emulated:raspberry-pi-5"), counted(1_000_000)) == {name}
    strict = Tolerances(instructions=0.001)
    rows = compare(report(result(**counted(1_002_000))), report(result(**counted(1_000_000))), tolerances=strict)
    assert {row.gate for row in rows if not row.passed} == {name}
