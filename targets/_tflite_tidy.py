"""Fewer operators for the same numbers: what litert-torch leaves behind that XNNPACK would run, or would not take.

- Pads, adds and means behind transposes happen in front of them, and transposes that undo each other vanish: layout
  changes that quantize/dequantize pairs keep the converter from removing.
- A slice that takes every s-th row or column reads a view with s of them folded into the next axis: a plain SLICE,
  which XNNPACK takes; STRIDED_SLICE with strides splits the graph.
- A FULLY_CONNECTED that flattens its input keeps the leading axes where its readers do not mind: XNNPACK would reshape
  the input first, and quantize it anew for each of query, key and value.
- A BATCH_MATMUL of rank 3 between reshapes from and to rank 4 runs in rank 4, and takes a transposed operand as it is.

Values are moved, never computed anew, but for the order of a float mean's sum.
"""

from typing import Any

import numpy as np

from ._tflite_file import TFLiteFile

_BROADCASTING = ("ADD", "MUL", "SUB")
_UNARY = ("GELU", "RELU", "LOGISTIC", "TANH", "HARD_SWISH")


def tidy(file: TFLiteFile) -> None:
    """Apply each rewriting once, in place; the file's inputs and outputs keep their tensors."""
    for rewrite in _REWRITINGS:
        edit = _Edit(file)
        for op in list(file.graph.operators):
            rewrite(edit, op)
        edit.finish()


class _Edit:
    """Who writes and who reads each tensor, and the operators to put before others once a pass is over."""

    def __init__(self, file: TFLiteFile) -> None:
        self.file = file
        self.writer = {t: op for op in file.graph.operators for t in file.outputs(op)}
        self.readers: dict[int, list[Any]] = {}
        for op in file.graph.operators:
            for tensor in file.inputs(op):
                self.readers.setdefault(tensor, []).append(op)
        self.results = {int(t) for t in file.graph.outputs}
        self.before: dict[int, list[Any]] = {}

    def only_reader(self, tensor: int) -> Any | None:
        """The one operator that reads `tensor`, where the caller does not see the tensor."""
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.results else None

    def insert(self, op: Any, *fresh: Any) -> None:
        """Put `fresh` in front of `op`."""
        self.before.setdefault(id(op), []).extend(fresh)

    def like(self, tensor: int, shape: tuple[int, ...]) -> int:
        """A computed tensor with the type, the scale and the layer of `tensor`."""
        made = self.file.add_tensor(self.file.name(tensor), self.file.dtype(tensor), shape)
        self.file.graph.tensors[made].quantization = self.file.graph.tensors[tensor].quantization
        return made

    def permutation(self, op: Any | None) -> tuple[int, ...] | None:
        """The axes of a TRANSPOSE; None for any other operator."""
        if op is None or self.file.operator(op) != "TRANSPOSE":
            return None
        axes = self.file.constant(op.inputs[1])
        return None if axes is None else tuple(int(a) for a in axes)

    def finish(self) -> None:
        """Write the operators back without those whose results nobody reads any more."""
        kept: list[Any] = []
        for op in self.file.graph.operators:
            kept += [*self.before.get(id(op), []), op]
        needed = {int(t) for t in self.file.graph.outputs}
        used: list[Any] = []
        for op in reversed(kept):
            if needed & set(self.file.outputs(op)):
                needed |= set(self.file.inputs(op))
                used.append(op)
        self.file.graph.operators = used[::-1]


