"""The Markdown views: they fit a comment, and a failure cannot be overlooked."""

from made_reports import latency, report, result

from convert.report.comment import COMMENT_LIMIT
from convert.report.gates_markdown import gates_markdown
from convert.report.markdown import markdown
from convert.report.schema import GateResult

FAILED = {"gate": "min_speedup", "limit": 1.0, "value": 0.8, "passed": False, "reason": "0.8, wanted at least 1"}


def test_a_good_report_is_a_verdict_and_one_table() -> None:
    text = markdown(report())
    assert text.startswith("### ✅ resnet20: The artifact passed every gate")
    for number in ("26.9 dB", "91.80 %", "−0.15", "312 kB (0.29)", "2.10x as fast", "31 / 1 / 1", "bit-exact"):
        assert number in text
    assert "Failed gates" not in text
    assert len(text.splitlines()) < 60


def test_a_failure_and_a_warning_are_shown() -> None:
    slow = result(gates=[FAILED], latency=latency(speedup=0.8, ratio_interval=[0.7, 0.9], stable=False))
    text = markdown(report(slow, warnings=["Calibrated on synthetic data"]))
    assert text.startswith("### ❌")
    assert "`min_speedup`: 0.8, wanted at least 1" in text
    assert "0.80x, slower, unstable" in text
    assert "Calibrated on synthetic data" in text


def test_nothing_judged_is_not_called_passed() -> None:
    text = markdown(report(result(gates=[])))
    assert "nothing was judged" in text
    assert "✅" not in text


def test_an_artifact_unlike_its_simulation_is_a_failure_without_gates() -> None:
    match = {**result()["match"], "exact": False, "within_one_step": False, "share_equal": 0.1, "reason": "bug"}
    assert markdown(report(result(gates=[], match=match))).startswith("### ❌")


def test_any_report_fits_a_comment() -> None:
    gates = [{**FAILED, "reason": "long " * 2000} for _ in range(200)]
    many = [result(device=f"device-{i}", gates=gates) for i in range(100)]
    text = markdown(report(*many, warnings=["w" * 5000] * 300))
    assert len(text) < COMMENT_LIMIT
    assert "report.json" in text


def test_foreign_text_stays_text() -> None:
    name = "<script>alert(1)</script> @team | x `y` *z*\n# big"
    text = markdown(report(model={"name": name, "parameters": 1, "fingerprint": "0"}))
    first = text.splitlines()[0]
    assert "<script>" not in text
    assert "@team" not in text
    assert "\\| x \\`y\\` \\*z\\* \\# big" in first


def test_a_check_lists_failures_first() -> None:
    good = GateResult(gate="max_bytes", limit=10, value=5, passed=True, subject="pi/tflite")
    text = gates_markdown([good, GateResult.model_validate(FAILED)])
    assert "1 of 2 gates failed" in text
    assert text.index("min_speedup") < text.index("max_bytes")
    assert "all 1 gates passed" in gates_markdown([good])
    assert "❌" in gates_markdown([])
