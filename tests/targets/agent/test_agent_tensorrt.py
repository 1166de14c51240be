"""TensorRT through trtexec: its version, options and exports in the formats of its sources; not run on hardware."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest

from targets.agent import tensorrt
from targets.agent.problems import Problem

# As sampleReporting.cpp writes them.
OUTPUT = """[
  { "name" : "logits"
  , "dimensions" : "1x2"
  , "values" : [ 0.25, -1.5e-05 ]
  }
]
"""
TIMES = """[
  { "startComputeMs" : 150.1, "endComputeMs" : 151, "computeMs" : 0.9, "latencyMs" : 99 }
, { "startComputeMs" : 201.5, "endComputeMs" : 202.5, "computeMs" : 1, "latencyMs" : 1.25 }
, { "startComputeMs" : 203.5, "endComputeMs" : 204.5, "computeMs" : 1, "latencyMs" : 1.5 }
]
"""
# What stands for trtexec here: it takes the options that it is given apart, and writes these files.
STAND_IN = """#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # $*"
echo "$*" >> commands
for option in "$@"; do
  case $option in
    --saveEngine=*|--exportOutput=*|--exportTimes=*) file=${option#*=};;
    --loadEngine=*) [ -f "${option#*=}" ] || { echo "[E] no engine"; exit 1; };;
  esac
  case $option in
    --saveEngine=*) echo engine > "$file";;
    --exportOutput=*) cp output "$file";;
    --exportTimes=*) cp times "$file";;
  esac
done
"""


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --help", (8, 5, 2)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec --help", (10, 3, 0)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110200] [b9] # trtexec --help", (11, 2, 0)),
    ],
)
def test_the_version_is_read_from_the_banner(banner: str, version: tuple[int, ...]) -> None:
    assert tensorrt.version_of(banner) == version


def test_a_trtexec_without_a_version_is_an_error() -> None:
    with pytest.raises(Problem, match="does not say its version"):
        tensorrt.version_of("command not found")


def test_the_precision_is_that_of_the_file_as_each_version_wants_it_said() -> None:
    assert tensorrt.precision_options((8, 5, 2)) == ["--int8", "--fp16"]
    assert tensorrt.precision_options((10, 3, 0)) == ["--stronglyTyped"]
    assert tensorrt.precision_options((11, 0, 0)) == []


def test_exports_are_read() -> None:
    outputs = tensorrt.outputs_of(OUTPUT)
    np.testing.assert_array_equal(outputs["logits"], np.array([[0.25, -1.5e-5]], np.float32))
    assert tensorrt.times_of(TIMES, 200) == pytest.approx([0.00125, 0.0015])


def test_exports_without_a_time_or_that_are_damaged_are_errors() -> None:
    with pytest.raises(Problem, match="timed no inference"):
        tensorrt.times_of(TIMES, 1000)
    with pytest.raises(Problem, match="no JSON"):
        tensorrt.outputs_of(OUTPUT.replace("0.25", "nan"))


def test_trtexec_is_looked_for_on_jetsons_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text(STAND_IN)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tensorrt.trtexec(tmp_path) is None
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").touch()
    assert tensorrt.trtexec(tmp_path) == str(tool)


def test_an_engine_is_built_once_and_each_block_is_a_process(tmp_path: Path) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text(STAND_IN)
    tool.chmod(0o755)
    (tmp_path / "output").write_text(OUTPUT)
    (tmp_path / "times").write_text(TIMES)
    session = tensorrt.TensorRTSession(tmp_path / "model.onnx", str(tool))
    x = {"x": np.ones((1, 2), np.float32)}
    assert list(session.run(x)) == ["logits"]
    assert session.block(x)(50, 0.1) == pytest.approx([0.00125, 0.0015])
    assert session.executor == "TensorRT 10.3.0 (trtexec)"
    _, build, run, time = (tmp_path / "commands").read_text().splitlines()
    assert build == "--onnx=model.onnx --saveEngine=model.engine --skipInference --stronglyTyped"
    assert "--loadInputs='x':trtexec-input-0.bin" in run
    assert "--iterations=50 --duration=1 --warmUp=200" in time
    assert (tmp_path / "trtexec-input-0.bin").read_bytes() == x["x"].tobytes()


def test_a_failure_of_trtexec_is_told_in_its_words(tmp_path: Path) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text(STAND_IN.replace("--saveEngine=*) echo", "--saveEngine=*) echo '[E] out of memory'; exit 1; echo"))
    tool.chmod(0o755)
    with pytest.raises(Problem, match=r"exit code 1: \[E\] out of memory"):
        tensorrt.TensorRTSession(tmp_path / "model.onnx", str(tool))


def test_the_documented_example_of_outputs_is_json() -> None:
    assert json.loads(OUTPUT)[0]["dimensions"] == "1x2"