def _plain_slice(edit: _Edit, op: Any) -> None:
    file = edit.file
    if file.operator(op) != "STRIDED_SLICE":
        return
    x, result = op.inputs[0], file.outputs(op)[0]
    shape, made = file.shape(x), file.shape(result)
    begin, strides = file.constant(op.inputs[1]), file.constant(op.inputs[3])
    if begin is None or strides is None or len(shape) != len(made) or len(begin) != len(shape) or np.any(strides < 1):
        return
    options = op.builtinOptions
    if options.ellipsisMask or options.newAxisMask or options.shrinkAxisMask or options.offset:
        return
    first = [0 if options.beginMask >> i & 1 else int(b) % d for i, (b, d) in enumerate(zip(begin, shape, strict=True))]
    axes = [i for i, s in enumerate(strides) if s > 1]
    if len(axes) != 1 or axes[0] + 1 >= len(shape) or shape[axes[0]] % int(strides[axes[0]]):
        return
    axis, stride, beside = axes[0], int(strides[axes[0]]), axes[0] + 1
    if made[beside] != shape[beside] or first[axis] // stride + made[axis] > shape[axis] // stride:
        return
    folded = list(shape)
    folded[axis], folded[beside] = shape[axis] // stride, stride * shape[beside]
    view = edit.like(x, tuple(folded))
    first[beside], first[axis] = first[axis] % stride * shape[beside], first[axis] // stride
    edit.insert(op, file.reshape(x, view))
    _become(file, op, "SLICE", 2 if file.dtype(x) != "INT16" else 4, [view, file.integers(first), file.integers(made)])
    op.builtinOptionsType, op.builtinOptions = _no_options(file, "SliceOptions")


def _sunk_transpose(edit: _Edit, op: Any) -> None:
    """A pad or an add behind transposes happens in front of them; two transposes that undo each other vanish."""
    file, name = edit.file, edit.file.operator(op)
    sources = op.inputs[:1] if name in ("PAD", "TRANSPOSE") else list(op.inputs)
    axes = [edit.permutation(edit.writer.get(t)) for t in sources] or [None]
    front = axes[0]
    if name not in ("PAD", "ADD", "TRANSPOSE") or front is None or any(a != front for a in axes):
        return
    behind, result = [edit.writer[t].inputs[0] for t in sources], file.outputs(op)[0]
    if name == "TRANSPOSE":
        back = edit.permutation(op)
        undone = back is not None and tuple(front[b] for b in back) == tuple(range(len(front)))
        if undone and result not in edit.results:
            for reader in edit.readers.get(result, []):
                reader.inputs = [behind[0] if t == result else t for t in reader.inputs]
        return
    pads = file.constant(op.inputs[1]) if name == "PAD" else None
    if (name == "PAD" and pads is None) or len({file.shape(t) for t in behind}) > 1:
        return
    made = edit.like(result, _moved(file.shape(result), front))
    inputs = behind if pads is None else [*behind, file.integers([pads[front.index(i)] for i in range(len(front))])]
    early = file.make_operator(name, file.version(op), inputs, [made], op.builtinOptions)
    edit.insert(op, early)
    edit.writer[made] = early
    order = edit.writer[sources[0]]
    op.opcodeIndex, op.inputs = order.opcodeIndex, [made, order.inputs[1]]
    op.builtinOptionsType, op.builtinOptions = order.builtinOptionsType, order.builtinOptions


