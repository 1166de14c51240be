"""The runtimes' own two-bit weights beside two planes: each converter's file runs in its stock runtime."""

from collections.abc import Callable, Iterator
from pathlib import Path

import models
import numpy as np
import torch
from binary_sizes_count import stored
from peers import OnnxSession, Samples, one_by_one
from ptq import exported
from ptq_cases import Case

import targets
from calibrate.graph import run
from convert.capture import Captured
from convert.compress import tensors

IMAGES = 500
HEAD = (
    "| model | runtime | two bits by | SQNR dB | mean cosine | top-1 % | KiB | layers' weights in the file |\n|"
    + "---|" * 8
)


def matmul_nbits(twin: Path, path: Path) -> None:
    """ONNX Runtime's MatMulNBits at 2 bits, blocks of 32, round to nearest."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    work = MatMulNBitsQuantizer(onnx.load(twin), algo_config=DefaultWeightOnlyQuantConfig(block_size=32, bits=2))
    work.process()
    work.model.save_model_to_file(str(path))


def ai_edge(how: str, operators: str = "ALL_SUPPORTED") -> Callable[[Path, Path], None]:
    """The AI Edge Quantizer at 2 bits per channel, min-max; `how`: "dynamic" or "weight_only"."""

    def convert(twin: Path, path: Path) -> None:
        from ai_edge_quantizer import qtyping, quantizer, recipe_manager

        recipe = recipe_manager.RecipeManager()
        add = getattr(recipe, f"add_{how}_config")
        add(regex=".*", operation_name=qtyping.TFLOperationName[operators], num_bits=2)
        work = quantizer.Quantizer(str(twin), recipe.get_quantization_recipe())
        path.write_bytes(work.quantize().quantized_model)

    return convert


PEERS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "MatMulNBits, nearest": ("onnx", matmul_nbits),
    "ai-edge-quantizer, dynamic": ("tflite", ai_edge("dynamic")),
    # LiteRT's INT2 convolution gives NaN, so its best is linear layers alone.
    "ai-edge-quantizer, dynamic, linear layers": ("tflite", ai_edge("dynamic", "FULLY_CONNECTED")),
    "ai-edge-quantizer, weights only": ("tflite", ai_edge("weight_only")),
}


def peer_rows(model: str, captured: Captured, planes: dict[str, Path], folder: Path) -> Iterator[str]:
    """A line for the two planes and each peer of either runtime, on the same test images; none for models without."""
    if model not in ("vit", "resnet20"):
        return
    images, labels = models.images("test_2000", IMAGES)
    samples = {captured.inputs[0].name: images}
    with torch.no_grad():
        wanted = run(captured.graph, tensors(samples, captured.inputs))[0].numpy()
    for form in ("onnx", "tflite"):
        session = targets.find(form).open(planes[form], threads=1)
        yield _line(model, form, "**Tightfit's two planes**", planes[form], session, samples, wanted, labels)
        for how, (own, convert) in PEERS.items():
            if own != form:
                continue
            path = folder / f"{model}-{how.replace(' ', '')}.{form}"
            try:
                twin = exported(Case(how, model, form, "", "sqnr", None), samples, folder)
                convert(twin, path)
                session = OnnxSession(path) if form == "onnx" else targets.find(form).open(path, threads=1)
                yield _line(model, form, how, path, session, samples, wanted, labels)
            except Exception as error:  # whatever a peer's converter or runtime raises becomes its line in the table
                reason = next(iter(str(error).splitlines()), "")[:160] or type(error).__name__
                yield f"| {model} | {form} | {how} | failed: {reason} | - | - | - | - |"


def _line(
    model: str,
    form: str,
    how: str,
    path: Path,
    session: OnnxSession | targets.Session,
    samples: Samples,
    wanted: np.ndarray,
    labels: np.ndarray,
) -> str:
    """Quality against the float graph's outputs `wanted` [n, classes]."""
    got = np.concatenate([next(iter(session.run(s).values())) for s in one_by_one(samples)]).astype(np.float64)
    a = wanted.astype(np.float64)
    noise = max(float(np.square(a - got).sum()), 1e-30)
    sqnr = 10 * np.log10(float(np.square(a).sum()) / noise)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(got, axis=1)
    cosine = float(np.mean((a * got).sum(1) / np.maximum(lengths, 1e-30)))
    top1 = 100 * float((got.argmax(1) == labels).mean())
    kib = path.stat().st_size / 1024
    return f"| {model} | {form} | {how} | {sqnr:.1f} | {cosine:.4f} | {top1:.1f} | {kib:.0f} | {stored(path, form)} |"
