"""What each step brings, alone and together, model by model: `python benchmarks/ablation.py --help`.

For each model and plan: the plain recipe, each step added to it alone, all steps that helped together, and those
without one of them. Figures are SQNR in dB of the simulation against float on held-out samples, and CPU seconds.
"""

import argparse
import datetime
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ptq
import torch

from calibrate import steps as known
from convert.automatic import placed
from convert.capture import Captured, capture
from convert.compress import Builder, Judge
from convert.data import open_data, peek
from convert.host import cpu_name, system, versions
from convert.planning import Decision, decide
from device_profiles import load

HERE = Path(__file__).resolve().parent
GAIN_DB = 0.1
PLANS = (
    ("resnet20", "onnx", "int8"),
    ("resnet20", "onnx", "w4a8"),
    ("vit", "onnx", "int8"),
    ("vit", "onnx", "int8-dynamic"),
    ("minilm", "onnx", "int8-dynamic"),
    ("minilm", "onnx", "w4"),
)
CANDIDATES = (
    "equalize", "rotate", "balance_heads", "smooth", "reparameterize_layernorm", "split_outliers",
    "ridge", "gptq", "expand_residual", "reconstruct", "correct_bias", "finetune",
)  # fmt: skip


def main() -> None:
    """Print the table and write it."""
    options = _options()
    torch.set_num_threads(1)
    lines = ["| model | plan | steps | SQNR dB | CPU s |", "|---|---|---|---:|---:|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory(prefix="ablation-") as scratch:
        for model, target, recipe in PLANS:
            if options.only and not f"{model} {target} {recipe} ".startswith(f"{options.only} "):
                continue
            for line in study(model, target, recipe, Path(scratch), options):
                lines.append(line)
                print(line, flush=True)
    where = f"{datetime.date.today().isoformat()}, {cpu_name()}, {system()}; "
    where += ", ".join(f"{name} {version}" for name, version in versions().items())
    table = "\n".join(lines)
    options.out.write_text(f"# Results of `ablation.py`\n\n{where}\n\n{options.judged} held-out samples.\n\n{table}\n")


def study(model: str, target: str, recipe: str, folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """The rows of one model and plan."""
    captured, calibration, evaluation = _loaded(model, folder, options)
    builder = Builder(captured, calibration)
    judge = Judge(captured, evaluation)
    decision = decide(captured.graph, load("generic-x86"), target, recipe)
    plain = _with(decision, tuple(s for s in decision.plan.steps if s not in CANDIDATES))

    def row(what: str, made: Decision) -> tuple[float, str]:
        start = time.process_time()
        score = judge.score(builder.build(made).graph, decision.adder)
        return score, f"| {model} | {recipe} ({target}) | {what} | {score:.1f} | {time.process_time() - start:.0f} |"

    base, line = row("plain", plain)
    yield line
    helped = []
    for step in CANDIDATES:
        if step in known.names():
            score, line = row(f"plain + {step}", _adding(plain, (step,)))
            helped += [step] if score > base + GAIN_DB else []
            yield line
    if len(helped) < 2:
        return
    yield row(f"plain + {' + '.join(helped)}", _adding(plain, tuple(helped)))[1]
    for step in helped:
        yield row(f"all of these without {step}", _adding(plain, tuple(s for s in helped if s != step)))[1]


def _with(decision: Decision, steps: tuple[str, ...]) -> Decision:
    return replace(decision, plan=replace(decision.plan, steps=steps))


def _adding(decision: Decision, added: tuple[str, ...]) -> Decision:
    steps = decision.plan.steps
    for step in added:
        steps = placed(steps, step)
    return _with(decision, steps)


def _loaded(model: str, folder: Path, options: argparse.Namespace) -> tuple[Captured, object, object]:
    try:
        files = ptq.prepare(model, folder, argparse.Namespace(images=options.judged, sentences=options.judged))
    except SystemExit as reason:
        sys.exit(f"{model} is absent: {reason}")
    where = {"python": None, "work": folder, "preprocessing": None}
    examples = peek(str(files[0]), labels=None, **where)
    captured = capture(
        f"models:{model}", weights=None, inputs=(), examples=examples, python=None, work=folder, search_path=HERE
    )
    return captured, *(open_data(str(f), captured.inputs, **where) for f in files)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help='such as "resnet20" or "vit onnx int8-dynamic"')
    parser.add_argument("--judged", type=int, default=64, help="held-out samples (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "ablation_results.md", help="(ablation_results.md)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
