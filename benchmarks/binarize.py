"""Binarizers over the zoo: drift, accuracy, bytes, and how little calibration will do: `python benchmarks/binarize.py`.

Every row is one model with one binarizer, built by the product's own steps for ONNX Runtime (int8 activations, the
first and the last layer at 8 bits), lowered to ONNX, and judged by its simulation on test samples that no step saw. "w2
nearest" is rounding to the nearest of two bits, one scale per channel, which is what runtimes' own converters do. With
`--recover MINUTES` the two recipes are also trained on unlabelled training images for so long.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import models
import numpy as np
import ptq
import torch

import targets
from calibrate.graph import run
from convert.capture import Captured, capture
from convert.compress import Builder, Compressed, tensors
from convert.data import open_data, peek
from convert.planning import Decision, decide
from device_profiles import load
from targets import Job

HERE = Path(__file__).resolve().parent
DEVICE, TARGET = "generic-x86-vnni", "onnx"
METHODS = ("sign", "salient", "kernels", "ternary", "elastic", "planes")
STEPS = 'steps = ["fold_batchnorm", "fuse_activations", "quantize"'
NEAREST = 'summary = "x"\n' + STEPS + "]\nweight = { bits = 2 }\nends_bits = 8\n"
BATCH = 50


@dataclass(frozen=True)
class Row:
    """One line of the table. `cosine`: mean over samples; `top1` in percent, None for embeddings."""

    model: str
    how: str
    samples: int
    sqnr_db: float
    cosine: float
    top1: float | None
    kib: float
    seconds: float

    def __str__(self) -> str:
        top1 = "-" if self.top1 is None else f"{self.top1:.1f}"
        numbers = f"{self.sqnr_db:.1f} | {self.cosine:.4f} | {top1} | {self.kib:.0f} | {self.seconds:.0f}"
        return f"| {self.model} | {self.how} | {self.samples} | {numbers} |"


HEAD = "| model | binarizer | calibration samples | SQNR dB | cosine | top-1 % | KiB | CPU s |\n|" + "---|" * 8


def main() -> None:
    """Print the table as it comes and write it beside this file."""
    options = _options()
    torch.set_num_threads(1)
    lines = [HEAD]
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="binarize-") as scratch:
        for model in options.models.split(","):
            rows = []
            for row in study(model, Path(scratch), options):
                rows.append(row)
                lines.append(str(row))
                print(row, flush=True)
            lines += ["", _winner(rows), ""]
            print(f"\n{_winner(rows)}\n", flush=True)
    options.out.write_text("# Results of `binarize.py`\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def study(model: str, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one model."""
    captured, evaluation, labels = _loaded(model, folder, options)
    yield _float_row(model, captured, evaluation, labels, folder)
    yield _made(model, "w2 nearest", NEAREST, 256, captured, evaluation, labels, folder, options)
    for method in options.methods.split(","):
        counts = options.samples if method in ("sign", "planes") else options.samples[-1:]
        for count in counts:
            recipe = _recipe(method, count)
            yield _made(model, method, recipe, count, captured, evaluation, labels, folder, options)
    if options.recover and model != "minilm":
        for method in ("sign", "planes"):
            recipe = _recipe(method, options.samples[-1], options.recover)
            yield _made(model, f"{method}, trained", recipe, 5000, captured, evaluation, labels, folder, options)


def _recipe(method: str, samples: int, minutes: float = 0.0) -> str:
    text = 'summary = "x"\n' + STEPS + ', "binarize"' + (', "finetune"' if minutes else "") + "]\n"
    text += f'[parameters.binarize]\nmethod = "{method}"\nsamples = {samples}\n'
    if minutes:
        text += f"[parameters.finetune]\nsamples = 5000\niterations = 100000\ntime_limit_s = {minutes * 60:.1f}\n"
    return text


def _made(
    model: str,
    how: str,
    recipe: str,
    count: int,
    captured: Captured,
    evaluation: dict[str, np.ndarray],
    labels: np.ndarray | None,
    folder: Path,
    options: argparse.Namespace,
) -> Row:
    start = time.process_time()
    data = _calibration(model, max(count, 64), captured, folder)
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    decision = decide(captured.graph, load(DEVICE), TARGET, str(folder / "recipe.toml"))
    made = Builder(captured, data).build(decision)
    seconds = time.process_time() - start
    quality = _quality(captured, made.graph, evaluation, labels)
    if options.ledger:
        print("\n".join(f"    {e.step} {e.layer}: {e.action}; {e.reason}" for e in made.ledger), file=sys.stderr)
    return Row(model, how, count, *quality, _kib(captured, decision, made, folder), seconds)


