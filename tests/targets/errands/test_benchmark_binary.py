"""Errands without Python on the device, against a stand-in for `benchmark_model`: its flags and lines on LiteRT.

No real binary and no phone have been near this: neither can be had here.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from agent_jobs import dense_onnx, dynamic_tflite, samples
from fake_adb_server import Device, Server
from hypothesis import given
from hypothesis import strategies as st

from targets.errands import Answer, Errand, Timing, _benchmark_binary, carry_out
from targets.errands._benchmark_files import Layout, Slot
from targets.errands._benchmark_output import delegate, process
from targets.errors import MissingRuntime, TargetError
from targets.transports import opened

pytest.importorskip("ai_edge_litert", reason="reading .tflite files needs the extra [tflite]")

BATTERY = "  AC powered: false\n  USB powered: true\n  level: 81\n  temperature: 305\n"
STATISTICS = """\
echo 'INFO: Explicitly applied XNNPACK delegate, and the model graph will be completely executed by the delegate.'
echo 'INFO: count=9 first=900 curr=210 min=205 max=900 avg=300 std=70'
echo 'INFO: count=3 first=210 curr=230 min=200 max=230 avg=213.333 std=12'
echo 'INFO: Inference timings in us: Init: 4000, First inference: 900, Warmup (avg): 300, Inference (avg): 213.333'
"""
RUNS = """\
import sys, time
from pathlib import Path
import numpy as np
from ai_edge_litert.interpreter import Interpreter
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
model = Interpreter(model_path=flags["graph"], num_threads=int(flags["num_threads"]))
model.allocate_tensors()
named = dict(v.split(":") for v in flags["input_layer_value_files"].split(","))
shapes = flags["input_layer_shape"].split(":")
for name, shape, detail in zip(flags["input_layer"].split(","), shapes, model.get_input_details(), strict=True):
    raw = Path(named[name]).read_bytes()
    shape = [int(n) for n in shape.split(",")]
    model.set_tensor(detail["index"], np.frombuffer(raw, detail["dtype"]).reshape(shape))
model.invoke()
out = b"".join(model.get_tensor(d["index"]).tobytes() for d in model.get_output_details())
Path(flags["output_filepath"]).write_bytes(out)
print("INFO: count=0")
print("INFO: count=1 curr=57")
print("INFO: Inference timings in us: Init: 1500, First inference: 0, Warmup (avg): nan, Inference (avg): 57")
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device that says what Android says of its battery and heat."""
    device = Device(tmp_path / "phone")
    heat(device, 0)
    monkeypatch.delenv("ADB_SERVER_SOCKET", raising=False)
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    with Server({"R58": device}) as server:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.port))
        yield device


def heat(device: Device, status: int) -> None:
    """Let it say this thermal status."""
    warm = "Temperature{mValue=48.5, mType=0, mName=cpu0, mStatus=0}"
    device.tool(
        "dumpsys", f"case $1 in battery) printf '{BATTERY}';; *) echo 'Thermal Status: {status}'; echo '{warm}';; esac"
    )


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that TIGHTFIT_BENCHMARK_MODEL names: it runs the model in LiteRT."""
    path = tmp_path / "android_aarch64_benchmark_model"
    path.write_text(f"#!{sys.executable}\n{RUNS}")
    monkeypatch.setenv(_benchmark_binary.VARIABLE, str(path))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return dynamic_tflite(tmp_path / "m.tflite")


def done(errand: Errand) -> Answer:
    with opened("adb:") as place:
        return carry_out(place, errand, lambda *_: None)


def only_statistics(path: Path, *, fails: str = "") -> None:
    """Let the stand-in print times without taking any, and outputs of zeros."""
    zeros = 'for a in "$@"; do case $a in --output_filepath=*) head -c 16 /dev/zero > "${a#*=}";; esac; done\n'
    path.write_text(f"#!/bin/sh\n{zeros}{fails or STATISTICS}\n")


def test_outputs_of_all_samples_are_those_of_this_machine(phone: Device, stand_in: Path, model: Path) -> None:
    from targets.tflite import TARGET

    inputs = samples("first", 3)
    answer = done(Errand(model, None, inputs, 1, threads=2))
    session = TARGET.open(model)
    expected = np.concatenate([session.run({"first": inputs["first"][i : i + 1]})["result0"] for i in range(3)])
    np.testing.assert_array_equal(answer.artifact.outputs["result0"], expected)
    assert len({row.tobytes() for row in expected}) == 3
    assert answer.twin is None
    assert "benchmark_model" in answer.artifact.executor
    assert "2 threads" in answer.artifact.executor
    assert (answer.artifact.load_ms, answer.artifact.first_ms) == (1.5, pytest.approx(0.057))
    assert answer.artifact.blocks == []
    assert phone.left() == []


def test_artifact_and_twin_are_timed_in_turns(
    phone: Device, stand_in: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_benchmark_binary, "ROUNDS", 2)
    only_statistics(stand_in)
    timing = Timing(min_runs=12, min_seconds=0.0)
    answer = done(Errand(model, model, samples("first", 1), 1, timing=timing))
    assert answer.twin is not None
    for one in (answer.artifact, answer.twin):
        assert [len(block) for block in one.blocks] == [6, 6]
        np.testing.assert_allclose(one.blocks[0], [210e-6, 200e-6, 230e-6] * 2)
        assert (one.load_ms, one.first_ms) == (4.0, 0.9)
        assert "XNNPACK, completely" in one.executor
    assert [state["moment"] for state in answer.board] == ["before", "during", "during", "after"]
    assert answer.board[0]["temperature_c"] == 48.5
    assert answer.void is None
    assert any("3 calls a process" in warning for warning in answer.warnings)
    timed = next(command for command in phone.commands if "--num_runs=3" in command)
    assert timed.index("--graph=artifact.tflite") < timed.index("--graph=float.tflite")


