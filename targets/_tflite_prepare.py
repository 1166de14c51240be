"""The job's graph in the form litert-torch takes, and what has to be done to the file afterwards.

litert-torch lowers float graphs, and Q/DQ graphs whose weights are written float -> quantize_per_channel ->
dequantize_per_channel. Everything else of the vocabulary (`calibrate/qdq.py`) is lowered as float with the weights it
stands for, and a `PackedWeight` says how that weight is to be stored: the file is edited once it is written.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

from calibrate import graph as graphs
from calibrate import qdq
from calibrate.weights import spread

from ._sorts import as_topk
from ._tflite_fence import PACKED, insert_fences
from .errors import TargetError

Form = Literal["dynamic", "int8", "float16"]
# XNNPACK's kernels for activations quantized at run time take groups of so many weights, and multiples of it.
FAST_GROUP = 32
_TO_FLOAT = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)
_RANDOM = ("rand", "randn", "randint", "dropout", "bernoulli", "multinomial", "normal")


@dataclass(frozen=True)
class PackedWeight:
    """A weight that the file holds smaller than the float32 `values` which the converter was given.

    `form`: "dynamic", int8 codes that an op multiplies with activations quantized at run time; "int8", int8 codes
    dequantized before a float op; "float16". `codes` int8 and `scales` float32 [channels], or [channels, groups], are
    None for float16; the channels are axis 0 of `values`. `bits`: what a code needs.
    """

    layer: str
    form: Form
    values: NDArray[np.float32]
    codes: NDArray[np.int8] | None = None
    scales: NDArray[np.float32] | None = None
    bits: int = 8


@dataclass(frozen=True)
class Prepared:
    """`graph` for litert-torch; `static` when it holds activation Q/DQ; `packed` to be done on the file.

    `codes`: a key (`codes_key`) of every int8 constant that static layers may have. `fences`: how
    many operators `_tflite_fence` put in. `small`: key -> bits, for codes of static layers that need fewer than 8.
    `wide`: the activations are 16 bits; then `biases` has the float bias of each static layer by its codes' key.
    """

    graph: GraphModule
    static: bool
    packed: tuple[PackedWeight, ...]
    codes: frozenset[str]
    fences: int
    small: dict[str, int]
    wide: bool
    biases: dict[str, NDArray[np.float32]]


def codes_key(codes: NDArray[Any]) -> str:
    """The same for one weight in every layout: a hash of its codes in sorted order."""
    return hashlib.sha256(np.sort(codes, axis=None).tobytes()).hexdigest()


def prepare(graph: GraphModule, samples: tuple[Tensor, ...]) -> Prepared:
    """Rewrite a copy of `graph`, whose inputs are like `samples`; the numbers stay what they were.

    Raises TargetError for what has no form in TFLite.
    """
    work = graphs.clone(graph)
    _refuse_foreign_forms(work)
    small, biases = _small_static(work), _static_biases(work)
    wide = _narrow(work)
    packed = [*_unpack_halves(work), *_lower_dynamic(work)]
    _fold_constants(work)
    _rewrite_average_pools(work, samples)
    as_topk(work, ascends=False)
    _shift_unsigned(work)
    packed += _rewrite_weights(work)
    static = any(n.target == qdq.QUANTIZE for n in work.graph.nodes)
    fences = insert_fences(work, static)
    graphs.finish(work)
    _label(work)
    for module in work.modules():  # an exported graph refuses .eval(); litert-torch warns when `training` is set
        module.training = False
    codes = frozenset(_constant_codes(work))
    return Prepared(work, static, tuple(packed), codes, fences, small, wide, biases if wide else {})


def _refuse_foreign_forms(graph: GraphModule) -> None:
    """Raise TargetError for the vocabulary that no TFLite runtime computes with."""
    for node in graph.graph.nodes:
        what = {
            qdq.LOOKUP: "is a palette",
            qdq.QUANTIZE_FLOAT8: "quantizes to 8-bit floats",
            qdq.DEQUANTIZE_FLOAT8: "has 8-bit floats",
        }.get(node.target)
        if what is not None:
            raise TargetError(
                f"the layer '{_layer_of(node)}' {what}, which no TFLite kernel reads; use integer weights of 8, 4 or 2 "
                "bits for this target."
            )


def _static_layers(graph: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Every layer on static codes with constant weight codes, and the node that dequantizes them."""
    for node in graph.graph.nodes:
        weight = node.args[1] if graphs.kind(node) in graphs.WEIGHTED and len(node.args) > 1 else None
        if not isinstance(weight, Node) or not is_static(node):
            continue
        if weight.target not in (qdq.DEQUANTIZE_CHANNEL, qdq.DEQUANTIZE_GROUP) or not graphs.is_constant(
            weight.args[0]
        ):
            continue
        if weight.target == qdq.DEQUANTIZE_GROUP:
            raise TargetError(
                f"the layer '{graphs.layer_name(node)}' has static activations and weights with a scale per group, for "
                "which TFLite has no kernel; give each output channel one scale, or quantize dynamically."
            )
        yield node, weight