def _float_row(
    model: str, captured: Captured, evaluation: dict[str, np.ndarray], labels: np.ndarray | None, folder: Path
) -> Row:
    decision = decide(captured.graph, load(DEVICE), TARGET, "float32")
    made = Builder(captured, _calibration(model, 64, captured, folder)).build(decision)
    return Row(
        model,
        "float",
        0,
        *_quality(captured, made.graph, evaluation, labels),
        _kib(captured, decision, made, folder),
        0,
    )


def _kib(captured: Captured, decision: Decision, made: Compressed, folder: Path) -> float:
    """The size of the ONNX file."""
    inputs = tuple(replace(i, shape=(1, *i.shape[1:])) for i in captured.inputs)
    job = Job(captured.name, made.graph, inputs, captured.outputs, decision.rules, decision.compute)
    path = folder / "model.onnx"
    targets.find(TARGET).lower(job, path)
    return targets.artifact_bytes(path) / 1024


def _quality(
    captured: Captured, graph: torch.fx.GraphModule, evaluation: dict[str, np.ndarray], labels: np.ndarray | None
) -> tuple[float, float, float | None]:
    """(SQNR dB, mean cosine, top-1 in percent) of the first output against the float graph's."""
    wanted, got = [], []
    total = len(next(iter(evaluation.values())))
    for start in range(0, total, BATCH):
        batch = tensors({k: v[start : start + BATCH] for k, v in evaluation.items()}, captured.inputs)
        wanted.append(run(captured.graph, batch)[0].flatten(1))
        got.append(run(graph, batch)[0].flatten(1))
    a, b = torch.cat(wanted).double(), torch.cat(got).double()
    noise = float((a - b).square().sum()) or 1e-30
    top1 = None if labels is None else 100 * float((b.argmax(1) == torch.from_numpy(labels)).double().mean())
    cosine = float(torch.nn.functional.cosine_similarity(a, b).mean())
    return 10 * float(np.log10(float(a.square().sum()) / noise)), cosine, top1


def _winner(rows: list[Row]) -> str:
    """Who comes closest, among those of one bit and among those of up to two."""
    measured = [r for r in rows if r.how not in ("float", "w2 nearest")]
    nearest = next((r for r in rows if r.how == "w2 nearest"), None)
    if not measured or nearest is None:
        return ""
    one = [r for r in measured if r.how.split(",")[0] in ("sign", "salient", "kernels")]
    parts = [f"**{rows[0].model}**: closest is {_told(max(measured, key=lambda r: r.sqnr_db))}"]
    if one:
        parts.append(f"with one bit {_told(max(one, key=lambda r: r.sqnr_db))}")
    return "; ".join(parts) + f"; two bits rounded to nearest: {nearest.sqnr_db:.1f} dB, cosine {nearest.cosine:.3f}."


def _told(row: Row) -> str:
    return f"`{row.how}` with {row.sqnr_db:.1f} dB, cosine {row.cosine:.3f}, {row.kib:.0f} KiB"


def _calibration(model: str, count: int, captured: Captured, folder: Path) -> object:
    path = folder / f"{model}-{count}.npz"
    if not path.exists():
        arrays = models.sentences(count) if model == "minilm" else {"x": models.images("train_5000", count)[0]}
        np.savez(path, **arrays)
    return open_data(str(path), captured.inputs, python=None, work=folder, preprocessing=None)


def _loaded(
    model: str, folder: Path, options: argparse.Namespace
) -> tuple[Captured, dict[str, np.ndarray], np.ndarray | None]:
    """The model, its evaluation samples by input name, and their labels. Exits with the reason when it is absent."""
    try:
        files = ptq.prepare(model, folder, argparse.Namespace(images=options.judged, sentences=options.judged))
    except SystemExit as reason:
        sys.exit(f"{model} is absent: {reason}")
    examples = peek(str(files[0]), labels=None, python=None, work=folder, preprocessing=None)
    captured = capture(f"models:{model}", examples=examples, work=folder, search_path=HERE)
    with np.load(files[1]) as arrays:
        evaluation = dict(arrays)
    if model == "minilm":
        return captured, evaluation, None
    return captured, {captured.inputs[0].name: evaluation["x"]}, models.images("test_2000", options.judged)[1]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet20,vit,minilm", help="(%(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="(%(default)s)")
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 256], help="calibration samples (32 256)")
    parser.add_argument("--judged", type=int, default=1000, help="test images, or sentences (%(default)s)")
    parser.add_argument("--recover", type=float, default=0.0, metavar="MINUTES", help="train for so long besides")
    parser.add_argument("--ledger", action="store_true", help="print what every step did, layer by layer")
    parser.add_argument("--out", type=Path, default=HERE / "binarize_results.md", help="(binarize_results.md)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
