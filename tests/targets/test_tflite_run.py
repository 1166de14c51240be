"""Running a .tflite file: inputs are checked, outputs are copies, damage is reported."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("litert_torch", reason="lowering needs the extra [tflite]")
pytest.importorskip("ai_edge_litert", reason="running needs the extra [tflite]")

from tflite_graphs import capture, job

from targets._tflite_file import TFLiteFile
from targets.errors import TargetError
from targets.tflite import TARGET


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        return self.table(ids) * scale


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    inputs = (torch.arange(3)[None], torch.ones(1, 1, 1))
    path = tmp_path_factory.mktemp("run") / "lookup.tflite"
    TARGET.lower(job(capture(Lookup(), *inputs), *inputs), path)
    return path


def _inputs(scale: float = 1.0) -> dict[str, np.ndarray]:
    return {"first": np.arange(3)[None], "second": np.full((1, 1, 1), scale, np.float32)}


def test_outputs_outlive_the_next_run_and_the_session(path: Path) -> None:
    session = TARGET.open(path)
    first = session.run(_inputs(1.0))["result0"]
    kept = first.copy()
    doubled = session.run(_inputs(2.0))["result0"]
    del session
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(doubled, kept * 2)


def test_a_bound_call_runs_on_the_inputs_it_was_bound_to(path: Path) -> None:
    session = TARGET.open(path)
    call = session.bind(_inputs(3.0))
    call()
    np.testing.assert_array_equal(session.run(_inputs(3.0))["result0"], session.run(_inputs(1.0))["result0"] * 3)


def test_the_executor_names_runtime_version_and_threads(path: Path) -> None:
    assert TARGET.open(path).executor.startswith("LiteRT ")
    assert "1 thread)" in TARGET.open(path).executor
    assert "2 threads)" in TARGET.open(path, threads=2).executor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": np.ones((1, 2, 1), np.float32)}, r"'second' has the shape \(1, 2, 1\)"),
        ({"second": np.ones((1, 1, 1), np.int64)}, "'second' is int64"),
        ({"first": np.full((1, 3), 2**40)}, "'first' holds integers beyond int32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(path: Path, change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        TARGET.open(path).run({**_inputs(), **change})


def test_a_missing_input_is_named(path: Path) -> None:
    with pytest.raises(TargetError, match="'second' is missing"):
        TARGET.open(path).run({"first": np.arange(3)[None]})


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"no model at all")
    with pytest.raises(TargetError, match=r"does not load broken\.tflite"):
        TARGET.open(broken)
    with pytest.raises(TargetError, match="no TFLite model"):
        TFLiteFile.read(broken)


def test_reading_and_writing_a_file_twice_gives_the_same_bytes(path: Path) -> None:
    once = TFLiteFile.read(path).to_bytes()
    assert once == TFLiteFile(once).to_bytes()