def _small_static(graph: GraphModule) -> dict[str, int]:
    found = {}
    for _, weight in _static_layers(graph):
        bits = qdq.code_bits(weight)
        if bits is not None and bits < 8:
            assert isinstance(weight.args[0], Node)
            found[codes_key(graphs.constant(graph, weight.args[0]).numpy())] = bits
    return found


def _static_biases(graph: GraphModule) -> dict[str, NDArray[np.float32]]:
    found = {}
    for node, weight in _static_layers(graph):
        bias = node.args[2] if len(node.args) > 2 else None
        assert isinstance(weight.args[0], Node)
        if isinstance(bias, Node) and graphs.is_constant(bias):
            key = codes_key(graphs.constant(graph, weight.args[0]).numpy())
            found[key] = graphs.constant(graph, bias).numpy()
    return found


def _narrow(graph: GraphModule) -> bool:
    """Write 16-bit activations as int8 of the same scale, which litert-torch takes: the file's tensors are widened.

    Returns whether there are any. Raises TargetError where a graph mixes them with int8, or quantizes a constant.
    """
    pairs = [n for n in graph.graph.nodes if n.target in (qdq.QUANTIZE, qdq.DEQUANTIZE)]
    wide = [n for n in pairs if n.args[5] == torch.int16]
    if not wide:
        return False
    for node in pairs:
        layer = graphs.layer_name(node)
        if node not in wide:
            raise TargetError(f"'{layer}' has int8 activations where others have 16 bits; TFLite needs one of them.")
        if graphs.is_constant(node.args[0]):
            raise TargetError(f"'{layer}' is a constant of 16-bit codes, which is not offered for TFLite; use int8.")
        node.args = (*node.args[:2], 0, -128, 127, torch.int8)
    return True


def _constant_codes(graph: GraphModule) -> Iterator[str]:
    """The keys of all constants that the graph itself quantizes, weights and others."""
    for node in graph.graph.nodes:
        if node.target in (qdq.QUANTIZE, qdq.QUANTIZE_CHANNEL) and graphs.is_constant(node.args[0]):
            scales = [graphs.constant(graph, a) if graphs.is_constant(a) else a for a in node.args[1:3]]
            yield codes_key(node.target(graphs.constant(graph, node.args[0]), *scales, *node.args[3:]).numpy())


def is_static(node: Node) -> bool:
    """True when the conv, linear or matmul `node` works on dequantized activations."""
    operands = node.args[:1] if graphs.kind(node) in graphs.WEIGHTED else node.args[:2]
    return all(isinstance(a, Node) and a.target in (qdq.DEQUANTIZE, qdq.DEQUANTIZE_CHANNEL) for a in operands)


def _unpack_halves(graph: GraphModule) -> Iterable[PackedWeight]:
    for node in list(graph.graph.nodes):
        if node.target not in _TO_FLOAT or not graphs.is_constant(node.args[0]):
            continue
        half = graphs.constant(graph, node.args[0])
        if half.dtype != torch.float16:
            continue
        wide = graphs.add_constant(graph, f"{node.args[0].target}_float", half.float(), node)
        layer = _layer_of(node)
        _mark_readers(node)
        node.replace_all_uses_with(wide)
        graph.graph.erase_node(node)
        yield PackedWeight(layer, "float16", half.float().numpy())


