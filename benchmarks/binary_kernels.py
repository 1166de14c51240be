"""Binary layers of the target `c` beside ONNX Runtime and LiteRT: CPU time of one thread, in turns, in one process.

    python benchmarks/binary_kernels.py [--rounds N] [--only NAME]

Every case is one layer, linear or 3x3 convolution, whose weights and inputs are -1 and +1. It takes float and gives
float everywhere: the binary layer's time includes finding the signs of its input. The others compute the same shape:
ONNX Runtime in float and in int8 (Q/DQ around the layer, weights of 7 bits where the machine has no VNNI), LiteRT in
int8. Medians over rounds in which each runtime has one turn.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "targets"), str(ROOT / "tests" / "calibrate")]

from c_graphs import Sign, binary_graph, c_job, simulation  # noqa: E402
from tflite_graphs import batch, capture, job, quantize  # noqa: E402

import targets  # noqa: E402
from device_profiles import load  # noqa: E402


class Linear(nn.Module):
    """Signs of [rows, inputs], then a linear layer without bias."""

    def __init__(self, inputs: int, outputs: int, signs: bool) -> None:
        super().__init__()
        self.signs = Sign(1.0) if signs else nn.Identity()
        self.layer = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.signs(x))


class Conv(nn.Module):
    """Signs of an image, then a 3x3 convolution without bias."""

    def __init__(self, channels: int, signs: bool) -> None:
        super().__init__()
        self.signs = Sign(1.0) if signs else nn.Identity()
        self.layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.signs(x))


def linear(rows: int, inputs: int, outputs: int) -> tuple[Callable[[bool], nn.Module], Tensor]:
    """A linear case: the module with or without signs, and an input."""
    return lambda signs: Linear(inputs, outputs, signs), torch.randn(rows, inputs)


def conv(channels: int, size: int) -> tuple[Callable[[bool], nn.Module], Tensor]:
    """A convolution case."""
    return lambda signs: Conv(channels, signs), torch.randn(1, channels, size, size)


CASES = {
    "linear 197x768x768": linear(197, 768, 768),
    "linear 197x3072x768": linear(197, 768, 3072),
    "linear 197x768x3072": linear(197, 3072, 768),
    "linear 1x4096x4096": linear(1, 4096, 4096),
    "conv3x3 64x56x56": conv(64, 56),
    "conv3x3 128x28x28": conv(128, 28),
    "conv3x3 256x14x14": conv(256, 14),
    "conv3x3 512x7x7": conv(512, 7),
}


def lowered(label: str, target: str, task: targets.Job, folder: Path) -> tuple[targets.Target, Path]:
    """The target called `target`, and the artifact that it made of a job."""
    found = targets.find(target)
    path = folder / f"{label.replace(' ', '_')}{found.suffix}"
    found.lower(task, path)
    return found, path


def sessions(name: str, folder: Path) -> dict[str, tuple[Callable[[], object], np.ndarray]]:
    """What computes a case: runtime -> (a call, its output). The binary layer must equal its simulation to the bit."""
    make, x = CASES[name]
    torch.manual_seed(0)
    signs = c_job(binary_graph(make(True).eval(), x, ("linear", "conv2d")), x)
    plain = make(False).eval()
    graph = capture(plain, x)
    coded = quantize(capture(plain, x), x)
    jobs = {"c binary": ("c", signs), "c int8": ("c", c_job(coded, x))}
    onnx_rules = load("generic-x86").rules("onnx")
    jobs["onnx float"] = ("onnx", replace(job(graph, x), rules=onnx_rules))
    jobs["onnx int8"] = ("onnx", replace(job(seven_bits(plain, x), x), rules=onnx_rules))
    jobs["tflite int8"] = ("tflite", job(quantize(capture(plain, x), x), x))
    made = {}
    for label, (target, task) in jobs.items():
        found, path = lowered(label, target, task, folder)
        session = found.open(path, threads=1)
        made[label] = session.bind(batch(x)), session.run(batch(x))["result0"]
        kinds = found.placement(path, task).kinds
        wanted = {"c binary": "w1a1", "c int8": "int8", "tflite int8": "int8"}.get(label)
        if wanted is not None and not any(k.startswith(wanted) for k in kinds):
            sys.exit(f"{name}: {label} does not compute in {wanted}: {kinds}")
    wanted_output = simulation(signs)((x,))[0].numpy()
    if not np.array_equal(made["c binary"][1], wanted_output):
        sys.exit(f"{name}: the binary layer is not what its simulation computes")
    return made


def seven_bits(plain: nn.Module, x: Tensor):
    """The layer in the form that ONNX Runtime is fast at on x86: unsigned activations, weights of 7 bits.

    Codes stand where `quantize` puts them, 128 higher.
    """
    from calibrate import graph as graphs
    from calibrate import qdq

    graph = quantize(capture(plain, x), x)
    for node in graph.graph.nodes:
        if node.target in (qdq.QUANTIZE, qdq.DEQUANTIZE):
            node.args = (*node.args[:2], node.args[2] + 128, 0, 255, torch.uint8)
        elif node.target is qdq.DEQUANTIZE_CHANNEL:
            codes = graphs.constant(graph, node.args[0])
            codes.copy_(torch.round(codes / 2).to(torch.int8))
            graphs.constant(graph, node.args[1]).mul_(2)
            node.args = (*node.args[:4], -63, 63, torch.int8)
    return graphs.finish(graph)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of CPU time of this thread, the median over rounds; each round times every call once.

    A call is repeated until its turn takes about 5 ms, so that the clock's steps count for nothing.
    """
    repeats = {}
    for label, call in calls.items():
        for _ in range(3):
            call()
        start = time.thread_time()
        call()
        repeats[label] = max(1, round(0.005 / max(time.thread_time() - start, 1e-6)))
    found: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            start = time.thread_time()
            for _ in range(repeats[label]):
                call()
            found[label].append((time.thread_time() - start) / repeats[label] * 1e3)
    return {label: statistics.median(times) for label, times in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", help="cases whose name holds this")
    options = parser.parse_args()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    print(
        "AVX-512 VPOPCNTDQ" if "avx512_vpopcntdq" in flags else "AVX2" if "avx2" in flags else "portable C", flush=True
    )
    columns = ("c binary", "c int8", "onnx float", "onnx int8", "tflite int8")
    print("| case | " + " | ".join(columns) + " | x float | x onnx int8 | x tflite int8 |")
    print("|---" * (len(columns) + 4) + "|", flush=True)
    for name in CASES:
        if options.only and options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = medians({k: call for k, (call, _) in sessions(name, Path(folder)).items()}, options.rounds)
        ratios = [found[k] / found["c binary"] for k in ("onnx float", "onnx int8", "tflite int8")]
        cells = [f"{found[c]:.3f}" for c in columns] + [f"{r:.1f}" for r in ratios]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
