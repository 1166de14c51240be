"""16-bit activations: a file written for int8 becomes one of TFLite's 16x8 kernels.

litert-torch quantizes activations to int8 alone. The tensors are all there, with the scales that the plan gave them and
zero point 0; what differs is their type, the operators' versions, and biases, which 16x8 kernels hold as int64. The
kernels are LiteRT's built-in ones (XNNPACK has none): many times slower than int8, for what int8 cannot carry.
`calibrate/kernels16.py` is their arithmetic.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._tflite_file import TFLiteFile
from ._tflite_prepare import codes_key
from .errors import TargetError

# The version from which an operator takes int16 (tools/versioning/op_version.cc); what is not here has no such kernel.
_VERSIONS = {
    "CONV_2D": 8,
    "DEPTHWISE_CONV_2D": 7,
    "FULLY_CONNECTED": 12,
    "ADD": 3,
    "SUB": 3,
    "MUL": 4,
    "MEAN": 2,
    "SUM": 2,
    "AVERAGE_POOL_2D": 3,
    "MAX_POOL_2D": 3,
    "SOFTMAX": 3,
    "LOGISTIC": 3,
    "TANH": 3,
    "LEAKY_RELU": 2,
    "RELU": 2,
    "PAD": 3,
    "PADV2": 3,
    "CONCATENATION": 3,
    "SLICE": 4,
    "STRIDED_SLICE": 4,
    "TRANSPOSE": 3,
    "RESHAPE": 1,
    "SPLIT": 4,
    "UNPACK": 4,
    "PACK": 3,
    "EXPAND_DIMS": 1,
    "SQUEEZE": 1,
    "QUANTIZE": 3,
    "DEQUANTIZE": 3,
    "RELU6": 2,
    "BATCH_MATMUL": 3,
    "GATHER": 4,
    "BROADCAST_TO": 3,
}


def widen(file: TFLiteFile, biases: dict[str, NDArray[np.float32]]) -> None:
    """Make every int8 activation int16; `biases`: the float bias of a layer by its codes' key.

    Raises TargetError for an operator without a 16-bit kernel.
    """
    narrow = {t for t in range(len(file.graph.tensors)) if file.dtype(t) == "INT8" and file.constant(t) is None}
    for op in file.graph.operators:
        if not narrow & {*file.inputs(op), *file.outputs(op)}:
            continue
        name = file.operator(op)
        if name not in _VERSIONS:
            layer = file.name(file.outputs(op)[0]).split(";")[0]
            raise TargetError(
                f"the layer '{layer}' computes {name} on 16-bit activations, for which TFLite has no kernel; keep the "
                "layer float, or use int8 activations."
            )
        op.opcodeIndex = file.code(name, max(file.version(op), _VERSIONS[name]))
        if hasattr(op.builtinOptions, "potScaleInt16"):
            op.builtinOptions.potScaleInt16 = False
        if len(op.inputs) > 2 and op.inputs[2] >= 0 and file.dtype(op.inputs[2]) == "INT32":
            _widen_bias(file, op, biases)
    wide = file.schema_type("INT16")
    for tensor in narrow:
        file.graph.tensors[tensor].type = wide


def _widen_bias(file: TFLiteFile, op: Any, biases: dict[str, NDArray[np.float32]]) -> None:
    """The bias as int64 multiples of input scale x weight scale, from the float bias: 32 bits may not hold it."""
    codes, steps, source = file.constant(op.inputs[1]), file.scales(op.inputs[1]), file.scales(op.inputs[0])
    old = file.constant(op.inputs[2])
    if codes is None or steps is None or source is None or old is None:
        return  # an index or a shape, not a bias
    units = np.float64(source[0]) * steps.astype(np.float64)
    bias = biases.get(codes_key(codes))
    values = old.astype(np.int64) if bias is None else np.rint(bias.astype(np.float64) / units).astype(np.int64)
    fresh = file.add_tensor(file.name(op.inputs[2]), "INT64", file.shape(op.inputs[2]), values)
    file.quantize_tensor(fresh, units.astype(np.float32))
    op.inputs[2] = fresh
