"""Runs elsewhere: this machine by the road of boards, and emulated boards where they are built."""

from dataclasses import replace
from pathlib import Path

import made_out
import numpy as np
import pytest
from made_reports import result

from convert.bench import bench
from convert.check import check
from convert.errors import MissingDependency, TightfitError
from convert.on_device import QUICK, Subject, left_here, refuse_unreachable, run_everywhere, with_runs
from convert.progress import Silent
from convert.record import read_record
from convert.report.runs import DeviceRun
from convert.report.schema import Result
from targets import emulator

HASTY = replace(QUICK, min_runs=20, min_seconds=0.0, warmup_seconds=0.0)
BOARDS = ("raspberry-pi-4b", "raspberry-pi-5")


def subject(changed: bool = False) -> Subject:
    """The demo's CNN in ONNX as converted, `changed`: with what it answered here put wrong."""
    (found,) = read_record(made_out.converted()).artifacts
    outputs = {name: array + (0.5 if changed else 0.0) for name, array in found.outputs.items()}
    return Subject(found.path, found.twin, found.batch, found.inputs, found.expected, outputs, True)


def runs(addresses: tuple[str, ...], what: Subject) -> list[DeviceRun]:
    found = run_everywhere(addresses, {"it": what}, threads=1, timing=HASTY, progress=Silent())
    return found["it"]


def test_a_run_is_compared_with_float_and_with_this_machine_and_timed() -> None:
    (run,) = runs(("local",), subject())
    assert run.failure is None
    assert run.drift is not None
    assert run.drift.sqnr_db is not None
    assert run.drift.sqnr_db > 3  # fast kernels, which saturate on an x86 without VNNI; this host takes exact sums
    assert (run.drift.on, run.drift.samples) == ("local", 20)
    assert run.host is not None
    assert run.latency is not None
    assert run.latency.speedup is not None
    assert run.latency.load_ms is not None
    assert run.instructions is None
    assert "emulator" in (run.instructions_note or "")


def test_outputs_that_differ_from_this_machines_are_not_called_the_same() -> None:
    (run,) = runs(("local",), subject(changed=True))
    assert run.host is not None
    assert not run.host.exact
    assert run.host.share_equal < 0.05


def test_what_fails_there_is_a_run_with_its_failure(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    (run,) = runs(("local",), replace(subject(), path=broken))
    assert run.drift is None
    assert "local" in (run.failure or "")


def test_a_result_has_its_runs_as_stages_and_the_artifact_stays_the_artifact() -> None:
    (found,) = read_record(made_out.converted()).artifacts
    made = with_runs(found.result, runs(("local",), subject()))
    assert [s.on for s in made.drift.stages][-2:] == [None, "local"]
    assert made.drift.artifact.stage == "artifact"
    assert len(made.runs) == 1
    assert with_runs(made, made.runs) == made


@pytest.mark.parametrize(
    ("addresses", "suffixes", "words"),
    [
        (["nowhere"], [".onnx"], "is no place to run"),
        (["emulated:rasberry-pi-4b"], [".onnx"], "raspberry-pi-4b"),
        (["local", "local"], [".onnx"], "given twice"),
        (["local"], [".mlpackage"], "nothing to run"),
        (["local:9"], [".onnx"], "local"),
    ],
)
def test_a_place_that_cannot_be_used_is_named_before_any_work(
    addresses: list[str], suffixes: list[str], words: str
) -> None:
    with pytest.raises(TightfitError, match=words):
        refuse_unreachable(addresses, suffixes)


def test_a_board_that_is_not_built_is_something_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    with pytest.raises(MissingDependency, match="tightfit emulator build raspberry-pi-4b"):
        refuse_unreachable(["emulated:raspberry-pi-4b"], [".onnx"])


def test_check_holds_a_place_to_its_limits(tmp_path: Path) -> None:
    out = made_out.copy(made_out.converted(), tmp_path)
    budget = tmp_path / "budget.toml"

    def failed(limits: str, *on: str) -> set[str]:
        budget.write_text(f"version = 1\n[on.local]\n{limits}\n")
        gates = check(out, budget, None, self_test=False, threads=1, progress=Silent(), on=on, quick=True)
        assert all(gate.reason for gate in gates if not gate.passed)
        return {gate.gate for gate in gates if not gate.passed}

    assert failed("min_sqnr_db = 3\nmax_p50_ms = 10_000", "local") == set()
    assert failed("min_sqnr_db = 90\nmax_p50_ms = 0.000001", "local") == {"min_sqnr_db", "max_p50_ms"}
    assert failed("min_sqnr_db = 3") == {"min_sqnr_db"}  # nothing ran there


def test_growth_of_instructions_needs_something_to_compare_with() -> None:
    out = made_out.converted()
    with pytest.raises(TightfitError, match="--baseline"):
        check(out, None, None, self_test=False, threads=1, progress=Silent(), instruction_regression=0.02)


def test_bench_runs_where_it_is_told_to() -> None:
    artifact = made_out.converted() / "raspberry-pi-4b" / "digits_cnn.onnx"
    found = bench(artifact, None, HASTY, on=("local",), threads=1, progress=Silent())
    assert found.latency is None
    (run,) = found.runs
    assert run.latency is not None
    assert run.samples == 20


def test_heat_is_watched_on_a_device_and_nowhere_else() -> None:
    artifact = made_out.converted() / "raspberry-pi-4b" / "digits_cnn.onnx"
    with pytest.raises(TightfitError, match="--on"):
        bench(artifact, None, replace(HASTY, sustained_minutes=1), threads=1, progress=Silent())


@pytest.mark.slow
def test_emulated_boards_answer_as_this_machine_and_count_the_same_twice() -> None:
    missing = [board for board in BOARDS if not emulator.is_built(board)]
    if missing:
        pytest.skip(f"not built: tightfit emulator build {' '.join(missing)}")
    places = tuple(f"emulated:{board}" for board in BOARDS)
    first, second = runs(places, subject()), runs(places, subject())
    for one, other in zip(first, second, strict=True):
        assert one.failure is None
        assert one.instructions is not None
        assert other.instructions is not None
        assert abs(one.instructions.all / other.instructions.all - 1) < 0.001
        assert one.latency is None
        assert one.host is not None
        assert np.isclose(one.host.share_equal, 1.0, atol=0.05)
    assert first[0].instructions is not None
    assert first[1].instructions is not None
    assert first[0].instructions.dot == 0
    assert (first[1].instructions.dot or 0) > 0


def test_an_artifact_that_cannot_be_carried_is_told_of() -> None:
    made = [Result.model_validate(result()), Result.model_validate(result(artifact="a/net.mlpackage", target="coreml"))]
    (said,) = left_here(made, ["ssh://pi"])
    assert "coreml: not run at ssh://pi: net.mlpackage cannot be run elsewhere" in said
    assert left_here(made, []) == []
