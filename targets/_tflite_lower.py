"""One job to the bytes of one .tflite file."""

import importlib.util

import torch

from . import Job
from ._tflite_convert import convert
from ._tflite_edit import halve_constants, name_interface, pack_weights
from ._tflite_file import TFLiteFile
from ._tflite_prepare import prepare
from .errors import MissingRuntime


def lower(job: Job) -> bytes:
    """The file's bytes; the same job gives the same bytes."""
    if importlib.util.find_spec("litert_torch") is None:
        raise MissingRuntime("lowering to TFLite needs litert-torch; pip install 'tightfit[tflite]' brings it.")
    prepared = prepare(job.graph)
    samples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in job.inputs)
    file = TFLiteFile(convert(prepared.graph, samples, prepared.static))
    name_interface(file, job.inputs, job.outputs)
    pack_weights(file, prepared.packed)
    if job.compute == "float16":
        halve_constants(file)
    return file.to_bytes()
