"""Weights of one and two bits on disk: `python benchmarks/binary_sizes.py [--peers]`.

Each case is a model, one of the recipes `binary`, `ternary` and `binary-planes` and a format. The recipe's steps run
without its training, which moves values between levels and changes neither bytes nor what a runtime computes; the
artifact's bytes stand beside float32's of the same format and beside what bits and scales alone predict, and the file
runs in its stock runtime (Core ML: the reference executor) against the simulation. With `--peers` the two-plane
artifacts are judged beside the runtimes' own two-bit quantizers.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import ptq
import torch
from binary_sizes_count import predicted, stored
from binary_sizes_peers import HEAD as PEERS_HEAD
from binary_sizes_peers import peer_rows
from binary_sizes_row import HEAD, Row

import targets
from convert import recipes
from convert.capture import Captured, capture
from convert.compress import Builder, Compressed
from convert.data import SampleSet, open_data, peek
from convert.evaluation import judge
from convert.planning import Decision, decide, planned
from convert.resident import resident_bytes
from convert.results import match_of
from device_profiles import load
from targets import Job
from targets._onnx_exact import saturates

HERE = Path(__file__).resolve().parent
RECIPES = ("binary", "ternary", "binary-planes")
# The profile that lowers each format; ONNX: the one that fits this machine's kernels, as in `ptq.py`.
DEVICES = {
    "onnx": "generic-x86" if saturates() else "generic-x86-vnni",
    "coreml": "iphone-a17-pro",
    "tflite": "raspberry-pi-5",
}
GOALS = {"binary": 12.0, "ternary": 8.0, "binary-planes": 8.0}
# DeiT has random weights: its bytes count, and few samples of its size are to be had in a minute.
CALIBRATED, JUDGED = {"deit": 4}, {"deit": 2}


def main() -> None:
    """Print the tables as they come and write them; exit code 1 where an artifact is not what was simulated."""
    options = _options()
    torch.set_num_threads(1)
    rows, lines = [], [HEAD]
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="binary-sizes-") as scratch:
        folder = Path(scratch)
        for model in options.models.split(","):
            captured = _captured(model, folder)
            for row in _study(model, captured, folder, options):
                rows.append(row)
                lines.append(str(row))
                print(row, flush=True)
        lines += ["", *_verdicts(rows), ""]
        print("\n".join(lines[-len(rows) - 2 :]), flush=True)
        if options.peers:
            lines.append(PEERS_HEAD)
            print(PEERS_HEAD, flush=True)
            for model in options.models.split(","):
                captured = _captured(model, folder)
                for line in peer_rows(model, captured, _planes(model, captured, folder), folder):
                    lines.append(line)
                    print(line, flush=True)
    options.out.write_text("# Results of `binary_sizes.py`\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(0 if all(r.match.within_one_step for r in rows) else 1)


def _study(model: str, captured: Captured, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    for target in options.formats.split(","):
        twin = folder / f"{model}-float{targets.find(target).suffix}"
        plain = decide(captured.graph, load(DEVICES[target]), target, "float32")
        _lower(captured, replace(plain, compute="float32"), captured.graph, twin)
        for recipe in options.recipes.split(","):
            yield _row(model, captured, recipe, target, twin, folder)


def _row(model: str, captured: Captured, recipe: str, target: str, twin: Path, folder: Path) -> Row:
    made = _made(model, captured, recipe, target, CALIBRATED.get(model, 16), folder)
    path = folder / f"{model}-{recipe}{targets.find(target).suffix}"
    _lower(captured, made.decision, made.graph, path)
    session = targets.find(target).open(path, threads=1)
    judged = judge(captured, made, session, _data(model, "test_2000", captured, folder, JUDGED.get(model, 4)), 1)
    kept = resident_bytes(target, (path, twin))
    return Row(
        model,
        recipe,
        target,
        targets.artifact_bytes(path),
        targets.artifact_bytes(twin),
        predicted(made.graph, half=made.decision.compute == "float16"),
        None if isinstance(kept, str) else (kept[0], kept[1]),
        match_of(made, judged),
        stored(path, target),
    )


def _made(model: str, captured: Captured, recipe: str, target: str, samples: int, folder: Path) -> Compressed:
    """The recipe's graph, without the recipe's training."""
    whole = recipes.load(recipe)
    untrained = replace(whole, steps=tuple(s for s in whole.steps if s != "finetune"))
    profile = load(DEVICES[target])
    decision = planned(captured.graph, untrained, profile.rules(target), profile, "asked for")
    data = _data(model, "train_5000", captured, folder, samples)
    return Builder(captured, data).build(decision)


def _planes(model: str, captured: Captured, folder: Path) -> dict[str, Path]:
    """Two-plane artifacts fitted on 512 samples, by format: what stands beside the peers."""
    found = {}
    for target in ("onnx", "tflite"):
        made = _made(model, captured, "binary-planes", target, 512, folder)
        found[target] = folder / f"{model}-planes-512.{target}"
        _lower(captured, made.decision, made.graph, found[target])
    return found


def _lower(captured: Captured, decision: Decision, graph: torch.fx.GraphModule, path: Path) -> None:
    inputs = tuple(replace(i, shape=(1, *i.shape[1:])) for i in captured.inputs)
    job = Job(captured.name, graph, inputs, captured.outputs, decision.rules, decision.compute)
    targets.find(decision.rules.target).lower(job, path)


def _verdicts(rows: list[Row]) -> list[str]:
    """A line for each artifact that is not as many times smaller than float as is wanted."""
    missed = [r for r in rows if r.ratio < GOALS.get(r.recipe, 0.0)]
    return [f"- {r.model}, {r.recipe}, {r.target}: {r.ratio:.1f}x, not {GOALS[r.recipe]:g}x" for r in missed]


def _captured(model: str, folder: Path) -> Captured:
    files = ptq.prepare(model, folder, argparse.Namespace(images=8, sentences=8))
    examples = peek(str(files[0]), labels=None, python=None, work=folder, preprocessing=None)
    return capture(f"models:{model}", examples=examples, work=folder, search_path=HERE)


def _data(model: str, part: str, captured: Captured, folder: Path, count: int) -> SampleSet:
    """The first `count` samples of "train_5000" or "test_2000"; for DeiT's shape noise."""
    path = folder / f"{model}-{part}-{count}.npz"
    if model == "minilm":
        np.savez(path, **models.sentences(count))
    elif model == "deit":
        drawn = np.random.default_rng(len(part)).standard_normal((count, 3, 224, 224), dtype=np.float32)
        np.savez(path, x=drawn)
    else:
        np.savez(path, x=models.images(part, count)[0])
    return open_data(str(path), captured.inputs, python=None, work=folder, preprocessing=None)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit,resnet20", help="of vit, resnet20, deit, minilm (%(default)s)")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="(%(default)s)")
    parser.add_argument("--formats", default=",".join(DEVICES), help="(%(default)s)")
    parser.add_argument("--peers", action="store_true", help="two-bit quantizers of the runtimes beside two planes")
    parser.add_argument("--out", type=Path, default=HERE / "binary_sizes_results.md", help="(binary_sizes_results.md)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
