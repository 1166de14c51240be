"""What a newcomer sees on a terminal of 80 columns: whole names, reasons, and nothing cut off."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from made_reports import latency, report, result
from rich.console import Console

from convert import console, inspection_view, listings
from convert.errors import TightfitError
from convert.report.schema import GateResult
from device_profiles import load, names

WIDTH = 80


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was printed so far, on a terminal as wide as `WIDTH`."""
    paper = io.StringIO()
    narrow = Console(file=paper, width=WIDTH, highlight=False, color_system=None)
    monkeypatch.setattr(console, "out", narrow)
    monkeypatch.setattr(listings, "out", narrow)
    return paper.getvalue


def gate(name: str, passed: bool, subject: str = "raspberry-pi-4b/tflite", reason: str = "") -> GateResult:
    return GateResult(subject=subject, gate=name, limit=100_000.0, value=115_768.0, passed=passed, reason=reason)


def test_a_long_device_and_full_marks_fit_one_line_each(printed: Callable[[], str]) -> None:
    perfect = {"float": 1.0, "artifact": 1.0, "samples": 9, "classes": 3}
    name = max(names(), key=len)
    made = report(result(device=name, recipe="auto: int8-dynamic", accuracy=perfect, latency=latency(stable=False)))
    console.out.print(console.results_table(made))
    lines = printed().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert any(line.startswith(name) and "100.00 → 100.00" in line and "~2.10x" in line for line in lines)
    assert any(line.strip() == "tflite int8-dynamic" for line in lines)


def test_a_result_that_nothing_could_time_says_so(printed: Callable[[], str]) -> None:
    console.show_report(
        report(result(latency=None, latency_note="not measured: reference executor")), Path("out"), False
    )
    assert "not timed" in printed()
    assert "nothing on this machine runs it" in printed()


def test_verdicts_stand_under_their_artifact_with_reasons_below(printed: Callable[[], str], tmp_path: Path) -> None:
    gates = [
        gate("integrity", True),
        gate("max_bytes", False, reason="115768, wanted at most 100000"),
        gate("integrity", True, subject="jetson-nano/onnx"),
    ]
    assert console.show_gates(gates, tmp_path, None, None, False) is False
    lines = printed().splitlines()
    assert lines[0] == "raspberry-pi-4b/tflite"
    assert lines[2].split() == ["FAIL", "max_bytes", "115,768", "limit", "100,000"]
    assert lines[3].strip() == "115768, wanted at most 100000"
    assert lines[4] == "jetson-nano/onnx"
    assert lines[-1] == "1 of 3 gates failed"


def test_numbers_keep_their_digits() -> None:
    shown = [console._number(x) for x in (None, 115_768.0, 121_556.4, 0.052195, 35.0162, float("inf"))]
    assert shown == ["-", "115,768", "121,556", "0.052195", "35.016", "inf"]


def test_every_device_is_listed_with_its_whole_name(printed: Callable[[], str]) -> None:
    listings.show_devices(json=False)
    lines = printed().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [name for name in names() if not any(line.startswith(name + "  ") for line in lines)] == []


@pytest.mark.parametrize("name", names())
def test_a_device_shows_every_source_and_what_is_unverified(name: str, printed: Callable[[], str]) -> None:
    listings.show_device(name, json=False)
    text = printed()
    facts, _, sources = text.partition("\nsources")
    profile = load(name)
    own = [field for field in profile.facts() if not field.startswith("targets.")]
    found = {(profile.source(field) or "") for field in own}
    assert max(map(len, text.splitlines())) <= WIDTH
    assert [n for n in range(1, len(found) + 1) if f"  {n}  " not in sources] == []
    assert ("?]" in facts) == any(source.startswith("unverified") for source in found)
    assert facts.count(", the default") == 1


def test_an_unknown_device_suggests_the_nearest() -> None:
    with pytest.raises(TightfitError, match="raspberry-pi-5"):
        listings.show_device("raspbery-pi-5", json=False)


@pytest.mark.parametrize("show", [listings.show_steps, listings.show_targets, listings.show_doctor])
def test_listings_fit_the_terminal(show: Callable[[bool], object], printed: Callable[[], str]) -> None:
    show(False)
    assert max(map(len, printed().splitlines())) <= WIDTH


def test_recipes_and_steps_carry_their_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    listings.show_steps(json=True)
    shown = json.loads(capsys.readouterr().out)
    wanted = {"int8", "int8-dynamic", "int8-weights", "float16", "float32"}
    wanted |= {"w4a8", "w4", "w2", "w8a16", "fp8", "mixed", "palette4"}
    wanted |= {"binary", "ternary", "binary-planes", "mixed-binary", "binary-full", "binary-embedding"}
    wanted |= {"prune-zero-tprune", "prune-evit", "prune-text", "merge-tome", "merge-mctf", "cluster-tokens"}
    wanted |= {"merge-pyra", "super-tokens"}
    assert set(shown["recipes"]) == wanted
    assert all(shown["steps"].values())
    assert all(recipe["summary"] for recipe in shown["recipes"].values())


def test_long_names_of_layers_break_where_they_are_joined() -> None:
    name = "encoder.layers.0.self_attn.scaled_dot_product_attention"
    lines = inspection_view._broken(name).splitlines()
    assert max(map(len, lines)) <= inspection_view.NAME_WIDTH
    assert "".join(line.strip() for line in lines) == name
    assert all(line.endswith((".", "_")) for line in lines[:-1])
    assert inspection_view._broken("stem.0") == "stem.0"


def test_the_rest_is_estimated_from_the_pace_of_this_piece_of_work_alone() -> None:
    now = [0.0]
    remaining = console.Remaining(lambda: now[0])
    assert remaining.text(0, 100, "ranges") == ""
    now[0] = 1.0
    assert remaining.text(50, 100, "ranges") == ""  # too soon to say
    now[0] = 10.0
    assert remaining.text(50, 100, "ranges") == "about 10 s left"
    now[0] = 1000.0
    assert remaining.text(75, 100, "ranges") == "about 6 min left"  # 333 s
    assert remaining.text(3, 100, "gptq") == ""  # other work starts anew
    now[0] = 1005.0
    assert remaining.text(13, 100, "gptq") == "about 44 s left"
    assert remaining.text(13, None, "gptq") == ""
    assert remaining.text(100, 100, "gptq") == ""


def test_what_float_outruns_is_said_to_have_failed_beside_its_passed_gates(printed: Callable[[], str]) -> None:
    passed = [gate("max_bytes", True).model_dump()]
    slow = latency(speedup=0.8, ratio_interval=[0.78, 0.82])
    console._print_results(report(result(gates=passed, latency=slow)))
    assert "all 1 gates passed" in printed()
    assert "1 of 1 artifact failed: raspberry-pi-4b/tflite (slower than float)" in printed()


def test_nothing_is_said_to_have_failed_where_float_is_slower(printed: Callable[[], str]) -> None:
    console._print_results(report(result(gates=[gate("max_bytes", True).model_dump()])))
    assert "failed" not in printed()
