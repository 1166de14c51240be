"""Small artifacts, errands on this machine, and Pythons that lack something, for the tests of agent and errands."""

import base64
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from calibrate.samples import Batch
from targets.agent import known_answer
from targets.errands import Answer, Errand, carry_out
from targets.transports.local import LocalTransport, transport

QUICK_RUNS = 40


def dense_onnx(path: Path, *, layers: int = 1, width: int = 8) -> Path:
    """x [2, width] float32 -> y: linear layers with relu, seeded weights."""
    generator = np.random.default_rng(0)
    nodes, constants, value = [], [], "x"
    for index in range(layers):
        weight = generator.normal(0, width**-0.5, (width, width)).astype(np.float32)
        constants.append(onnx.numpy_helper.from_array(weight, f"w{index}"))
        last = index == layers - 1
        nodes += [helper.make_node("MatMul", [value, f"w{index}"], [f"m{index}"])]
        value = "y" if last else f"r{index}"
        nodes += [helper.make_node("Relu", [f"m{index}"], [value])]
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, width])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def dynamic_tflite(path: Path) -> Path:
    """first [1, 8] float32 -> result0 [1, 4]: one per-channel dynamic int8 linear layer, 912 bytes."""
    path.write_bytes(base64.b64decode(known_answer._FILE))
    return path


def samples(name: str = "x", count: int = 6, width: int = 8) -> Batch:
    """Inputs [count, width] in [-1, 1]."""
    return {name: np.random.default_rng(1).uniform(-1, 1, (count, width)).astype(np.float32)}


def local(errand: Errand, python: tuple[str, ...] | None = None) -> Answer:
    """Carry an errand out on this machine, with its own Python or another command for one."""
    place = transport("local")
    if python is not None:
        place.python = python
    try:
        place.open()
        return carry_out(place, errand, lambda *_: None)
    finally:
        place.close()


def opened_local() -> Iterator[LocalTransport]:
    """An open transport, closed afterwards."""
    place = transport("local")
    place.open()
    yield place
    place.close()


def only(folder: Path, *names: str) -> tuple[str, ...]:
    """A Python that finds these of the installed packages and no other."""
    folder.mkdir(exist_ok=True)
    for name in names:
        for found in Path(np.__file__).parents[1].glob(f"{name}*"):
            if not (folder / found.name).exists():
                (folder / found.name).symlink_to(found)
    return ("env", f"PYTHONPATH={folder}", sys.executable, "-S")


def old_runtime() -> tuple[str, ...]:
    """A Python with tflite-runtime 2.14 and the numpy it needs, and nothing else; skips where PyPI is out of reach."""
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux":
        pytest.skip("tflite-runtime 2.14 has no wheel for this Python: refusing it was not checked")
    site = Path(tempfile.gettempdir()) / "tightfit-tests-tflite-runtime-2.14"
    if not (site / "tflite_runtime").is_dir():
        part = site.with_name(f"{site.name}-{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--target", part]
        done = subprocess.run([*command, "numpy==1.26.4", "tflite-runtime==2.14.0"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"tflite-runtime 2.14 could not be installed: {done.stderr.strip().splitlines()[-1][:200]}")
        part.rename(site)
    return ("env", f"PYTHONPATH={site}", sys.executable, "-S")
