"""Calls litert-torch quietly, and says in plain words what it cannot lower."""

import contextlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator

import torch
from torch.fx import GraphModule

from calibrate import graph as graphs

from ._tflite_run import discarded_stderr
from .errors import TargetError

_OPERATOR = re.compile(r"\b(?:aten|quantized_decomposed|tightfit|torchvision)(?:\.|::)([A-Za-z_0-9]+)")


def convert(graph: GraphModule, samples: tuple[torch.Tensor, ...], static: bool) -> bytes:
    """The bytes of a .tflite file for `graph`, whose inputs have the shapes and dtypes of `samples`.

    `static`: fold Q/DQ into int8 kernels. Raises TargetError naming the operator and its layers.
    """
    try:
        with _quiet():
            return _convert(graph, samples, static)
    except Exception as error:  # litert-torch raises whatever its layers raise; none of it is a class of its own
        raise TargetError(_refusal(graph, error)) from error


def _convert(graph: GraphModule, samples: tuple[torch.Tensor, ...], static: bool) -> bytes:
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    quantizer = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    config = QuantConfig(pt2e_quantizer=quantizer) if static else None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.tflite")
        litert_torch.convert(graph, samples, quant_config=config).export(path)
        with open(path, "rb") as file:
            return file.read()


def _refusal(graph: GraphModule, error: Exception) -> str:
    text = re.split(r"\n\s*(?:Original traceback|While executing|To debug)", str(error))[0].strip()
    first = text.splitlines()[0][:300] if text else type(error).__name__
    match = _OPERATOR.search(str(error))
    if match is None:
        return (
            f"litert-torch cannot lower this model to TFLite: {first}. Try another target, or write the part that "
            "fails with simpler operators."
        )
    operator = match.group(1)
    same = {operator, operator.strip("_")}  # decomposition turns linalg_svd into _linalg_svd
    layers = [graphs.layer_name(n) for n in graph.graph.nodes if graphs.operator_name(n).strip("_") in same]
    where = f" (layer {', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''})" if layers else ""
    return (
        f"litert-torch cannot lower the operator '{operator}'{where} to TFLite: {first}. Replace it in the model by "
        "operators that TFLite has, or choose another target."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the converter writes: its own console, Python's warnings and logs, and C++ logs on descriptor 2."""
    root, handlers, disabled = logging.root, list(logging.root.handlers), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), discarded_stderr():
            warnings.simplefilter("ignore")
            from litert_torch import _config

            shown, _config.config.show_progress = _config.config.show_progress, False
            try:
                yield
            finally:
                _config.config.show_progress = shown
    finally:
        root.handlers[:] = handlers
        logging.disable(disabled)