def _lower_dynamic(graph: GraphModule) -> Iterable[PackedWeight]:
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target not in (qdq.DYNAMIC_LINEAR, qdq.DYNAMIC_CONV2D):
            continue
        x, codes_node, scales_node, bias, *rest = node.args
        place = next(i for i, a in enumerate(rest) if isinstance(a, str))
        scheme, bits = rest[place], rest[place + 1] if len(rest) > place + 1 else 8
        if scheme != "row_int8":
            raise TargetError(
                f"the layer '{graphs.layer_name(node)}' quantizes its input by the scheme '{scheme}', which no "
                "TFLite kernel has; plan dynamic int8 for this target with the scheme 'row_int8'."
            )
        codes, scales = graphs.constant(graph, codes_node), graphs.constant(graph, scales_node)
        weight = graphs.add_constant(graph, f"{node.name}_weight", _floats(codes, scales), node)
        node.meta[PACKED] = True
        is_linear = node.target == qdq.DYNAMIC_LINEAR
        node.target = aten.linear.default if is_linear else aten.conv2d.default
        node.args = (x, weight, bias) if is_linear else (x, weight, bias, *rest[:place])
        yield _packed(graphs.layer_name(node), "dynamic", codes, scales, bits)


def _rewrite_weights(graph: GraphModule) -> Iterable[PackedWeight]:
    """Codes of a static layer become float -> quantize -> dequantize; those of other layers plain float."""
    for node in list(graph.graph.nodes):
        if node.target not in (qdq.DEQUANTIZE_CHANNEL, qdq.DEQUANTIZE_GROUP) or not graphs.is_constant(node.args[0]):
            continue
        codes_node, scales_node = node.args[:2]
        grouped = node.target == qdq.DEQUANTIZE_GROUP
        axis, first = (0, 3) if grouped else (node.args[3], 4)
        low, high = node.args[first : first + 2]
        codes, scales = graphs.constant(graph, codes_node), graphs.constant(graph, scales_node)
        if axis != 0 or codes.dtype != torch.int8:
            raise TargetError(
                f"the weight of '{_layer_of(node)}' is {codes.dtype} with scales along axis {axis}; a TFLite weight is "
                "int8 with one scale per output channel (axis 0)."
            )
        weight = graphs.add_constant(graph, f"{codes_node.target}_float", _floats(codes, scales), node)
        if all(is_static(user) for user in node.users):
            arguments = (*node.args[1:4], -127, 127, torch.int8)  # codes of fewer bits are packed in the file
            with graph.graph.inserting_before(node):
                again = graph.graph.call_function(qdq.QUANTIZE_CHANNEL, (weight, *arguments))
            node.args = (again, *arguments)
        else:
            layer = _layer_of(node)
            _mark_readers(node)
            node.replace_all_uses_with(weight)
            graph.graph.erase_node(node)
            yield _packed(layer, "int8", codes, scales, qdq.bits_of(low, high))


