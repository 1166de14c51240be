"""Attention on bits in the zoo's ViT: `python benchmarks/binarize_attention.py --steps 150`.

Every row is the model with static int8 for ONNX Runtime and one method of the step `binarize_attention`, from
calibration alone or trained for so many steps without labels, judged by its simulation on test images no step saw.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import binarize
import torch

from convert.compress import Builder
from convert.planning import decide
from device_profiles import load

HEAD = "| attention | training | SQNR dB | top-1 % | power lost, first to last block |\n|" + "---|" * 5
STEPS = ["fold_batchnorm", "fuse_activations", "quantize_static"]


def main() -> None:
    """Print the table as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="softmax_aware,residual,hashed", help="(%(default)s)")
    parser.add_argument("--judged", type=int, default=500, help="test images (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="train each for so many steps besides (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="attention-") as scratch:
        for row in _rows(Path(scratch), options):
            print(row, flush=True)


def _rows(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    captured, evaluation, labels = binarize._loaded("vit", folder, options)
    for method in ("", *options.methods.split(",")):
        for taken in dict.fromkeys((0, options.steps)):
            data: Any = binarize._calibration("vit", 5000 if taken else 256, captured, folder)
            (folder / "recipe.toml").write_text(_recipe(method, taken), encoding="utf-8")
            decision = decide(captured.graph, load(binarize.DEVICE), binarize.TARGET, str(folder / "recipe.toml"))
            made = Builder(captured, data).build(decision)
            decibel, _, top1 = binarize._quality(captured, made.graph, evaluation, labels)
            lost = [e.reason.partition(" ")[0] for e in made.ledger if "on bits" in e.action]
            left = any(e.step == "finetune" and "left" in e.action for e in made.ledger)
            trained = f"{taken} steps" + ", rolled back" * left if taken else "none"
            yield f"| {method or 'int8'} | {trained} | {decibel:.1f} | {top1:.1f} | {', '.join(lost) or '-'} |"


def _recipe(method: str, taken: int) -> str:
    steps = STEPS + ["binarize_attention"] * bool(method) + ["finetune"] * bool(taken)
    text = f'summary = "x"\nsteps = {steps}\n'.replace("'", '"')
    if method:
        text += f'[parameters.binarize_attention]\nmethod = "{method}"\n'
    if taken:
        text += f"[parameters.finetune]\nsamples = 5000\niterations = {taken}\ntime_limit_s = 36000.0\n"
    return text


if __name__ == "__main__":
    main()
