"""`check` on real conversions: what is whole passes, and each kind of damage fails at the gate that is there for it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_out
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert.check
import convert.rerun
import convert.self_test
from convert.check import check
from convert.errors import MissingDependency, TightfitError
from convert.output import file_hashes
from convert.progress import Silent
from convert.report.schema import GateResult
from targets import faults
from targets.errors import TargetError

SUBJECT = "raspberry-pi-4b/onnx"
OWN = ["integrity", "runs", "reproduces", "record"]
FAULTS = [
    "flipped-bit",
    "permuted-channels",
    "scaled-weight",
    "not-a-number",
    "truncated-file",
    "missing-file",
    "shuffled-inputs",
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A fresh copy of an ONNX conversion."""
    return made_out.copy(made_out.converted(), tmp_path)


def run(out: Path, budget: Path | None = None, baseline: Path | None = None, self_test: bool = False) -> dict:
    """The verdicts by "subject gate"; by gate alone for the one artifact of ONNX."""
    found = check(out, budget, baseline, self_test=self_test, threads=1, progress=Silent())
    return {g.gate if g.subject == SUBJECT else f"{g.subject} {g.gate}": g for g in found}


def failed(verdicts: dict) -> list[str]:
    return [name for name, verdict in verdicts.items() if not verdict.passed]


def artifact(out: Path) -> Path:
    return out / "raspberry-pi-4b" / "digits_cnn.onnx"


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_hashes(out: Path) -> None:
    """What somebody does who hides a change: the manifest's hashes of the artifact as it is now."""

    def change(manifest: Any) -> None:
        manifest["artifacts"]["onnx"]["sha256"] = file_hashes(artifact(out))

    edit_json(out / "raspberry-pi-4b" / "manifest.json", change)


def budget_file(folder: Path, text: str) -> Path:
    path = folder / "budget.toml"
    path.write_text("version = 1\n" + text)
    return path


def test_a_conversion_as_it_was_written_passes_every_gate(out: Path) -> None:
    verdicts = run(out)
    assert list(verdicts) == OWN
    assert failed(verdicts) == []
    assert verdicts["reproduces"].value == 0  # the same machine, the same kernels


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_change_of_any_byte_of_the_artifact_fails_integrity(out: Path, share: float, mask: int) -> None:
    path = artifact(out)
    content = path.read_bytes()
    changed = bytearray(content)
    changed[int(share * len(content))] ^= mask
    path.write_bytes(changed)
    try:
        assert "integrity" in failed(run(out))
    finally:
        path.write_bytes(content)


def test_a_changed_float_twin_fails_integrity(out: Path) -> None:
    twin = out / "raspberry-pi-4b" / "float" / "digits_cnn.onnx"
    twin.write_bytes(twin.read_bytes() + b"\0")
    verdicts = run(out)
    assert failed(verdicts) == ["integrity"]
    assert "float/digits_cnn.onnx changed" in verdicts["integrity"].reason


def test_a_truncated_artifact_fails_gates_and_raises_nothing(out: Path) -> None:
    path = artifact(out)
    path.write_bytes(path.read_bytes()[:5000])
    verdicts = run(out)
    assert set(OWN) <= set(failed(verdicts))
    assert verdicts["reproduces"].value is None
    assert "can't load" in verdicts["runs"].reason


def test_of_a_missing_artifact_nothing_is_said_that_was_not_measured(out: Path, tmp_path: Path) -> None:
    artifact(out).unlink()
    verdicts = run(out, budget_file(tmp_path, "[gates]\nmax_bytes = 1000000\nmax_size_ratio = 1"))
    assert set(failed(verdicts)) == set(verdicts)
    assert verdicts["max_bytes"].value is None
    assert "missing" in verdicts["max_bytes"].reason


def test_a_change_whose_hash_was_forged_fails_by_its_numbers(out: Path) -> None:
    faults.find("onnx")["scaled-weight"](artifact(out))
    rewrite_hashes(out)
    verdicts = run(out)
    assert verdicts["integrity"].passed
    assert {"reproduces", "record"} <= set(failed(verdicts))


