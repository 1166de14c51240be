"""A convolution as one matrix product over patches of its input, in operators that XNNPACK takes.

LiteRT has fast kernels for weights of 4 and 2 bits, and for weights computed at run time, in matrix products alone. The
patches of a k x k convolution are cut with SLICE and put side by side with CONCATENATION, first along the width, then
along the height, so that k + k slices do the work of k x k. A stride s becomes slices too: with s columns (rows) folded
into one axis, every s-th column is a slice. It is the same sum of products in the order of the file's weights [out,
height, width, in]. On x86 with AVX2 a layer takes 0.9 to 1.15 of the int8 convolution's time, all of ResNet-20 1.2 to
1.4 of it (LiteRT's built-in kernel on 4 bits: a layer 2.2 to 2.5).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._tflite_file import TFLiteFile

_SAME = 0
# CONCATENATION of more tensors is not delegated.
_MOST = 5
_NONE = 0


def fits(file: TFLiteFile, op: Any) -> bool:
    """Whether `as_matrix` can write the convolution `op`: no groups, no dilation, at most 5 x 5."""
    if file.operator(op) != "CONV_2D":
        return False
    options, (_, height, width, channels) = op.builtinOptions, file.shape(op.inputs[1])
    spread = options.dilationHFactor != 1 or options.dilationWFactor != 1
    return not spread and max(height, width) <= _MOST and channels == file.shape(op.inputs[0])[-1]


def as_matrix(file: TFLiteFile, op: Any) -> list[Any]:
    """The operators that cut the patches of the CONV_2D `op`; `op` then reads them [n, height, width, k * k * in]."""
    return _Patches(file, op).cut()


class _Patches:
    def __init__(self, file: TFLiteFile, op: Any) -> None:
        self.file, self.op = file, op
        self.made: list[Any] = []
        self.kernel = file.shape(op.inputs[1])[1:3]
        self.stride = (op.builtinOptions.strideH, op.builtinOptions.strideW)
        self.out = file.shape(file.outputs(op)[0])[1:3]

    def cut(self) -> list[Any]:
        x = self._padded(self.op.inputs[0])
        if self.kernel != (1, 1) or self.stride != (1, 1):
            x = self._columns(x)
            x = self._rows(x)
        self.op.inputs[0] = x
        return self.made

    def _padded(self, x: int) -> int:
        """Pad as SAME asks for, and up to a multiple of the stride."""
        shape = self.file.shape(x)
        pads = [[0, 0]]
        for size, kernel, stride, out in zip(shape[1:3], self.kernel, self.stride, self.out, strict=True):
            needed = max((out - 1) * stride + kernel - size, 0)
            before = needed // 2 if self.op.builtinOptions.padding == _SAME else 0
            after = needed - before if self.op.builtinOptions.padding == _SAME else 0
            pads.append([before, after + (-(size + before + after)) % stride])
        pads.append([0, 0])
        if not np.any(pads):
            return x
        padded = self._like(x, "padded", [d + sum(p) for d, p in zip(shape, pads, strict=True)])
        amounts = self.file.integers(pads)
        self.made.append(self.file.make_operator("PAD", 2, [x, amounts], [padded], self.file.options("PadOptions")))
        return padded

    def _columns(self, x: int) -> int:
        """[n, h, w, c] -> [n, h, out, k * c]."""
        n, height, width, channels = self.file.shape(x)
        stride, kernel, out = self.stride[1], self.kernel[1], self.out[1]
        if stride > 1:
            x = self._reshaped(x, "folded", (n, height, width // stride, stride * channels))
        parts = []
        for first in range(0, kernel, stride):
            taken = min(stride, kernel - first) * channels
            parts.append(self._slice(x, (0, 0, first // stride, 0), (n, height, out, taken)))
        return self._beside(parts)

    def _rows(self, x: int) -> int:
        """[n, h, out, c] -> [n, out, out, k * c]."""
        n, height, width, channels = self.file.shape(x)
        stride, kernel, out = self.stride[0], self.kernel[0], self.out[0]
        if stride > 1:
            x = self._reshaped(x, "folded", (n, height // stride, stride * width, channels))
        starts = [(0, i // stride, i % stride * width, 0) for i in range(kernel)]
        return self._beside([self._slice(x, start, (n, out, width, channels)) for start in starts])

    def _slice(self, x: int, start: Sequence[int], size: Sequence[int]) -> int:
        if tuple(size) == self.file.shape(x):
            return x
        part = self._like(x, "part", size)
        where = [self.file.integers(start), self.file.integers(size)]
        self.made.append(self.file.make_operator("SLICE", 2, [x, *where], [part], self.file.options("SliceOptions")))
        return part

    def _beside(self, parts: list[int]) -> int:
        if len(parts) == 1:
            return parts[0]
        shape = self.file.shape(parts[0])
        joined = self._like(parts[0], "beside", (*shape[:-1], sum(self.file.shape(p)[-1] for p in parts)))
        options = self.file.options("ConcatenationOptions")
        options.axis = len(shape) - 1
        self.made.append(self.file.make_operator("CONCATENATION", 2, parts, [joined], options))
        return joined

    def _reshaped(self, x: int, word: str, shape: Sequence[int]) -> int:
        result = self._like(x, word, shape)
        self.made.append(self.file.reshape(x, result))
        return result

    def _like(self, x: int, word: str, shape: Sequence[int]) -> int:
        """A computed tensor with the type and the scale of `x`."""
        kept = self.file.graph.tensors[x]
        made = self.file.add_tensor(f"{self.file.name(x).split(';')[0]};{word}", self.file.dtype(x), shape)
        self.file.graph.tensors[made].quantization = kept.quantization
        return made


def insert_product(file: TFLiteFile, operators: list[Any], weight: int, name: str) -> list[Any]:
    """`operators`, the last of them (a CONV_2D over patches, or a FULLY_CONNECTED) made a product with `weight`.

    `weight` [out, k]: codes for FULLY_CONNECTED, a computed float tensor for BATCH_MATMUL, whose bias and activation
    become an ADD.
    """
    *head, op = operators
    result = file.outputs(op)[0]
    made = (*file.shape(op.inputs[0])[:-1], file.shape(weight)[0])
    if name == "FULLY_CONNECTED":
        options = file.options("FullyConnectedOptions")
        options.keepNumDims = True
        options.fusedActivationFunction = op.builtinOptions.fusedActivationFunction
        target = result if file.shape(result) == made else _between(file, result, made)
        product = file.make_operator(name, 12, [op.inputs[0], weight, *op.inputs[2:]], [target], options)
        return [*head, product, *([] if target == result else [file.reshape(target, result)])]
    options = file.options("BatchMatMulOptions")
    options.adjY = True
    activation, bias = op.builtinOptions.fusedActivationFunction, op.inputs[2] if len(op.inputs) > 2 else -1
    target = result if file.shape(result) == made else _between(file, result, made)
    tail = [] if target == result else [file.reshape(target, result)]
    if bias < 0 and activation != _NONE:
        bias = file.add_tensor(f"{file.name(result)};zero", "FLOAT32", (1,), np.zeros(1, np.float32))
    if bias >= 0:
        sums = _between(file, target, made)
        add = file.options("AddOptions")
        add.fusedActivationFunction = activation
        tail[:0] = [file.make_operator("ADD", 1, [sums, bias], [target], add)]
        target = sums
    return [*head, file.make_operator(name, 1, [op.inputs[0], weight], [target], options), *tail]


def _between(file: TFLiteFile, result: int, shape: Sequence[int]) -> int:
    made = file.add_tensor(f"{file.name(result)};product", file.dtype(result), shape)
    file.graph.tensors[made].quantization = file.graph.tensors[result].quantization
    assert math.prod(shape) == math.prod(file.shape(result))
    return made
