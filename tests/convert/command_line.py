"""What the tests of the command line share: a newcomer's folder with a small model and data, and ways to run in it."""

import functools
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
SAMPLES = 16

# The user's own code. `data` needs no torch, so that its child interpreter starts at once.
MODELS = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x

class Loop(nn.Module):
    def forward(self, x):
        return x * float(x.detach().numpy().sum())

def chatty():
    print("noise " * 10_000)
    print("more noise " * 10_000, file=sys.stderr)
    return Net(), (torch.zeros(2, 1, 8, 8),)

def leaves():
    raise SystemExit(0)
"""
DATA = """
import os, pathlib, sys, time
import numpy

def chatty():
    print("noise " * 10_000)
    print("more noise " * 10_000, file=sys.stderr)
    for seed in range(16):
        yield {"x": numpy.random.default_rng(seed).standard_normal((1, 8, 8)).astype("float32")}

def leaves():
    raise SystemExit(0)

def slow():
    pathlib.Path("started").write_text(str(os.getpid()))
    time.sleep(300)
"""


@dataclass(frozen=True)
class Said:
    """What one command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one paragraph of the error; an AssertionError where there is another number of them, or a traceback."""
        assert "Traceback" not in self.err
        paragraphs = re.findall(r"^error: (.*)", self.err, re.MULTILINE | re.DOTALL)
        assert len(paragraphs) == 1, self.err
        assert paragraphs[0].count("error: ") == 0, self.err
        return str(paragraphs[0]).strip()


Tightfit = Callable[..., Said]


def in_process(arguments: str) -> int:
    """Run the very function that the installed command calls; returns the exit code."""
    from unittest import mock

    from convert.cli import main

    with mock.patch.object(sys, "argv", ["tightfit", *shlex.split(arguments)]):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def command(arguments: str, before: str = "") -> list[str]:
    """The same in a process of its own, after the Python code `before`."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{before}\nfrom convert.cli import main\nmain()"
    return [sys.executable, "-c", code, *shlex.split(arguments)]


def in_own_process(arguments: str, before: str = "") -> Said:
    """Run `command` to its end in the current folder."""
    done = subprocess.run(command(arguments, before), capture_output=True, text=True, timeout=300)
    return Said(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> set[str]:
    """Every file and folder there is, hidden ones included."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def images(count: int = SAMPLES, shape: tuple[int, ...] = (1, 8, 8)) -> np.ndarray:
    """Random samples, float32 [count, *shape]."""
    return np.random.default_rng(0).standard_normal((count, *shape)).astype("float32")


def net() -> "torch.nn.Module":  # noqa: F821
    """The model of MODELS with weights from a seed."""
    import torch

    scope: dict[str, type] = {}
    exec(MODELS, scope)
    torch.manual_seed(0)
    return scope["Net"]().eval()


@functools.cache
def exported() -> bytes:
    """`net` as a .pt2 with a dynamic batch."""
    import torch

    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(net(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes)
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, Path(folder) / "net.pt2")
        return (Path(folder) / "net.pt2").read_bytes()


def onnx_model(weight: float = 0.5) -> bytes:
    """Flatten and one Gemm: x [batch, 1, 8, 8] -> y [batch, 3]; every weight is `weight`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "w", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(np.full((64, 3), weight, np.float32), "w"),
            numpy_helper.from_array(np.zeros(3, np.float32), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def fill(folder: Path) -> None:
    """net.pt2, net.onnx, models.py, data.py and cal.npz."""
    (folder / "net.pt2").write_bytes(exported())
    (folder / "net.onnx").write_bytes(onnx_model())
    (folder / "models.py").write_text(MODELS)
    (folder / "data.py").write_text(DATA)
    np.savez(folder / "cal.npz", x=images())
