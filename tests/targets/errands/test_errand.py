"""Errands on this machine: outputs, times, and every way in which one can fail, each in words."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from agent_jobs import QUICK_RUNS, dense_onnx, dynamic_tflite, local, only, opened_local, samples

from targets.agent.timing import ROUNDS
from targets.errands import Errand, Timing, carry_out
from targets.errands.carry import crashed
from targets.errors import MissingRuntime, TargetError
from targets.onnx import TARGET as ONNX
from targets.transports import Finished
from targets.transports.local import LocalTransport

QUICK = Timing(min_runs=QUICK_RUNS, min_seconds=0.0, warmup_seconds=0.0)


@pytest.fixture
def place() -> Iterator[LocalTransport]:
    yield from opened_local()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return dense_onnx(tmp_path / "model.onnx")


def test_outputs_of_all_samples_come_back_as_the_host_computes_them(path: Path) -> None:
    answer = local(Errand(path, None, samples(), 2))
    session = ONNX.open(path)
    expected = np.concatenate([session.run({"x": samples()["x"][i : i + 2]})["y"] for i in (0, 2, 4)])
    np.testing.assert_array_equal(answer.artifact.outputs["y"], expected)
    assert answer.artifact.executor.startswith("ONNX Runtime ")
    assert answer.twin is None
    assert answer.facts["python"] == sys.version.split()[0]
    assert answer.peak_rss_mib is not None
    assert 10 < answer.peak_rss_mib < 1000  # of a process with numpy and the runtime, not of the one that started it
    assert answer.artifact.blocks == []


def test_a_tflite_file_is_run_by_the_names_of_its_signature(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="running .tflite files needs the extra [tflite]")
    answer = local(Errand(dynamic_tflite(tmp_path / "m.tflite"), None, samples("first", 3), 1))
    assert answer.artifact.outputs["result0"].shape == (3, 4)
    assert answer.artifact.executor.startswith("LiteRT ")


def test_an_artifact_and_its_twin_are_timed_in_rounds(path: Path, tmp_path: Path) -> None:
    slow = dense_onnx(tmp_path / "slow.onnx", layers=6, width=512)
    stages: list[str] = []
    with pytest.raises(TargetError, match="shape"):  # the twin must take the same inputs
        local(Errand(path, slow, samples(), 2, timing=QUICK))
    twin = dense_onnx(tmp_path / "twin.onnx", layers=2)
    place = LocalTransport("local")
    place.open()
    try:
        answer = carry_out(place, Errand(path, twin, samples(), 2, timing=QUICK), lambda s, *_: stages.append(s))
    finally:
        place.close()
    assert answer.twin is not None
    for one in (answer.artifact, answer.twin):
        assert len(one.blocks) == ROUNDS
        assert sum(len(block) for block in one.blocks) >= QUICK_RUNS
        assert min(block.min() for block in one.blocks) > 0
        assert one.load_ms > 0
        assert one.first_ms > 0
    assert [state["moment"] for state in answer.board][:1] == ["before"]
    assert answer.board[-1]["moment"] == "after"
    assert {"load artifact.onnx", "load float.onnx", "time"} <= set(stages)


def test_a_sustained_run_gives_points_and_a_last_state(path: Path) -> None:
    timing = Timing(min_runs=QUICK_RUNS, min_seconds=0.0, warmup_seconds=0.0, sustained_minutes=1 / 60)
    answer = local(Errand(path, None, samples(), 2, timing=timing))
    assert answer.sustained
    assert all(point["p50_ms"] > 0 for point in answer.sustained)
    assert [state["moment"] for state in answer.board][-2:] == ["after", "after"]


def test_constants_beside_the_file_travel_under_the_name_it_knows(tmp_path: Path) -> None:
    folder, expected = tmp_path / "external", tmp_path / "model.onnx"
    folder.mkdir()
    model = onnx.load(dense_onnx(expected, width=64))
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    inputs = samples(width=64)
    answers = [local(Errand(p, p, inputs, 2)) for p in (expected, folder / "model.onnx")]
    np.testing.assert_array_equal(answers[0].artifact.outputs["y"], answers[1].artifact.outputs["y"])
    assert answers[1].twin is not None
    (folder / "model.onnx.data").unlink()
    with pytest.raises(TargetError, match="can't load"):
        local(Errand(folder / "model.onnx", None, inputs, 2))


def test_one_session_does_many_errands_and_mixes_none(place: LocalTransport, path: Path, tmp_path: Path) -> None:
    other = dense_onnx(tmp_path / "other.onnx", layers=3)
    found = [carry_out(place, Errand(p, None, samples(), 2), lambda *_: None) for p in (path, other, path)]
    first, second, third = (answer.artifact.outputs["y"] for answer in found)
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)


def test_a_wrong_input_fails_in_words(path: Path) -> None:
    with pytest.raises(TargetError, match="local: the artifact's input 'x' is not among z"):
        local(Errand(path, None, samples("z"), 2))
    with pytest.raises(TargetError, match="has the shape"):
        local(Errand(path, None, samples(width=9), 2))


def test_a_damaged_file_fails_in_the_runtimes_words(path: Path) -> None:
    path.write_bytes(b"no model")
    with pytest.raises(TargetError, match=r"local: ONNX Runtime .* there can't load artifact\.onnx"):
        local(Errand(path, None, samples(), 2))


def test_what_no_such_device_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.mlpackage").mkdir()
    with pytest.raises(TargetError, match=r"m\.mlpackage can't be run elsewhere"):
        local(Errand(tmp_path / "m.mlpackage", None, samples(), 2))
    with pytest.raises(TargetError, match="there is no file"):
        local(Errand(tmp_path / "gone.onnx", None, samples(), 2))


def test_inputs_that_are_no_whole_batches_are_a_mistake_of_the_caller(path: Path) -> None:
    with pytest.raises(ValueError, match="no whole batches"):
        local(Errand(path, None, samples(count=5), 2))


def test_a_device_without_the_runtime_is_told_what_to_install(path: Path, tmp_path: Path) -> None:
    python = only(tmp_path / "site", "numpy")
    with pytest.raises(MissingRuntime, match=r"ONNX Runtime is not installed .* -m pip install onnxruntime"):
        local(Errand(path, None, samples(), 2), python)
    pytest.importorskip("ai_edge_litert", reason="making the .tflite file needs the extra [tflite]")
    with pytest.raises(MissingRuntime, match="pip install ai-edge-litert"):
        local(Errand(dynamic_tflite(tmp_path / "m.tflite"), None, samples("first"), 1), python)


def test_a_device_without_numpy_is_told_so(path: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingRuntime, match="numpy is not installed"):
        local(Errand(path, None, samples(), 2), only(tmp_path / "site"))


def test_a_device_with_the_runtime_alone_needs_nothing_else(path: Path, tmp_path: Path) -> None:
    python = only(tmp_path / "site", "numpy", "onnxruntime", "google", "protobuf", "flatbuffers", "packaging")
    assert local(Errand(path, None, samples(), 2), python).artifact.outputs["y"].shape == (6, 8)


def test_a_runtime_that_is_there_and_does_not_load_says_why(path: Path, tmp_path: Path) -> None:
    python = only(tmp_path / "site", "numpy")
    (tmp_path / "site" / "onnxruntime.py").write_text("raise ImportError('GLIBC_2.38 not found')")
    with pytest.raises(MissingRuntime, match=r"does not load: GLIBC_2\.38 not found"):
        local(Errand(path, None, samples(), 2), python)


def test_a_device_without_python_is_told_so(place: LocalTransport, path: Path) -> None:
    place.python = ()
    with pytest.raises(MissingRuntime, match="no Python on the device"):
        carry_out(place, Errand(path, None, samples(), 2), lambda *_: None)


def test_a_model_that_hangs_is_killed_at_the_limit(path: Path, tmp_path: Path) -> None:
    python = only(tmp_path / "site", "numpy")
    (tmp_path / "site" / "onnxruntime.py").write_text("import time; time.sleep(600)")
    start = time.monotonic()
    with pytest.raises(TargetError, match="did not end within 1 s and was killed"):
        local(Errand(path, None, samples(), 2, seconds=1.0), python)
    assert time.monotonic() - start < 60


def test_a_runtime_that_crashes_is_told_apart_from_one_that_refuses(path: Path, tmp_path: Path) -> None:
    python = only(tmp_path / "site", "numpy")
    (tmp_path / "site" / "onnxruntime.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(TargetError, match=r"the agent crashed there \(SIGSEGV\)"):
        local(Errand(path, None, samples(), 2), python)


def test_an_emulated_device_is_never_timed(place: LocalTransport, path: Path) -> None:
    place.emulated = True
    with pytest.raises(ValueError, match="its time says nothing about the device"):
        carry_out(place, Errand(path, None, samples(), 2, timing=QUICK), lambda *_: None)
    answer = carry_out(place, Errand(path, None, samples(), 2), lambda *_: None)
    assert answer.peak_rss_mib is None


def test_nothing_is_counted_where_nothing_can_count(path: Path) -> None:
    assert local(Errand(path, None, samples(), 2, count=3)).artifact.counts == []


@pytest.mark.parametrize(
    ("code", "errors", "words"),
    [
        (-9, "", "may have run out of memory"),
        (137, "", "may have run out of memory"),
        (139, "", "crashed there (SIGSEGV)"),
        (1, "Traceback\nSyntaxError: invalid syntax", "needs Python 3.9"),
        (1, "Traceback\nOSError: disk", "exit code 1, without an answer. It said: Traceback OSError: disk"),
    ],
)
def test_how_an_agent_ended_is_told(code: int, errors: str, words: str) -> None:
    assert words in crashed(Finished(code, errors))