def _floats(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * spread(scales, codes.shape)


def _packed(layer: str, form: Form, codes: Tensor, scales: Tensor, bits: int) -> PackedWeight:
    if scales.dim() == 2 and bits > 4:
        raise TargetError(
            f"the weight of '{layer}' has {bits}-bit codes with a scale per group; TFLite reads groups of 4-bit codes "
            "only: use 4 bits, or one scale per output channel."
        )
    group = codes.shape[1] // scales.shape[1] if scales.dim() == 2 else None
    if form == "dynamic" and group is not None and group % FAST_GROUP:
        raise TargetError(
            f"the weight of '{layer}' has groups of {group}, for which LiteRT has a slow kernel alone, which "
            f"leaves out the activation behind a layer; use groups of {FAST_GROUP} or a multiple of it, one scale per "
            "output channel, or weights without quantized activations."
        )
    return PackedWeight(layer, form, _floats(codes, scales).numpy(), codes.numpy(), scales.numpy(), bits)


def _mark_readers(weight: Node) -> None:
    for user in weight.users:
        if graphs.kind(user) in graphs.WEIGHTED:
            user.meta[PACKED] = True


def _layer_of(node: Node) -> str:
    """The layer that reads the weight `node`."""
    return graphs.layer_name(next(iter(node.users), node))


def _shift_unsigned(graph: GraphModule) -> None:
    """uint8 codes c with zero point z are int8 codes c - 128 with zero point z - 128: TFLite's kernels are signed."""
    for node in graph.graph.nodes:
        if node.target in (qdq.QUANTIZE, qdq.DEQUANTIZE) and node.args[5] == torch.uint8:
            x, scale, zero, low, high, _ = node.args
            node.args = (x, scale, zero - 128, low - 128, high - 128, torch.int8)


def _fold_constants(graph: GraphModule) -> None:
    """Compute what depends on no input: masks, positions, `new_ones`; converters refuse some of these operators."""
    for node in list(graph.graph.nodes):
        if not _is_foldable(node):
            continue
        args = torch.fx.map_arg(node.args, lambda n: graphs.constant(graph, n))
        kwargs = torch.fx.map_arg(node.kwargs, lambda n: graphs.constant(graph, n))
        value = node.target(*args, **kwargs)
        if not isinstance(value, Tensor):
            continue
        node.replace_all_uses_with(graphs.add_constant(graph, f"{node.name}_folded", value, node))
        graph.graph.erase_node(node)


def _is_foldable(node: Node) -> bool:
    name = graphs.operator_name(node)
    if not name or graphs.kind(node) == "qdq" or name.startswith(_RANDOM) or name.endswith("_"):
        return False
    return all(graphs.is_constant(n) for n in node.all_input_nodes)


def _rewrite_average_pools(graph: GraphModule, samples: tuple[Tensor, ...]) -> None:
    """Write avg_pool2d that leaves its padding out of the mean as: pad with zeros, pool, correct by the true counts.

    TFLite's AVERAGE_POOL_2D does leave padding out, but knows only SAME and VALID; litert-torch lowers other paddings
    to a reduce-window that LiteRT refuses to run.
    """
    aten = torch.ops.aten
    wanted = [n for n in graph.graph.nodes if n.target == aten.avg_pool2d.default and _leaves_padding_out(n)]
    if wanted:
        ShapeProp(graph).propagate(*samples)
    for node in wanted:
        x, kernel, stride, padding, *_ = _pool_arguments(node)
        shape = x.meta["tensor_meta"].shape[-2:]
        counts = torch.nn.functional.avg_pool2d(torch.ones(1, 1, *shape), kernel, stride, padding)
        correction = graphs.add_constant(graph, f"{node.name}_correction", 1.0 / counts, node)
        vertical, horizontal = padding
        with graph.graph.inserting_before(node):
            padded = graph.graph.call_function(
                aten.constant_pad_nd.default, (x, [horizontal, horizontal, vertical, vertical])
            )
            pooled = graph.graph.call_function(aten.avg_pool2d.default, (padded, kernel, stride))
            mean = graph.graph.call_function(aten.mul.Tensor, (pooled, correction))
        for new in (padded, pooled, mean):
            new.meta.update(node.meta, layer=graphs.layer_name(node))
        node.replace_all_uses_with(mean)
        graph.graph.erase_node(node)


def _leaves_padding_out(pool: Node) -> bool:
    _, _, _, padding, ceil, include, divisor = _pool_arguments(pool)
    return any(padding) and not include and not ceil and divisor is None


def _pool_arguments(node: Node) -> tuple[Any, list[int], list[int], list[int], bool, bool, int | None]:
    """avg_pool2d's arguments with the schema's defaults: input, kernel, stride, padding, ceil, include, divisor."""
    defaults: list[Any] = [None, None, [], [0, 0], False, True, None]
    values = [*node.args, *defaults[len(node.args) :]]
    pairs = [list(v) * 2 if len(v) == 1 else list(v) for v in (values[1], values[2] or values[1], values[3])]
    return values[0], pairs[0], pairs[1], pairs[2], values[4], values[5], values[6]


def _label(graph: GraphModule) -> None:
    """Let the tensors of the file bear the layers' names, and nothing of the machine that captured the graph."""
    for node in graph.graph.nodes:
        node.meta.pop("stack_trace", None)
        node.meta.pop("from_node", None)
        if node.op == "call_function":
            name = graphs.layer_name(_source(node)).replace(";", "_").replace("/", ".")
            node.meta["nn_module_stack"] = {"layer": ("", name)}


def _source(node: Node) -> Node:
    """The node whose values a chain of Q/DQ carries."""
    while graphs.kind(node) == "qdq" and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
