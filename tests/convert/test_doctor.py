"""`diagnose` tells what is there from what is not, and names what to do."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from convert import doctor
from convert.doctor import Finding, coreml_note, diagnose, fits, judged


def finding(name: str) -> Finding:
    return next(f for f in diagnose() if f.name == name)


def test_what_is_installed_is_found_with_its_version() -> None:
    assert finding("torch").version == metadata.version("torch")
    assert finding("torch").state == "ok"
    assert finding("python").version == ".".join(map(str, sys.version_info[:3]))


def test_a_missing_extra_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    found = {f.name: f for f in diagnose()}
    assert found["coremltools"].state == "missing"
    assert found["coremltools"].command == 'pip install "tightfit[coreml]"'
    assert found["torch"].command == 'pip install "torch>=2.13,<2.14"'


def test_a_version_out_of_range_is_unsuitable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: "2.4.1" if name == "numpy" else None)
    numpy = finding("numpy")
    assert (numpy.state, numpy.command) == ("unsuitable", 'pip install "numpy>=1.26,<2.4"')


def test_on_a_device_tflite_runtime_stands_in_for_litert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: "2.14.0" if name == "tflite-runtime" else None)
    assert finding("tflite-runtime").state == "ok"


@pytest.mark.parametrize(
    ("version", "expected"), [("2.13.0+cpu", True), ("2.13", True), ("2.12.9", False), ("2.14.0", False), ("x", False)]
)
def test_versions_are_compared_by_number(version: str, expected: bool) -> None:
    assert fits(version, (2, 13), (2, 14)) is expected


def test_an_old_python_is_unsuitable() -> None:
    assert doctor._python((3, 10, 4)).state == "unsuitable"


def test_prediction_with_core_ml_is_promised_on_macos_only() -> None:
    assert "only on macOS" in coreml_note("Linux")
    assert "only on macOS" not in coreml_note("Darwin")


def test_a_distribution_that_ships_our_package_name_is_called_by_name(tmp_path: Path) -> None:
    clobbered = judged("convert", tmp_path, tmp_path, "0.1.0", ["unit-convert"])
    assert clobbered.state == "unsuitable"
    assert "unit-convert ships a package 'convert' too" in clobbered.note
    assert clobbered.command is not None


def test_a_folder_that_shadows_our_package_is_named(tmp_path: Path) -> None:
    shadowed = judged("targets", tmp_path / "user" / "targets", tmp_path / "site" / "targets", "0.1.0", [])
    assert shadowed.state == "unsuitable"
    assert str(tmp_path / "user" / "targets") in shadowed.note
    assert judged("targets", tmp_path, tmp_path, "0.1.0", []).state == "ok"


def test_a_clobbering_distribution_on_the_path_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tightfit", "unit-convert"):
        info = tmp_path / f"{name.replace('-', '_')}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (info / "RECORD").write_text("convert/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "unit-convert" in finding("convert").note
    assert finding("targets").note.count("unit-convert") == 0


def test_diagnosing_imports_no_heavy_library() -> None:
    script = (
        "import sys; from convert.doctor import diagnose; diagnose();"
        "heavy = ('torch', 'onnx', 'onnxruntime', 'coremltools', 'litert_torch', 'numpy');"
        "print([m for m in heavy if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
