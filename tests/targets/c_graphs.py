"""Graphs for the tests of the target `c`: signs, few bits, and the compilers and emulators that run what it writes."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tflite_graphs import batch, capture, job, quantize
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import graph as graphs
from calibrate import qdq
from calibrate.simulation import simulate
from device_profiles import load
from targets import Job
from targets._c_session import build
from targets.c import TARGET


def c_job(graph: GraphModule, *inputs: Tensor) -> Job:
    """`tflite_graphs.job` under the rules of the target `c`."""
    made = job(graph, *inputs)
    return Job(made.name, graph, made.inputs, made.outputs, load("generic-riscv64").rules("c"))


def simulation(case: Job) -> Callable[..., tuple[Tensor, ...]]:
    """What an artifact of the target is held to."""
    return simulate(case.graph, "float32", "fixed_point")


class Residual(nn.Module):
    """A depthwise-separable residual block, a grouped convolution, a shortcut by slice and pad, pooling, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.grouped = nn.Conv2d(16, 12, 3, padding=2, dilation=2, groups=4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        f = nn.functional
        x = f.relu(self.stem(x))
        y = self.pointwise(f.relu6(self.depthwise(x)))
        x = f.relu(y + f.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.head(self.grouped(f.max_pool2d(x, 3, 2, 1)).mean((2, 3)))


class Sign(nn.Module):
    """-scale below zero, +scale from zero on."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, self.scale, -self.scale)


class Binary(nn.Module):
    """Two 3x3 convolutions and a linear layer on signs; channels that do and do not fill whole words."""

    def __init__(self, channels: int = 70, stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.first, self.second = Sign(0.5), Sign(0.25)
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1)
        self.point = nn.Conv2d(channels, 64, 1)
        self.head = nn.Linear(64 * 9, 7)
        self.third = Sign(1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.first(self.stem(x)))
        x = self.point(self.second(x))
        return self.head(self.third(x.flatten(1)))


def binary_graph(model: nn.Module, x: Tensor, one_bit: tuple[str, ...]) -> GraphModule:
    """The graph of `model` with Q/DQ by hand: signs behind every `where`, weights of +-1 in the layers `one_bit`."""
    graph = capture(model, x)
    for node in list(graph.graph.nodes):
        if graphs.operator_name(node) == "where":
            scale = _scale(graph, node)
            arguments = (scale, 0, -1, 1, torch.int8)
            with graph.graph.inserting_after(node):
                codes = graph.graph.call_function(qdq.QUANTIZE, (node, *arguments))
            with graph.graph.inserting_after(codes):
                wide = graph.graph.call_function(qdq.DEQUANTIZE, (codes, *arguments))
            node.replace_all_uses_with(wide, delete_user_cb=lambda user, keep=codes: user is not keep)
        elif graphs.is_weighted(node) and node.name in one_bit:
            one_bit_weight(graph, node)
    return graphs.finish(graph)


def one_bit_weight(graph: GraphModule, node: torch.fx.Node) -> None:
    """Replace a layer's weight by its signs and their mean size, and its bias by whole steps where it reads codes."""
    weight = graphs.constant(graph, node.args[1])
    codes = torch.where(weight >= 0, 1, -1).to(torch.int8)
    scales = weight.abs().flatten(1).mean(1)
    stored = [
        graphs.add_constant(graph, f"{node.name}_{part}", value, node)
        for part, value in (
            ("codes", codes),
            ("scales", scales),
            ("zeros", torch.zeros(len(scales), dtype=torch.int64)),
        )
    ]
    with graph.graph.inserting_before(node):
        wide = graph.graph.call_function(qdq.DEQUANTIZE_CHANNEL, (*stored, 0, -1, 1, torch.int8))
    node.args = (node.args[0], wide, *node.args[2:])


def _scale(graph: GraphModule, node: torch.fx.Node) -> float:
    value = node.args[1]
    return float(graphs.constant(graph, value)) if isinstance(value, torch.fx.Node) else float(value)


def one_bit_everywhere(case: GraphModule) -> GraphModule:
    """A static int8 graph whose weights keep only their signs: int8 activations, one bit per weight."""
    for node in case.graph.nodes:
        if node.target is qdq.DEQUANTIZE_CHANNEL:
            codes = graphs.constant(case, node.args[0])
            codes.copy_(torch.where(codes >= 0, 1, -1).to(torch.int8))
            node.args = (*node.args[:4], -1, 1, torch.int8)
    return graphs.finish(case)


def int8_job(model: nn.Module, x: Tensor, bits: int = 8) -> Job:
    """`model` in static int8 with weights of so many bits, quantized by hand."""
    return c_job(quantize(capture(model, x), x, bits=bits), x)


def lowered(case: Job, folder: Path) -> Path:
    """The artifact of `case`."""
    path = folder / f"model{TARGET.suffix}"
    TARGET.lower(case, path)
    return path


def run(path: Path, *inputs: Tensor) -> np.ndarray:
    """The first output of an artifact, compiled and run here."""
    return TARGET.open(path).run(batch(*inputs))["result0"]


@dataclass(frozen=True)
class Machine:
    """A processor that this one emulates: its compiler, its emulator and the flags of a variant."""

    compiler: str
    emulator: tuple[str, ...]
    flags: tuple[str, ...] = ()

    def outputs(self, path: Path, samples: list[np.ndarray], folder: Path) -> np.ndarray:
        """The outputs of all samples, run through the artifact's driver on the emulated processor."""
        for name in (self.compiler, self.emulator[0]):
            if shutil.which(name) is None:
                pytest.skip(f"{name} is not installed: equality on this processor was not checked")
        program = folder / "driver"
        build(path, program, "-static", *self.flags, command=self.compiler, driver=True)
        content = b"".join(np.ascontiguousarray(s).tobytes() for s in samples)
        done = subprocess.run([*self.emulator, str(program)], input=content, capture_output=True, check=True)
        return np.frombuffer(done.stdout, np.float32).reshape(len(samples), -1)


MACHINES = {
    "aarch64": Machine("aarch64-linux-gnu-gcc", ("qemu-aarch64", "-cpu", "cortex-a72")),
    "aarch64-dotprod": Machine("aarch64-linux-gnu-gcc", ("qemu-aarch64", "-cpu", "max"), ("-march=armv8.2-a+dotprod",)),
    "riscv64": Machine("riscv64-linux-gnu-gcc", ("qemu-riscv64",)),
    "x86-64 without extensions": Machine("gcc", ("env",), ("-march=x86-64",)),
}
