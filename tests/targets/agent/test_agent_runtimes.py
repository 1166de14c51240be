"""Files in real runtimes, as the agent opens them: the host's answers, wrong inputs, damage, and silent errors."""

from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("ai_edge_litert", reason="running .tflite files needs the extra [tflite]")

from agent_jobs import dense_onnx, dynamic_tflite, local, old_runtime, samples
from ai_edge_litert.interpreter import Interpreter

from targets import _tflite_run
from targets.agent import known_answer
from targets.agent.job import Artifact
from targets.agent.onnx_session import may_saturate
from targets.agent.problems import Problem
from targets.agent.runtimes import Session, open_session
from targets.agent.tflite_session import fitted
from targets.errands import Errand
from targets.errors import TargetError
from targets.onnx import TARGET as ONNX
from targets.tflite import TARGET as TFLITE

NAMES = {".onnx": "x", ".tflite": "first"}


@pytest.fixture(params=[".onnx", ".tflite"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / f"model{request.param}"
    return dense_onnx(made) if request.param == ".onnx" else dynamic_tflite(made)


def opened(path: Path) -> Session:
    return open_session(Artifact("artifact", path.name, {}, {}, []), path.parent, 1)


def inputs(path: Path) -> dict[str, np.ndarray]:
    return samples(NAMES[path.suffix], 2 if path.suffix == ".onnx" else 1)


def test_the_agent_gets_the_answers_that_the_host_gets(path: Path) -> None:
    target = ONNX if path.suffix == ".onnx" else TFLITE
    theirs, ours = target.open(path).run(inputs(path)), opened(path).run(inputs(path))
    assert list(ours) == list(theirs)
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name])


def test_a_bound_call_runs_on_what_it_was_bound_to(path: Path) -> None:
    session = opened(path)
    times = session.block(inputs(path))(5, 0)
    assert len(times) == 5
    assert min(times) > 0
    assert session.load_seconds > 0


def test_a_missing_input_is_named(path: Path) -> None:
    with pytest.raises(Problem, match=f"'{NAMES[path.suffix]}' is (not among|missing)"):
        opened(path).run({"other": np.zeros((1, 8), np.float32)})


def test_an_input_of_another_shape_is_told(path: Path) -> None:
    with pytest.raises(Problem, match="has the shape"):
        opened(path).run({NAMES[path.suffix]: np.zeros((1, 9), np.float32)})


def test_a_damaged_file_fails_in_the_runtimes_words(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 100 if path.suffix == ".onnx" else 300])
    with pytest.raises(Problem, match=r"there (can't|does not) load model"):
        opened(path)


@pytest.mark.parametrize(
    ("machine", "flags", "quantized", "warned"),
    [
        ("x86_64", "avx2", True, True),
        ("x86_64", "avx2", False, False),
        ("x86_64", "avx2 avx512_vnni", True, False),
        ("x86_64", "avx2 avx_vnni", True, False),
        ("aarch64", "asimd", True, False),
    ],
)
def test_sums_that_may_saturate_are_warned_of(
    tmp_path: Path, machine: str, flags: str, quantized: bool, warned: bool
) -> None:
    path, cpuinfo = dense_onnx(tmp_path / "model.onnx"), tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {flags}\n")
    if quantized:
        model = onnx.load(path)
        model.graph.node[0].op_type = "DequantizeLinear"
        path.write_bytes(model.SerializeToString())
    assert may_saturate(path, machine, cpuinfo) == warned


def test_a_package_is_refused_by_the_agent_too(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"\.mlpackage can't run here"):
        opened(tmp_path / "model.mlpackage")


@pytest.mark.parametrize(
    ("values", "dtype", "quantization"),
    [
        (np.array([0.3, -9.0, 9.0]), np.int8, (0.1, 5)),
        (np.array([3, 4]), np.int32, (0.0, 0)),
        (np.array([True, False]), np.int8, (0.0, 0)),
    ],
)
def test_inputs_become_codes_as_on_the_host(values: np.ndarray, dtype: type, quantization: tuple[float, int]) -> None:
    detail = {"shape": np.array(values.shape), "dtype": dtype, "quantization": quantization}
    np.testing.assert_array_equal(fitted("x", values, detail), _tflite_run.fitted("x", values, detail))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [(np.array([300]), np.int8), (np.array([0.5]), np.int32), (np.array([1, 2]), np.float32)],
)
def test_inputs_that_do_not_fit_are_refused_in_the_hosts_words(values: np.ndarray, dtype: type) -> None:
    detail = {"shape": np.array(values.shape), "dtype": dtype, "quantization": (0.0, 0)}
    with pytest.raises(TargetError) as theirs:
        _tflite_run.fitted("x", values, detail)
    with pytest.raises(Problem) as ours:
        fitted("x", values, detail)
    assert ours.value.text == str(theirs.value)


def test_litert_computes_the_layer_with_the_known_answer_right() -> None:
    assert known_answer.is_right(Interpreter, 1)


def test_a_runtime_that_computes_it_wrong_would_be_noticed() -> None:
    class OneScale(Interpreter):
        def get_tensor(self, *arguments: object, **named: object) -> np.ndarray:
            rows = super().get_tensor(*arguments, **named)  # as if every row had the scale of the first
            return rows * np.array([[1, 8, 32, 256]], np.float32)

    assert not known_answer.is_right(OneScale, 1)


def test_only_dynamic_layers_with_a_scale_per_channel_are_at_risk(tmp_path: Path) -> None:
    at_risk = Interpreter(model_path=str(dynamic_tflite(tmp_path / "dynamic.tflite")))
    at_risk.allocate_tensors()
    assert known_answer.layers_at_risk(at_risk) == 1

    class Static:
        """The same file, had its weight one scale only."""

        def _get_ops_details(self) -> list[dict]:
            return at_risk._get_ops_details()

        def get_tensor_details(self) -> list[dict]:
            details = at_risk.get_tensor_details()
            for detail in details:
                detail["quantization_parameters"]["scales"] = detail["quantization_parameters"]["scales"][:1]
            return details

    assert known_answer.layers_at_risk(Static()) == 0


@pytest.mark.slow
def test_tflite_runtime_2_14_is_refused_for_a_file_that_it_computes_wrong(tmp_path: Path) -> None:
    python = old_runtime()
    path = dynamic_tflite(tmp_path / "dynamic.tflite")
    errand = Errand(path, None, samples("first", 4), 1)
    assert local(errand).artifact.outputs["result0"].any()
    with pytest.raises(TargetError, match=r"tflite-runtime 2\.14\.0 there computes linear layers .* wrong") as caught:
        local(errand, python)
    assert "pip install ai-edge-litert" in str(caught.value)