def test_an_output_that_is_not_finite_fails_with_its_count(out: Path) -> None:
    made = made_out.copy(made_out.converted(recipe="float32"), out)
    faults.find("onnx")["not-a-number"](artifact(made))
    rewrite_hashes(made)
    verdicts = run(made)
    assert "20 of 200 values of the output" in verdicts["runs"].reason  # one of ten classes, in 20 samples


def test_stored_outputs_of_another_artifact_fail_reproduces(out: Path) -> None:
    path = out / "reference.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    (key,) = (k for k in arrays if k.startswith("artifact/"))
    arrays[key] = np.roll(arrays[key], 1, axis=1)
    np.savez(path, **arrays)
    assert "reproduces" in failed(run(out))


def test_a_budget_passes_at_what_was_measured_and_fails_when_it_is_tightened(out: Path, tmp_path: Path) -> None:
    size = artifact(out).stat().st_size
    assert failed(run(out, budget_file(tmp_path, f"[gates]\nmax_bytes = {size}\nmin_sqnr_db = 20"))) == []
    assert failed(run(out, budget_file(tmp_path, f"[gates]\nmax_bytes = {size - 1}"))) == ["max_bytes"]
    assert failed(run(out, budget_file(tmp_path, "[gates]\nmin_sqnr_db = 60"))) == ["min_sqnr_db"]


def test_size_and_drift_in_a_budget_are_measured_now_and_not_read_from_the_report(out: Path, tmp_path: Path) -> None:
    def flatter(report: Any) -> None:
        report["results"][0]["bytes"] = 1
        report["results"][0]["drift"]["stages"][-1]["sqnr_db"] = 99.0

    edit_json(out / "report.json", flatter)
    verdicts = run(out, budget_file(tmp_path, "[gates]\nmax_bytes = 5\nmin_sqnr_db = 98"))
    assert failed(verdicts) == ["min_sqnr_db", "max_bytes"]
    assert verdicts["max_bytes"].value == artifact(out).stat().st_size


def test_what_only_a_conversion_can_measure_says_so(out: Path, tmp_path: Path) -> None:
    verdicts = run(out, budget_file(tmp_path, "[gates]\nrequire_match = true\nmax_fallbacks = 0"))
    assert "as measured by the conversion" in verdicts["require_match"].reason
    assert "as measured by the conversion" in verdicts["max_fallbacks"].reason


def test_latency_is_measured_again_when_a_gate_asks_for_it(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert.check, "measure", made_out.hasty)
    limits = budget_file(tmp_path, "[gates]\nmax_p50_ms = 10000\nmin_speedup = 1000")
    verdicts = run(out, limits)
    assert verdicts["max_p50_ms"].passed
    assert verdicts["max_p50_ms"].value > 0
    assert failed(verdicts) == ["min_speedup"]


def test_without_a_float_twin_that_runs_latency_is_not_measured(out: Path, tmp_path: Path) -> None:
    (out / "raspberry-pi-4b" / "float" / "digits_cnn.onnx").write_bytes(b"nothing")
    verdicts = run(out, budget_file(tmp_path, "[gates]\nmax_p50_ms = 10000"))
    assert verdicts["max_p50_ms"].reason.startswith("not measured")
    assert not verdicts["max_p50_ms"].passed


def test_a_budget_for_a_device_without_a_result_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(TightfitError, match="raspberry-pi-5"):
        run(out, budget_file(tmp_path, "[device.raspberry-pi-5]\nmax_bytes = 5"))


def test_the_same_conversion_is_no_worse_than_itself(out: Path) -> None:
    verdicts = run(out, baseline=made_out.converted())
    assert verdicts["baseline_sqnr_db"].passed
    assert failed(verdicts) == []


