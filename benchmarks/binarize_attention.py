"""Attention on bits in the zoo's ViT: `python benchmarks/binarize_attention.py --minutes 3`.

Every row is the model with static int8 for ONNX Runtime and one method of the step `binarize_attention`, from
calibration alone or trained for so long without labels, judged by its simulation on test images no step saw.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
    parser.add_argument("--minutes", type=float, default=0.0, help="train each for so long besides (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="attention-") as scratch:
        for row in _rows(Path(scratch), options):
            print(row, flush=True)


def _rows(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    captured, evaluation, labels = binarize._loaded("vit", folder, options)
    for method in ("", *options.methods.split(",")):
        for minutes in dict.fromkeys((0.0, options.minutes)):
            data = binarize._calibration("vit", 5000 if minutes else 256, captured, folder)
            (folder / "recipe.toml").write_text(_recipe(method, minutes), encoding="utf-8")
            decision = decide(captured.graph, load(binarize.DEVICE), binarize.TARGET, str(folder / "recipe.toml"))
            made = Builder(captured, data).build(decision)
            decibel, _, top1 = binarize._quality(captured, made.graph, evaluation, labels)
            lost = [e.reason.partition(" ")[0] for e in made.ledger if "on bits" in e.action]
            steps = [e.reason.partition(" after ")[2].split()[0] for e in made.ledger if e.step == "finetune"]
            trained = f"{minutes:g} minutes, {steps[0]} steps" if steps else "none"
            yield f"| {method or 'int8'} | {trained} | {decibel:.1f} | {top1:.1f} | {', '.join(lost) or '-'} |"


def _recipe(method: str, minutes: float) -> str:
    steps = STEPS + ["binarize_attention"] * bool(method) + ["finetune"] * bool(minutes)
    text = f'summary = "x"\nsteps = {steps}\n'.replace("'", '"')
    if method:
        text += f'[parameters.binarize_attention]\nmethod = "{method}"\n'
    if minutes:
        text += f"[parameters.finetune]\nsamples = 5000\niterations = 100000\ntime_limit_s = {minutes * 60:.1f}\n"
    return text


if __name__ == "__main__":
    main()
