"""`bench` on real artifacts: what it finds by itself, what it refuses, and where it measures nothing."""

import json
import shutil
import sys
from pathlib import Path

import made_out
import pytest

from calibrate.samples import InputSpec
from convert.bench import RANDOM, STORED, BenchResult, bench, random_inputs
from convert.errors import TightfitError
from convert.progress import Silent
from targets.errands import Timing


def run(artifact: Path, float_: Path | None = None, runs: int = 20) -> BenchResult:
    return bench(artifact, float_, Timing(min_runs=runs, min_seconds=0), threads=1, progress=Silent())


@pytest.fixture
def artifact() -> Path:
    return made_out.converted() / "raspberry-pi-4b" / "digits_cnn.onnx"


def test_twin_and_samples_are_found_by_the_manifest(artifact: Path) -> None:
    found = run(artifact)
    assert found.inputs == STORED
    assert found.executor.startswith("ONNX Runtime")
    assert found.float_artifact == str(artifact.parent / "float" / artifact.name)
    assert found.latency is not None
    assert found.latency.runs >= 20
    assert found.latency.speedup is not None
    assert found.note is None


def test_the_result_is_json_and_comes_back_the_same(artifact: Path) -> None:
    found = run(artifact)
    assert BenchResult.model_validate(json.loads(json.dumps(found.model_dump(mode="json")))) == found


def test_a_file_on_its_own_is_timed_alone_on_random_numbers(artifact: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(artifact, tmp_path))
    found = run(alone)
    assert found.inputs == RANDOM
    assert found.latency is not None
    assert found.latency.speedup is None
    assert found.float_artifact is None
    assert "no float twin" in (found.note or "")


def test_a_twin_beside_it_is_found_without_a_manifest_and_another_can_be_given(artifact: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(artifact, tmp_path))
    twin = artifact.parent / "float" / artifact.name
    assert run(alone, twin).float_artifact == str(twin)
    shutil.copytree(twin.parent, tmp_path / "float")
    assert run(alone).float_artifact == str(tmp_path / "float" / artifact.name)


def test_random_inputs_are_the_same_every_time_and_never_out_of_an_index_range() -> None:
    specs = (InputSpec("x", (2, 3), "float32"), InputSpec("ids", (2, 50), "int64"), InputSpec("mask", (2, 50), "bool"))
    first, second = random_inputs(specs), random_inputs(specs)
    assert all((first[name] == second[name]).all() for name in first)
    assert {name: (array.shape, array.dtype.name) for name, array in first.items()} == {
        "x": ((2, 3), "float32"),
        "ids": ((2, 50), "int64"),
        "mask": ((2, 50), "bool"),
    }
    assert set(first["ids"].ravel().tolist()) == {0, 1}


@pytest.mark.parametrize("name", ["weights.bin", "model", "model.pt2"])
def test_another_kind_of_file_is_refused_with_the_kinds_there_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(TightfitError, match=r"\.onnx"):
        run(tmp_path / name)


def test_a_missing_artifact_or_twin_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(TightfitError, match="there is no"):
        run(tmp_path / "model.onnx")
    with pytest.raises(TightfitError, match="there is no"):
        run(artifact, tmp_path / "model.onnx")
    with pytest.raises(TightfitError, match="both must end in"):
        run(artifact, artifact.parent / "manifest.json")


def test_a_damaged_artifact_or_twin_is_an_error_and_no_traceback(artifact: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model.onnx"
    damaged.write_bytes(artifact.read_bytes()[:1000])
    with pytest.raises(TightfitError, match="cannot be loaded"):
        run(damaged)
    with pytest.raises(TightfitError, match="cannot be loaded"):
        run(artifact, damaged)


def test_too_few_runs_are_refused(artifact: Path) -> None:
    with pytest.raises(TightfitError, match="runs"):
        run(artifact, runs=1)


@pytest.mark.slow
@pytest.mark.parametrize("subject", ["raspberry-pi-4b/digits_cnn.tflite", "iphone-a17-pro/digits_cnn.mlpackage"])
def test_each_session_says_what_inputs_it_takes(subject: str, tmp_path: Path) -> None:
    made_out.need_all_targets()
    source = made_out.converted(made_out.ALL, "int8") / subject
    alone = tmp_path / source.name
    if source.is_dir():
        shutil.copytree(source, alone)
    else:
        shutil.copyfile(source, alone)
    assert run(alone).inputs == RANDOM


@pytest.mark.slow
def test_core_ml_is_not_timed_where_it_does_not_run() -> None:
    made_out.need_all_targets()
    if sys.platform == "darwin":
        pytest.skip("Core ML itself runs here")
    found = run(made_out.converted(made_out.ALL, "int8") / "iphone-a17-pro" / "digits_cnn.mlpackage")
    assert found.latency is None
    assert "says nothing" in (found.note or "")
    assert found.inputs == STORED
