"""Several conversions side by side: what meets the budget, what is best and why, what changed; and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from made_reports import latency, report, result, stage
from three_devices import board_run, counted_run, three_by_three, timed, void_run, write

from convert.errors import TightfitError
from convert.report.across.build import across, compared
from convert.report.across.gather import Given, gather
from convert.report.across.page import best_place
from convert.report.across.schema import Across
from convert.report.schema import Report


def side_by_side(*reports: Report, budget: Path | None = None) -> Across:
    given = [Given(f"out-{index}", made) for index, made in enumerate(reports, 1)]
    return compared(given, budget, "tightfit report")


def of(*results: dict[str, Any], **changes: Any) -> Across:
    return side_by_side(report(*results, **changes))


def pi(target: str, **changes: Any) -> dict[str, Any]:
    """A good result on the Pi without anything measured elsewhere."""
    return result(target=target, artifact=f"a.{target}", **{"instructions": None} | changes)


def drift(sqnr_db: float) -> dict[str, Any]:
    return {"stages": [stage("artifact", sqnr_db)]}


# what is best


def test_the_fastest_on_a_device_is_best_whatever_its_size() -> None:
    made = of(pi("onnx", bytes=100, runs=[board_run(7.0, 12.0)]), pi("tflite", bytes=200, runs=[board_run(6.0, 12.0)]))
    assert made.entry(made.choices[0].entry or 0).target == "tflite"
    assert made.choices[0].rule == "fastest on ssh://pi@kitchen: 6.00 ms, next 7.00 ms"


def test_without_a_time_there_the_fewest_instructions_decide() -> None:
    made = of(
        pi("onnx", bytes=100, runs=[counted_run("raspberry-pi-4b", 9.0, 30.0)]),
        pi("tflite", bytes=200, runs=[counted_run("raspberry-pi-4b", 8.0, 30.0)]),
    )
    assert made.entry(made.choices[0].entry or 0).target == "tflite"
    assert "fewest instructions on emulated:raspberry-pi-4b: 8.00 million" in made.choices[0].rule
    assert "not a time" in made.choices[0].rule


def test_times_on_the_host_decide_nothing() -> None:
    made = of(pi("onnx", bytes=100, latency=timed(9.0, 12.0)), pi("tflite", bytes=200, latency=timed(1.0, 12.0)))
    assert made.entry(made.choices[0].entry or 0).target == "onnx"
    assert made.choices[0].rule.startswith("fewest bytes: 100 B, next 200 B")


def test_a_time_on_this_machine_by_its_address_is_no_time_on_a_device() -> None:
    made = of(pi("onnx", bytes=100, runs=[board_run(9.0, 12.0, "local")]), pi("tflite", bytes=200))
    assert made.choices[0].rule.startswith("fewest bytes")
    assert best_place(made.entries[0]) is None


@pytest.mark.parametrize(
    "run",
    [void_run(), board_run(1.0, 12.0, board=[{"moment": "after", "throttled": "hot"}]),
     board_run(1.0, 12.0, latency=timed(1.0, 12.0, "ssh://pi@kitchen", stable=False, warnings=["unstable"]))],
)  # fmt: skip
def test_a_time_that_is_void_throttled_or_unstable_wins_nothing(run: dict[str, Any]) -> None:
    made = of(pi("onnx", runs=[run]), pi("tflite", runs=[board_run(6.0, 12.0)]))
    assert made.entry(made.choices[0].entry or 0).target == "tflite"
    assert "not measured there: 1 raspberry-pi-4b/onnx" in made.choices[0].rule


def test_what_fails_is_never_best_and_where_all_fail_none_is() -> None:
    gate = {"gate": "min_sqnr_db", "limit": 30, "value": 26.9, "passed": False, "reason": "26.9, wanted at least 30"}
    fast = pi("onnx", bytes=1, runs=[board_run(1.0, 12.0)], gates=[gate])
    made = of(fast, pi("tflite"))
    assert made.entry(made.choices[0].entry or 0).target == "tflite"
    none = of(fast)
    assert none.choices[0].entry is None
    assert none.entries[0].reasons == ("min_sqnr_db: 26.9, wanted at least 30",)


def test_an_artifact_that_met_its_gates_comes_before_one_that_nobody_judged() -> None:
    made = of(pi("onnx", bytes=1, gates=[]), pi("tflite", bytes=2))
    assert made.entry(made.choices[0].entry or 0).target == "tflite"
    alone = of(pi("onnx", gates=[]))
    assert alone.choices[0].rule == "the only one that does not fail; no gate was set, so none was met"


def test_having_run_somewhere_is_no_budget() -> None:
    ran = {"gate": "runs", "limit": 1, "value": 1, "passed": True}
    assert of(pi("onnx", gates=[ran])).entries[0].judgement == "unjudged"


def test_slower_than_float_and_unlike_its_simulation_fail_without_gates() -> None:
    slow = latency(p50_ms=1.62, speedup=0.834, ratio_interval=[0.7, 0.95])
    match = {**result()["match"], "exact": False, "within_one_step": False, "share_equal": 0.1, "reason": "a bug"}
    made = of(pi("onnx", gates=[], latency=slow), pi("tflite", gates=[], match=match))
    assert [e.reasons for e in made.entries] == [("slower than float",), ("it differs from its simulation: a bug",)]


# budgets


def test_a_budget_judges_in_place_of_the_recorded_gates(tmp_path: Path) -> None:
    budget = tmp_path / "budget.toml"
    budget.write_text("version = 1\n[gates]\nmin_sqnr_db = 26\n[device.raspberry-pi-5]\nmin_sqnr_db = 30\n")
    made = side_by_side(three_by_three(), budget=budget)
    verdicts = {(e.device, e.target): e.judgement for e in made.entries}
    assert verdicts["raspberry-pi-4b", "onnx"] == "meets"
    assert verdicts["raspberry-pi-4b", "coreml"] == "fails"  # 25.2 dB
    assert verdicts["raspberry-pi-5", "onnx"] == "fails"  # 27.4 dB
    assert verdicts["jetson-orin-nano", "coreml"] == "fails"
    assert made.budget == str(budget)


def test_a_limit_at_an_address_is_judged_there(tmp_path: Path) -> None:
    budget = tmp_path / "budget.toml"
    budget.write_text('version = 1\n[on."ssh://pi@kitchen"]\nmax_p50_ms = 7\n')
    made = side_by_side(
        report(pi("onnx", runs=[board_run(7.9, 14.0)]), pi("tflite", runs=[board_run(6.1, 14.0)])), budget=budget
    )
    assert [e.judgement for e in made.entries] == ["fails", "meets"]
    assert made.entries[0].reasons[0].startswith("max_p50_ms on ssh://pi@kitchen: 7.9")


def test_a_budget_for_a_device_that_nobody_converted_for_is_refused(tmp_path: Path) -> None:
    budget = tmp_path / "budget.toml"
    budget.write_text("version = 1\n[device.coral-edgetpu]\nmin_sqnr_db = 20\n")
    with pytest.raises(TightfitError, match="coral-edgetpu, for which there is no result"):
        side_by_side(three_by_three(), budget=budget)


# history


def test_the_last_folder_stands_for_an_artifact_and_the_earlier_ones_are_its_history() -> None:
    made = side_by_side(three_by_three(0.9), three_by_three(1.0))
    assert [e.number for e in made.current] == list(range(1, 10))
    assert {e.folder for e in made.current} == {"out-2"}
    assert len(made.histories) == 9
    first = made.histories[0]
    assert [p.folder for p in first.points] == ["out-1", "out-2"]
    assert first.p50_where == "ssh://pi@kitchen"
    assert [p.p50_ms for p in first.points] == pytest.approx([7.11, 7.9])
    assert first.worse == (
        "size: 298 kB before, 331 kB now",
        "time: 7.11 ms before, 7.90 ms now",
        "instructions: 16.3 million before, 18.1 million now",
    )


def test_what_stayed_or_got_better_is_not_called_worse() -> None:
    assert not any(h.worse for h in side_by_side(three_by_three(), three_by_three()).histories)
    assert not any(h.worse for h in side_by_side(three_by_three(1.2), three_by_three()).histories)


def test_drift_that_got_worse_is_told_and_rounding_is_not() -> None:
    made = side_by_side(report(pi("onnx", drift=drift(27.0))), report(pi("onnx", drift=drift(25.5))))
    assert made.histories[0].worse == ("drift: 27.0 dB before, 25.5 dB now",)
    rounding = side_by_side(report(pi("onnx", drift=drift(150.0))), report(pi("onnx", drift=drift(130.0))))
    assert rounding.histories[0].worse == ()


def test_drift_on_other_samples_is_not_called_worse() -> None:
    other = {"samples": 5, "fingerprint": "11", "source": "other.npz", "labelled": False}
    made = side_by_side(report(pi("onnx", drift=drift(27.0))), report(pi("onnx", drift=drift(20.5)), evaluation=other))
    assert made.histories[0].worse == ()


def test_an_unstable_time_is_not_called_worse() -> None:
    slow = timed(2.0, 4.0, stable=False, warnings=["unstable"])
    made = side_by_side(report(pi("onnx", latency=timed(1.0, 4.0))), report(pi("onnx", latency=slow)))
    assert made.histories[0].worse == ()


def test_times_of_two_processors_are_not_put_in_one_row() -> None:
    made = side_by_side(
        report(pi("onnx", latency=timed(1.0, 4.0, cpu="old"))), report(pi("onnx", latency=timed(2.0, 4.0, cpu="new")))
    )
    assert [p.p50_ms for p in made.histories[0].points].count(None) == 1


def test_another_recipe_is_a_rival_and_no_earlier_version() -> None:
    made = side_by_side(report(pi("onnx")), report(pi("onnx", recipe="w4", bytes=9)))
    assert [e.current for e in made.entries] == [True, True]
    assert made.entry(made.choices[0].entry or 0).recipe == "w4"


def test_other_samples_weights_and_hosts_are_warned_of() -> None:
    other = report(
        model={"name": "resnet20", "parameters": 1, "fingerprint": "00"},
        evaluation={"samples": 5, "fingerprint": "11", "source": "other.npz", "labelled": False},
        environment={"python": "3.11", "packages": {}, "os": "Linux", "cpu": "EPYC"},
        calibration={"samples": 2, "fingerprint": "22", "synthetic": True},
    )
    text = " ".join(side_by_side(report(), other).warnings)
    for words in ("different evaluation samples", "different weights", "different hosts", "random numbers"):
        assert words in text
    assert side_by_side(report(), report()).warnings == ()


# files


def test_three_files_are_written_with_the_same_numbers(tmp_path: Path) -> None:
    folders = [write(tmp_path / "monday", three_by_three(0.9)), write(tmp_path / "tuesday")]
    made = across(folders, tmp_path / "out", None, force=False, command="tightfit report")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.csv", "report.html", "report.json"]
    assert Across.model_validate_json((tmp_path / "out" / "report.json").read_bytes()) == made
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(entry.places) for entry in made.entries) == 2 * (9 + 8)
    row = next(r for r in rows if r["number"] == "2" and r["where"] == "ssh://pi@kitchen")
    assert (row["p50_ms"], row["device"], row["current"], row["stable"]) == ("6.1", "raspberry-pi-4b", "true", "true")
    failed = next(r for r in rows if r["outcome"] == "failed")
    assert (failed["p50_ms"], failed["sqnr_db"]) == ("", "")
    assert "has no runtime" in failed["note"]


def test_text_that_a_spreadsheet_would_compute_is_quoted(tmp_path: Path) -> None:
    made = report(pi("onnx", recipe="=1+1"))
    across([write(tmp_path / "a", made)], tmp_path / "out", None, force=False, command="")
    assert "'=1+1" in (tmp_path / "out" / "report.csv").read_text(encoding="utf-8")


def test_an_earlier_report_is_replaced_only_with_force(tmp_path: Path) -> None:
    folder, out = write(tmp_path / "a"), tmp_path / "out"
    across([folder], out, None, force=False, command="first")
    with pytest.raises(TightfitError, match="exists already"):
        across([folder], out, None, force=False, command="second")
    across([folder], out, None, force=True, command="third")
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["command"] == "third"


def test_force_deletes_no_conversion_and_no_foreign_file(tmp_path: Path) -> None:
    folder, out = write(tmp_path / "a"), tmp_path / "out"
    with pytest.raises(TightfitError, match="will not delete"):
        across([folder], folder, None, force=True, command="")
    across([folder], out, None, force=False, command="")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(TightfitError, match="will not delete"):
        across([folder], out, None, force=True, command="")
    assert (out / "notes.txt").read_text() == "mine"
    assert (folder / "report.html").exists()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.report.store.os.fsync", full)
    with pytest.raises(TightfitError, match="disk is full"):
        across([folder], tmp_path / "out", None, force=False, command="")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# what is refused


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    good, empty, damaged, newer = (tmp_path / name for name in ("good", "empty", "damaged", "newer"))
    write(good)
    for folder in (empty, damaged, newer):
        folder.mkdir()
    (damaged / "report.json").write_text('{"schema_version": 1')
    (newer / "report.json").write_text('{"schema_version": 9}')
    for folders, message in (
        ([good, empty], "empty was not made by `tightfit convert`: it has no report.json"),
        ([good, tmp_path], f"several results; name them: {damaged} {good} {newer}"),
        ([good, tmp_path / "none"], "there is no folder"),
        ([good / "report.json"], "is a file. Name the folder"),
        ([good, damaged], "damaged/report.json is not a report"),
        ([good, newer], "newer/report.json has schema_version 9; this Tightfit reads 1"),
        ([good, good], "good is given twice"),
        ([good, tmp_path / "empty" / ".." / "good"], "are the same folder"),
    ):
        with pytest.raises(TightfitError) as caught:
            gather(folders)
        assert message in str(caught.value)


def test_a_report_across_conversions_is_no_conversion(tmp_path: Path) -> None:
    across([write(tmp_path / "a")], tmp_path / "out", None, force=False, command="")
    with pytest.raises(TightfitError, match="compares several conversions"):
        gather([tmp_path / "out"])
