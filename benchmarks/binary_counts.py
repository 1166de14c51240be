"""Instructions of binary layers beside int8, on emulated boards: the target `c`, ONNX Runtime and LiteRT.

    python benchmarks/binary_counts.py [--only NAME] [--board NAME]

The cases and artifacts of `binary_kernels.py`, except that ONNX Runtime gets its usual int8 (Arm's kernels need no
weights of 7 bits). Outputs are compared bit by bit: those of the target `c` with the simulation, which they must equal,
those of the runtimes with this machine's. Counts are instructions of one inference between two marks, calls from Python
included (some thousands); they are no time. Needs the boards (`tightfit emulator build raspberry-pi-4b`) and a cross
compiler.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "targets"), str(ROOT / "tests" / "calibrate")]

from dataclasses import replace  # noqa: E402

from binary_kernels import CASES, lowered  # noqa: E402
from c_graphs import binary_graph, c_job, simulation  # noqa: E402
from tflite_graphs import batch, capture, job, quantize  # noqa: E402

import targets  # noqa: E402
from device_profiles import load  # noqa: E402
from targets.errands import Errand, carry_out  # noqa: E402
from targets.transports import opened  # noqa: E402

BOARDS = ("raspberry-pi-4b", "raspberry-pi-5")
COUNTED = 2
# The text of more int8 weights than this takes a C compiler a minute, on each board anew.
LARGEST_C = 700_000
LABELS = ("c binary", "c int8", "onnx int8", "tflite int8")


def artifacts(name: str, folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """label -> the artifact of a case and its output: the simulation's for `c`, this machine's for the runtimes."""
    make, x = CASES[name]
    torch.manual_seed(0)
    plain = make(False).eval()
    torch.manual_seed(0)
    jobs = {"c binary": ("c", c_job(binary_graph(make(True).eval(), x, ("linear", "conv2d")), x))}
    if sum(p.numel() for p in plain.parameters()) <= LARGEST_C:
        jobs["c int8"] = ("c", c_job(quantize(capture(plain, x), x), x))
    rules = load("raspberry-pi-4b").rules("onnx")
    jobs["onnx int8"] = ("onnx", replace(job(quantize(capture(plain, x), x), x), rules=rules))
    jobs["tflite int8"] = ("tflite", job(quantize(capture(plain, x), x), x))
    made = {}
    for label, (target, task) in jobs.items():
        found, path = lowered(label, target, task, folder)
        exact = target == "c"
        made[label] = path, simulation(task)((x,))[0].numpy() if exact else run(found, path, x)
    return made


def run(target: targets.Target, path: Path, x: torch.Tensor) -> np.ndarray:
    """An artifact's output on this machine."""
    return target.open(path, threads=1).run(batch(x))["result0"]


def counted(board: str, path: Path, x: torch.Tensor, wanted: np.ndarray) -> tuple[dict[str, int], bool]:
    """Instructions of one inference by class, the least of those counted, and whether the output is `wanted`."""
    errand = Errand(path, None, batch(x), len(x), count=COUNTED)
    with opened(f"emulated:{board}") as transport:
        if not transport.counts:
            sys.exit(f"{board} was built without what counts instructions: build it again where there is a compiler")
        answer = carry_out(transport, errand, lambda *_: None).artifact
    least = min(answer.counts, key=lambda count: count["all"])
    return least, bool(np.array_equal(answer.outputs["result0"], wanted))


def row(board: str, name: str, made: dict[str, tuple[Path, np.ndarray]]) -> str:
    """One line of the table: millions of instructions, and those of each int8 per one of the binary layer."""
    found, different = {}, []
    for label, (path, wanted) in made.items():
        found[label], equal = counted(board, path, CASES[name][1], wanted)
        if not equal and label.startswith("c "):
            sys.exit(f"{name} on {board}: {label} does not give the bits of its simulation")
        different += [] if equal else [label]
    binary = found["c binary"]
    cells = [f"{found[k]['all'] / 1e6:.2f}" if k in found else "-" for k in LABELS]
    cells.insert(1, f"{binary['simd'] / 1e6:.2f}")
    cells += [f"{found[k]['dot'] / 1e6:.2f}" for k in LABELS[2:]]
    cells += [f"{found[k]['all'] / binary['all']:.1f}" for k in LABELS[2:]]
    equal_here = f"but {', '.join(different)}" if different else "all"
    return f"| {name} | {board} | {' | '.join(cells)} | {equal_here} |"


def main() -> None:
    """Print the table: a line per case and board."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--board", choices=BOARDS)
    options = parser.parse_args()
    columns = ["case", "board", *LABELS, "onnx `dot`", "tflite `dot`", "x onnx int8", "x tflite int8", "outputs equal"]
    columns.insert(3, "of it `simd`")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for name in CASES:
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = artifacts(name, Path(folder))
            for board in (options.board,) if options.board else BOARDS:
                print(row(board, name, made), flush=True)


if __name__ == "__main__":
    main()