def _moved(shape: tuple[int, ...], front: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a transpose by `front` turns into `shape`."""
    return tuple(shape[front.index(i)] for i in range(len(front)))


def _mean_before_transpose(edit: _Edit, op: Any) -> None:
    file = edit.file
    front = edit.permutation(edit.writer.get(op.inputs[0] if op.inputs else -1))
    if file.operator(op) != "MEAN" or front is None or op.builtinOptions.keepDims:
        return
    axes = file.constant(op.inputs[1])
    if axes is None:
        return
    gone = {int(a) % len(front) for a in axes.reshape(-1)}
    left = [axis for i, axis in enumerate(front) if i not in gone]
    if left == sorted(left):
        op.inputs = [edit.writer[op.inputs[0]].inputs[0], file.integers(sorted(front[i] for i in gone))]


def _product_in_rank_4(edit: _Edit, op: Any) -> None:
    file = edit.file
    if file.operator(op) != "BATCH_MATMUL" or any(len(file.shape(t)) != 3 for t in (*op.inputs, *op.outputs)):
        return
    writers = [edit.writer.get(t) for t in op.inputs]
    if any(w is None or file.operator(w) != "RESHAPE" for w in writers):
        return
    sources = [w.inputs[0] for w in writers if w is not None]
    fitting = [file.shape(s) == (1, *file.shape(t)) for s, t in zip(sources, op.inputs, strict=True)]
    result = file.outputs(op)[0]
    reader = edit.only_reader(result)
    wide = (1, *file.shape(result))
    if not any(fitting) or reader is None or file.shape(file.outputs(reader)[0]) != wide:
        return
    name = file.operator(reader)
    if name != "RESHAPE" and name not in _BROADCASTING:
        return
    for slot, (source, fits) in enumerate(zip(sources, fitting, strict=True)):
        if not fits:
            view = edit.like(source, (1, *file.shape(op.inputs[slot])))
            edit.insert(op, file.reshape(source, view))
            sources[slot] = view
    made = edit.like(result, wide)
    op.inputs, op.outputs = sources, [made]
    if name == "RESHAPE":
        op.outputs = [file.outputs(reader)[0]]
        reader.outputs = [made]  # read by nobody: dropped
    else:
        reader.inputs = [made if t == result else t for t in reader.inputs]


def _kept_axes(edit: _Edit, op: Any) -> None:
    file = edit.file
    if file.operator(op) != "FULLY_CONNECTED" or op.builtinOptions.keepNumDims:
        return
    result, lead = file.outputs(op)[0], file.shape(op.inputs[0])[:-1]
    flat = (
        _flat_tensors(edit, result, lead)
        if len(lead) > 1 and file.shape(op.inputs[1])[-1:] == _last(file, op)
        else None
    )
    if flat is None:
        return
    op.builtinOptions.keepNumDims = True
    for tensor in flat:
        file.graph.tensors[tensor].shape = [*lead, file.shape(tensor)[-1]]


def _last(file: TFLiteFile, op: Any) -> tuple[int, ...]:
    return file.shape(op.inputs[0])[-1:]


def _flat_tensors(edit: _Edit, tensor: int, lead: tuple[int, ...]) -> set[int] | None:
    """`tensor` and what else must get the leading axes with it; None where a reader would compute something else."""
    file, found = edit.file, {tensor}
    if tensor in edit.results or len(file.shape(tensor)) != 2:
        return None
    for reader in edit.readers.get(tensor, []):
        name, made = file.operator(reader), file.outputs(reader)[0]
        if name == "RESHAPE":
            continue
        others = [t for t in file.inputs(reader) if t != tensor]
        if name in _BROADCASTING and file.shape(made) == (*lead, file.shape(tensor)[-1]):
            continue  # the other operand has the leading axes already
        constant = all(file.constant(t) is not None and len(file.shape(t)) < 2 for t in others)
        behind = _flat_tensors(edit, made, lead) if name in (*_BROADCASTING, *_UNARY) and constant else None
        if behind is None:
            return None
        found |= behind
    return found


def _transposed_operand(edit: _Edit, op: Any) -> None:
    file = edit.file
    if file.operator(op) != "BATCH_MATMUL" or op.builtinOptions.adjY or file.dtype(op.inputs[1]) != "FLOAT32":
        return
    writer = edit.writer.get(op.inputs[1])
    axes = edit.permutation(writer)
    if axes is not None and writer is not None and axes == (*range(len(axes) - 2), len(axes) - 1, len(axes) - 2):
        op.inputs = [op.inputs[0], writer.inputs[0]]
        op.builtinOptions.adjY = True


def _become(file: TFLiteFile, op: Any, name: str, version: int, inputs: list[int]) -> None:
    op.opcodeIndex, op.inputs = file.code(name, version), inputs


def _no_options(file: TFLiteFile, name: str) -> tuple[int, Any]:
    made = file.make_operator("SLICE", 2, [], [], file.options(name))
    return made.builtinOptionsType, made.builtinOptions


_REWRITINGS = (
    _plain_slice,
    _sunk_transpose,
    _mean_before_transpose,
    _kept_axes,
    _product_in_rank_4,
    _transposed_operand,
)