def test_times_of_a_throttled_device_are_void(
    phone: Device, stand_in: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_benchmark_binary, "ROUNDS", 1)
    only_statistics(stand_in)
    heat(phone, 2)
    answer = done(Errand(model, None, samples("first", 1), 1, timing=Timing(min_runs=3, min_seconds=0.0)))
    assert answer.void == "the processor was slowed down before the timing (thermal status moderate)"


def test_a_sustained_run_goes_on(phone: Device, stand_in: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_benchmark_binary, "ROUNDS", 1)
    monkeypatch.setattr(_benchmark_binary, "_STRETCH_SECONDS", 0.05)
    only_statistics(stand_in)
    timing = Timing(min_runs=3, min_seconds=0.0, sustained_minutes=0.005)
    answer = done(Errand(model, None, samples("first", 1), 1, timing=timing))
    assert answer.sustained
    assert answer.sustained[0]["p50_ms"] == pytest.approx(0.21)


def test_without_a_binary_the_message_says_what_to_set(
    phone: Device, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(_benchmark_binary.VARIABLE, raising=False)
    with pytest.raises(MissingRuntime, match="TIGHTFIT_BENCHMARK_MODEL is not set"):
        done(Errand(model, None, samples("first", 1), 1))
    monkeypatch.setenv(_benchmark_binary.VARIABLE, "/nowhere/benchmark_model")
    with pytest.raises(MissingRuntime, match="names no file"):
        done(Errand(model, None, samples("first", 1), 1))


def test_an_onnx_file_cannot_run_there(phone: Device, stand_in: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"runs \.tflite files only"):
        done(Errand(dense_onnx(tmp_path / "m.onnx"), None, samples(), 2))


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("echo 'ERROR: Failed to load model' >&2; exit 1", "Failed to load model"),
        ("exit 0", "printed no times that can be read"),
        (f"{STATISTICS}for f in *.out; do : > $f; done", "left 0 bytes of outputs, of 16"),
    ],
)
def test_a_binary_that_fails_is_quoted(phone: Device, stand_in: Path, model: Path, fails: str, words: str) -> None:
    only_statistics(stand_in, fails=fails)
    with pytest.raises(TargetError, match=words):
        done(Errand(model, None, samples("first", 1), 1))
    assert phone.left() == []


def test_a_binary_that_hangs_is_ended(phone: Device, stand_in: Path, model: Path) -> None:
    only_statistics(stand_in, fails="sleep 600")
    with pytest.raises(TargetError, match="was killed"):
        done(Errand(model, None, samples("first", 1), 1, seconds=3))
    assert phone.left() == []


@given(st.lists(st.integers(1, 900_000), min_size=1, max_size=3))
def test_up_to_three_calls_are_told_from_their_statistics(calls: list[int]) -> None:
    """As stats_calculator.h prints them: alike ones shortened, the mean with six digits."""
    mean = sum(calls) / len(calls)
    ends = f"first={calls[0]} curr={calls[-1]} min={min(calls)} max={max(calls)} avg={mean:.6g} std=1"
    alike = f"curr={calls[-1]}{'(all same)' if len(calls) > 1 else ''}"
    line = f"count={len(calls)} {alike if len(set(calls)) == 1 else ends}"
    said = process(f"{line}\nInference timings in us: Init: 10, First inference: 20, Warmup (avg): 3\n")
    assert said is not None
    assert [round(call * 1e6) for call in (said.calls[0], said.calls[-1])] == [calls[0], calls[-1]]
    # The mean's six digits, three times over: half a digit of a mean that begins with 1 is 5e-6 of it.
    assert [call * 1e6 for call in said.calls] == pytest.approx(calls, rel=0, abs=0.6 + 1.5e-5 * mean)
    assert (said.load, said.first) == (1e-5, 2e-5)


def test_more_calls_than_can_be_told_apart_are_not_guessed() -> None:
    line = "count=5 first=1 curr=9 min=1 max=9 avg=5 std=3"
    assert process(f"{line}\nInference timings in us: Init: 10, First inference: 20, ") is None


def test_the_delegate_is_read_from_its_line() -> None:
    line = "Explicitly applied XNNPACK delegate, and the model graph will be partially executed by the delegate w/ 3"
    assert delegate(line) == "XNNPACK, partially"
    assert delegate("nothing") is None


def test_codes_go_in_and_floats_come_out() -> None:
    """An artifact with int8 inputs and outputs: quantized here, as the file says."""
    detail = {"shape": np.array([1, 2]), "dtype": np.int8, "quantization": (0.5, -3)}
    layout = Layout((Slot("x", detail),), (Slot("y", detail),))
    sent = list(layout.slices({"x": np.array([[1.0, -200.0], [0.2, 0.3]], np.float32)}, 1))
    assert [np.frombuffer(one[0], np.int8).tolist() for one in sent] == [[-1, -128], [-3, -2]]
    back = layout.results(np.array([-1, 1, 3, 5], np.int8).tobytes(), 2, "adb:")
    np.testing.assert_array_equal(back["y"], [[1.0, 2.0], [3.0, 4.0]])
