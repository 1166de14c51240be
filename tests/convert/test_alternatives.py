"""What auto does where a plan was measured slower than float; and that no verdict is good where float is faster."""

import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import cnn, prepared

from convert import artifact
from convert.alternatives import alternatives
from convert.compress import Builder, Judge, depends_on_company
from convert.options import Options
from convert.pipeline import convert
from convert.planning import decide
from convert.report import words
from convert.report.schema import Latency, Report
from device_profiles import load

X86 = platform.machine() in ("x86_64", "AMD64")


def timed(speedup: float, stable: bool = True) -> Latency:
    """A timing with this speed-up, known to 2 %."""
    float_ms = {f"float_{name}": 1.0 for name in ("p50_ms", "p90_ms", "p99_ms")}
    ours = dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"), 1.0 / speedup)
    counts = {"runs": 100, "float_runs": 100, "cv": 0.01, "float_cv": 0.01}
    where = {"where": "host", "threads": 1, "cpu": "made", "stable": stable}
    return Latency(
        **float_ms, **ours, **counts, **where, speedup=speedup, ratio_interval=(speedup * 0.98, speedup * 1.02)
    )  # type: ignore[arg-type]


def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timings: list[Latency], **options: object) -> Report:
    """The report on a small CNN for x86 whose artifacts are timed as `timings` says, one after the other."""
    remaining: Iterator[Latency] = iter(timings)
    monkeypatch.setattr(artifact, "measure", lambda *a, **k: next(remaining))
    program = torch.export.export(
        cnn().eval(), (torch.zeros(2, 3, 12, 12),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, tmp_path / "net.pt2")
    np.savez(tmp_path / "data.npz", input=np.random.default_rng(0).standard_normal((40, 3, 12, 12), dtype=np.float32))
    given = {"devices": ("generic-x86",), "effort": "fast", **options}
    return convert(
        Options(str(tmp_path / "net.pt2"), out=tmp_path / "out", calibration=str(tmp_path / "data.npz"), **given)  # type: ignore[arg-type]
    )


@pytest.mark.skipif(not X86, reason="times here speak for x86 devices on x86 alone")
def test_plans_slower_than_float_are_replaced_and_the_report_says_by_what_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = converted(tmp_path, monkeypatch, [timed(0.5), timed(0.6), timed(0.7), timed(1.0)])
    (result,) = report.results
    assert result.recipe == "auto: float32"
    assert "int8 was measured at 0.50x" in result.recipe_reason
    assert "int8-dynamic was measured at 0.70x" in result.recipe_reason
    assert not words.slower(result)


@pytest.mark.skipif(not X86, reason="times here speak for x86 devices on x86 alone")
@pytest.mark.parametrize(
    "times",
    [[timed(1.4)], [timed(0.5, stable=False), timed(1.2)], [timed(1.2, stable=False), timed(0.5, stable=False)]],
    ids=["faster", "a disturbance", "two that disagree"],
)
def test_a_plan_that_is_faster_or_of_which_nothing_is_known_stays(
    times: list[Latency], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (result,) = converted(tmp_path, monkeypatch, times).results
    assert result.recipe == "auto: int8"
    assert "was measured" not in result.recipe_reason


@pytest.mark.skipif(not X86, reason="times here speak for x86 devices on x86 alone")
def test_of_two_unstable_times_both_have_to_say_that_a_plan_is_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaky = [timed(0.5, stable=False), timed(0.6, stable=False)]
    (result,) = converted(tmp_path, monkeypatch, [*shaky, timed(1.3)]).results
    assert "int8 was measured at 0.60x" in result.recipe_reason


@pytest.mark.parametrize("recipe", ["int8", "int8-weights"])
def test_a_recipe_asked_for_stays_but_its_verdict_is_not_good(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = converted(tmp_path, monkeypatch, [timed(0.5)], recipe=recipe)
    assert report.results[0].recipe == recipe
    assert words.verdict(report) == "1 of 1 artifact failed: generic-x86/onnx (slower than float)"
    assert any("slower than float here (0.50x" in w for w in report.warnings)


def test_a_time_that_says_nothing_of_the_device_decides_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = converted(tmp_path, monkeypatch, [timed(0.5)], devices=("jetson-orin-nano",), recipe="int8")
    assert not words.slower(report.results[0])


def test_a_time_with_exact_sums_decides_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = converted(tmp_path, monkeypatch, [timed(0.5)], recipe="int8").results
    assert words.slower(result)  # the control
    exact = result.model_copy(update={"executor": "ONNX Runtime 1.32.0 (exact sums)"})
    assert not words.slower(exact)
    assert "not with its fast kernels" in words.elsewhere(exact)


def test_a_budget_is_met_by_the_plan_asked_for_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = converted(tmp_path, monkeypatch, [timed(0.5)] * 4, budget_mib=0.1)
    assert report.results[0].recipe == "auto: int8"
    assert "Mixed precision within 0.1 MiB" in report.results[0].recipe_reason


def test_float_comes_last_and_a_recipe_by_name_has_no_alternative() -> None:
    model, _ = prepared(cnn(), torch.zeros(2, 3, 12, 12))
    names = [d.recipe for d in alternatives(model, load("generic-x86"), "onnx", "auto")]
    assert names[0] == "auto: int8"
    assert names[-1] == "auto: float32"
    assert [d.recipe for d in alternatives(model, load("generic-x86"), "onnx", "int8")] == ["int8"]


def test_ranges_at_run_time_are_judged_in_the_artifacts_own_batch() -> None:
    model, data = prepared(cnn(), torch.zeros(2, 3, 12, 12))
    data.array[-1] *= 50  # one sample that would stretch the range of all in its batch
    decision = decide(model.graph, load("generic-x86"), "onnx", "int8-dynamic")
    made = Builder(model, data).build(decision)
    assert depends_on_company(made.graph)
    alone, together = Judge(model, data, batch=1).score(made.graph), Judge(model, data, batch=16).score(made.graph)
    assert alone > together + 1
    static = Builder(model, data).build(decide(model.graph, load("generic-x86"), "onnx", "int8"))
    assert not depends_on_company(static.graph)
