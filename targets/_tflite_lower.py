"""One job to the bytes of one .tflite file."""

import importlib.util

import torch

from . import Job
from ._tflite_convert import convert
from ._tflite_edit import halve_constants, name_interface, pack_static, pack_weights
from ._tflite_fence import remove_fences
from ._tflite_file import TFLiteFile
from ._tflite_prepare import Prepared, codes_key, prepare
from ._tflite_run import try_once
from ._tflite_tidy import tidy
from ._tflite_wide import widen
from .errors import MissingRuntime, TargetError


def lower(job: Job) -> bytes:
    """The file's bytes, which the runtime here, if any, has run once; the same job gives the same bytes."""
    if importlib.util.find_spec("litert_torch") is None:
        raise MissingRuntime("lowering to TFLite needs litert-torch; pip install 'tightfit[tflite]' brings it.")
    samples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in job.inputs)
    prepared = prepare(job.graph, samples)
    file = TFLiteFile(convert(prepared.graph, samples, prepared.static))
    file.inline_composites()
    remove_fences(file, prepared.fences)
    name_interface(file, job.inputs, job.outputs, codes_outside=job.rules.quantize_io and prepared.static)
    refuse_foreign_codes(file, prepared)
    tidy(file)
    if prepared.wide:
        widen(file, prepared.biases)
    pack_static(file, prepared.small)
    pack_weights(file, prepared.packed)
    if job.compute == "float16":
        halve_constants(file)
    file.names_are_unique()
    content = file.to_bytes()
    try_once(content, {spec.name: sample.numpy() for spec, sample in zip(job.inputs, samples, strict=True)})
    return content


def refuse_foreign_codes(file: TFLiteFile, prepared: Prepared) -> None:
    """Raise TargetError when the converter quantized a weight that the graph holds in float.

    It does so for any operator between Q and DQ whose constant operand has none, and picks the scale by itself.
    """
    for op in file.graph.operators:
        for tensor in file.inputs(op):
            codes = file.constant(tensor) if file.dtype(tensor) == "INT8" else None
            if codes is not None and codes_key(codes) not in prepared.codes:
                layer = file.name(file.outputs(op)[0]).split(";")[0]
                raise TargetError(
                    f"the layer '{layer}' has quantized inputs and output but a float constant, which litert-torch "
                    f"would quantize on its own for {file.operator(op)}; quantize that constant too, or keep the layer "
                    "float."
                )