def test_a_baseline_with_less_drift_fails(out: Path, tmp_path: Path) -> None:
    old = made_out.copy(made_out.converted(), tmp_path / "old")

    def better(report: Any) -> None:
        report["results"][0]["drift"]["stages"][-1]["sqnr_db"] += 5.0

    edit_json(old / "report.json", better)
    assert failed(run(out, baseline=old)) == ["baseline_sqnr_db"]
    assert failed(run(out, baseline=old / "report.json")) == ["baseline_sqnr_db"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("report.json", b"{", "not a report"),
        ("raspberry-pi-4b/manifest.json", b"[]", "damaged"),
        ("raspberry-pi-4b/manifest.json", b'{"version": 1, "artifacts": {"onnx": {}}}', "file"),
        ("reference.npz", b"PK\x03\x04 and no more", "damaged"),
        ("reference.npz", None, "missing"),
        ("raspberry-pi-4b/manifest.json", None, "cannot read"),
    ],
)
def test_a_damaged_record_is_an_error_that_names_the_file(
    out: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(content)
    with pytest.raises(TightfitError, match=words) as caught:
        run(out)
    assert name.rpartition("/")[2] in str(caught.value)


def test_a_pickle_in_the_reference_is_refused_and_not_loaded(out: Path) -> None:
    np.savez(out / "reference.npz", **{"input/x": np.array([object()], dtype=object)})
    with pytest.raises(TightfitError, match="damaged"):
        run(out)


def test_a_manifest_that_points_out_of_the_folder_is_refused(out: Path) -> None:
    def change(manifest: Any) -> None:
        manifest["artifacts"]["onnx"]["file"] = "../../elsewhere.onnx"

    edit_json(out / "raspberry-pi-4b" / "manifest.json", change)
    with pytest.raises(TightfitError, match="outside"):
        run(out)


def test_an_artifact_only_the_manifest_knows_is_refused_rather_than_skipped(out: Path) -> None:
    def change(manifest: Any) -> None:
        manifest["artifacts"]["tflite"] = manifest["artifacts"]["onnx"]

    edit_json(out / "raspberry-pi-4b" / "manifest.json", change)
    with pytest.raises(TightfitError, match="raspberry-pi-4b/tflite"):
        run(out)


def test_reference_samples_that_do_not_fit_are_refused(out: Path) -> None:
    with np.load(out / "reference.npz") as archive:
        arrays = dict(archive)
    arrays["input/x"] = arrays["input/x"][:-1]
    np.savez(out / "reference.npz", **arrays)
    with pytest.raises(TightfitError, match="samples"):
        run(out)


def test_a_folder_that_is_no_conversion_is_named_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(TightfitError, match="tightfit convert"):
        run(tmp_path / "nowhere")
    made_out.copy(made_out.converted(), tmp_path)
    with pytest.raises(TightfitError, match="several results"):
        run(tmp_path)


def test_a_runtime_that_is_not_installed_is_named_with_its_command(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "targets._onnx_session", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what Python itself does to forbid an import
    with pytest.raises(MissingDependency, match="pip install onnxruntime") as caught:
        run(out)
    assert caught.value.exit_code == 3


def test_the_self_test_injects_every_fault_and_every_one_is_noticed(out: Path) -> None:
    verdicts = run(out, self_test=True)
    assert [name for name in verdicts if name.startswith("self-test/")] == [f"self-test/{f}" for f in FAULTS]
    assert failed(verdicts) == []
    assert verdicts["self-test/flipped-bit"].reason.endswith("noticed by integrity")
    assert all(verdicts[f"self-test/{name}"].value >= 1 for name in FAULTS)


def neutered(*gates: str) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for gate in gates:
            verdict = GateResult(gate=gate, limit=0, value=0, passed=True, subject=SUBJECT)
            monkeypatch.setattr(convert.rerun, gate, lambda *_, verdict=verdict: verdict)

    return patch


@pytest.mark.parametrize(
    ("blinded", "unnoticed"),
    [
        (("integrity",), {"flipped-bit"}),
        (("runs",), {"truncated-file", "missing-file"}),
        (("reproduces", "record"), {"permuted-channels", "scaled-weight", "shuffled-inputs"}),
    ],
)
def test_a_gate_that_cannot_fail_makes_the_self_test_fail(
    out: Path, monkeypatch: pytest.MonkeyPatch, blinded: tuple[str, ...], unnoticed: set[str]
) -> None:
    neutered(*blinded)(monkeypatch)
    # What a NaN does is the kernel's business: it may come out as such, or as a wrong number.
    found = set(failed(run(out, self_test=True))) - {"self-test/not-a-number"}
    assert found == {f"self-test/{fault}" for fault in unnoticed}


def test_on_an_artifact_that_fails_already_the_self_test_proves_nothing_and_says_so(out: Path) -> None:
    faults.find("onnx")["permuted-channels"](artifact(out))
    verdicts = run(out, self_test=True)
    assert [name for name in verdicts if name.startswith("self-test/")] == ["self-test/unmodified"]
    assert "integrity" in verdicts["self-test/unmodified"].reason
    assert not verdicts["self-test/unmodified"].passed


def test_a_fault_without_a_place_is_reported_with_the_reason(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inject(path: Path) -> str:
        raise TargetError("there is no scale")

    monkeypatch.setattr(convert.self_test.faults, "find", lambda target: {"scaled-weight": inject})
    verdict = run(out, self_test=True)["self-test/scaled-weight"]
    assert (verdict.passed, verdict.value) == (True, None)
    assert verdict.reason == "not injected: there is no scale"


def test_a_self_test_that_can_inject_nothing_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(out / "reference.npz") as archive:
        arrays = {key: np.repeat(value[:1], len(value), 0) for key, value in archive.items()}
    np.savez(out / "reference.npz", **arrays)
    monkeypatch.setattr(convert.self_test.faults, "find", lambda target: {})
    assert failed(run(out, self_test=True)) == ["self-test/any-fault"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "float16"])
def test_every_fault_is_noticed_in_every_format(recipe: str) -> None:
    made_out.need_all_targets()
    verdicts = check(made_out.converted(made_out.ALL, recipe), None, None, self_test=True, threads=1, progress=Silent())
    assert [f"{v.subject} {v.gate}: {v.reason}" for v in verdicts if not v.passed] == []
    injected = [v for v in verdicts if v.gate.startswith("self-test/") and v.value is not None]
    assert len(injected) == len(FAULTS) * len(made_out.ALL)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["palette4", "w4"])
def test_every_fault_is_noticed_in_core_ml_weights_of_4_bits(recipe: str) -> None:
    pytest.importorskip("coremltools")
    out = made_out.converted((("iphone-a17-pro", "coreml"),), recipe)
    verdicts = check(out, None, None, self_test=True, threads=1, progress=Silent())
    assert [f"{v.gate}: {v.reason}" for v in verdicts if not v.passed] == []
    injected = [v for v in verdicts if v.gate.startswith("self-test/") and v.value is not None]
    assert len(injected) == len(FAULTS)
    said = next(v.reason for v in injected if v.gate == "self-test/scaled-weight")
    assert ("the table of" if recipe == "palette4" else "the scale of") in said


@pytest.mark.slow
def test_an_artifact_of_8_bit_floats_computes_what_its_simulation_does_and_its_faults_are_noticed() -> None:
    out = made_out.converted((("jetson-agx-thor", "onnx"),), "fp8")
    (result,) = json.loads((out / "report.json").read_text())["results"]
    assert result["match"]["within_one_step"]
    # Nine layers with 3 bits of mantissa leave 24 dB; without their relus it would be less than 0.
    assert result["drift"]["stages"][-1]["sqnr_db"] > 20
    verdicts = check(out, None, None, self_test=True, threads=1, progress=Silent())
    assert [f"{v.gate}: {v.reason}" for v in verdicts if not v.passed] == []


@pytest.mark.slow
def test_a_file_added_to_a_package_fails_integrity(tmp_path: Path) -> None:
    made_out.need_all_targets()
    out = made_out.copy(made_out.converted(made_out.ALL, "int8"), tmp_path)
    (out / "iphone-a17-pro" / "digits_cnn.mlpackage" / "Data" / "more.bin").write_bytes(b"more")
    verdict = run(out)["iphone-a17-pro/coreml integrity"]
    assert not verdict.passed
    assert "more.bin is new" in verdict.reason


@pytest.mark.slow
def test_time_off_the_device_does_not_pass_for_core_ml(tmp_path: Path) -> None:
    made_out.need_all_targets()
    if sys.platform == "darwin":
        pytest.skip("Core ML itself runs here")
    limits = budget_file(tmp_path, "[device.iphone-a17-pro.coreml]\nmax_p50_ms = 10000")
    verdict = run(made_out.converted(made_out.ALL, "int8"), limits)["iphone-a17-pro/coreml max_p50_ms"]
    assert not verdict.passed
    assert "its time says nothing" in verdict.reason
