"""Small graphs for the tests of the TFLite target, quantized by hand as the target's docstring asks for."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from calibrate import graph as graphs
from calibrate import qdq
from calibrate.samples import Batch, InputSpec
from device_profiles import load
from targets import Job

COMPUTE = ("conv", "linear", "add", "mul", "mean", "matmul", "relu", "clamp", "sigmoid", "softmax")
SHARED = ("pad", "slice", "select", "max_pool", "avg_pool", "reshape", "transpose", "cat")
FIXED = {"sigmoid": (1 / 256, -128), "softmax": (1 / 256, -128)}


def capture(model: nn.Module, *inputs: Tensor) -> GraphModule:
    """The float graph of `model`: positional tensors to a tuple of tensors."""
    graph = torch.export.export(model.eval(), inputs).module(check_guards=False)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    if not isinstance(output.args[0], tuple | list):
        output.args = ((output.args[0],),)
    graph.graph._codegen = torch.fx.graph.CodeGen()
    return graphs.finish(graph)


def job(graph: GraphModule, *inputs: Tensor, compute: str = "float32") -> Job:
    """A job whose inputs are called first, second, ... and its outputs result0, result1, ..."""
    names = ("first", "second", "third")
    specs = tuple(
        InputSpec(name, tuple(x.shape), str(x.dtype).removeprefix("torch."))
        for name, x in zip(names, inputs, strict=False)
    )
    output = next(n for n in graph.graph.nodes if n.op == "output")
    results = tuple(f"result{i}" for i in range(len(output.args[0])))
    return Job("model", graph, specs, results, load("raspberry-pi-4b").rules("tflite"), compute)  # type: ignore[arg-type]


def batch(*inputs: Tensor) -> Batch:
    """The inputs by the names that `job` gives them."""
    return {name: x.numpy() for name, x in zip(("first", "second", "third"), inputs, strict=False)}


def limits(bits: int) -> tuple[int, int]:
    """The least and the largest code of `bits` bits."""
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def weight_codes(weight: Tensor, bits: int = 8, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric codes (int8) and scales (float32) of a weight: one per index of axis 0, or per group of a row."""
    low, high = limits(bits)
    rows = weight.reshape(-1, group) if group else weight.flatten(1)
    scales = rows.abs().amax(1) / high
    codes = torch.round(rows / scales[:, None]).clamp(low, high).to(torch.int8)
    return codes.reshape(weight.shape), scales.reshape(len(weight), -1) if group else scales


def quantize(
    graph: GraphModule, *inputs: Tensor, keep_float: tuple[str, ...] = (), bits: int = 8, wide: bool = False
) -> GraphModule:
    """Static int8 with min-max ranges of one batch; nodes named in `keep_float` compute in float.

    Weights have `bits` bits; activations 16 where `wide`.
    """
    ranges = _Ranges(graph)
    with torch.no_grad():
        ranges.run(*inputs)
    wanted = [n for n in graph.graph.nodes if graphs.kind(n) in COMPUTE + SHARED and n.name not in keep_float]
    parameters = _parameters(graph, ranges.found, wide)
    for node in list(graph.graph.nodes):
        if node.name not in ranges.found or (node in wanted and _is_fused(node)):
            continue
        if node in wanted or any(user in wanted for user in node.users):
            _insert(graph, node, *parameters[node.name])
    for node in wanted:
        if graphs.is_weighted(node):
            _quantize_weight(graph, node, bits, wide)
    return graphs.finish(graph)


class _Ranges(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, tuple[float, float]] = {}

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and n.op != "get_attr":
            self.found[n.name] = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
        return value


def _parameters(
    graph: GraphModule, ranges: dict[str, tuple[float, float]], wide: bool
) -> dict[str, tuple[float, int, int, int, torch.dtype]]:
    found = {}
    for name, (low, high) in ranges.items():
        if wide:
            found[name] = float(np.float32(max(high, -low, 1e-8) / 32767)), 0, -32768, 32767, torch.int16
            continue
        scale = float(np.float32(max((high - low) / 255, 1e-8)))
        found[name] = scale, round(-128 - low / scale), -128, 127, torch.int8
    for node in graph.graph.nodes:
        if graphs.kind(node) in FIXED:
            found[node.name] = (*FIXED[graphs.kind(node)], -128, 127, torch.int8)
        elif graphs.kind(node) == "cat":
            found.update({part.name: found[node.name] for part in node.args[0]})
        elif graphs.kind(node) in SHARED:
            found[node.name] = found[node.args[0].name]
    return found


def _is_fused(node: Node) -> bool:
    users = list(node.users)
    return len(users) == 1 and graphs.kind(node) in COMPUTE[:3] and graphs.kind(users[0]) in ("relu", "clamp")


def _insert(graph: GraphModule, node: Node, *arguments: object) -> None:
    with graph.graph.inserting_after(node):
        codes = graph.graph.call_function(qdq.QUANTIZE, (node, *arguments))
    with graph.graph.inserting_after(codes):
        values = graph.graph.call_function(qdq.DEQUANTIZE, (codes, *arguments))
    node.replace_all_uses_with(values, delete_user_cb=lambda user: user is not codes)


def _quantize_weight(graph: GraphModule, node: Node, bits: int, wide: bool) -> None:
    weight, bias = graphs.weight_nodes(node)
    assert weight is not None
    scales = store_codes(graph, node, 1, bits)
    if bias is not None and not wide:
        step = scales.double() * node.args[0].args[1]
        whole = (torch.round(graphs.constant(graph, bias).double() / step) * step).float()
        node.args = (*node.args[:2], graphs.add_constant(graph, f"{node.name}_bias", whole, node), *node.args[3:])


def store_codes(graph: GraphModule, node: Node, position: int, bits: int = 8, group: int | None = None) -> Tensor:
    """Replace the weight that is `node`'s argument `position` by codes and a dequantize; returns the scales."""
    codes, scales = weight_codes(graphs.constant(graph, node.args[position]), bits, group)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    constants = [
        graphs.add_constant(graph, f"{node.name}_{part}", value, node)
        for part, value in (("codes", codes), ("scales", scales), ("zeros", zeros))
    ]
    with graph.graph.inserting_before(node):
        if group:
            arguments = (*constants[:2], None, *limits(bits), torch.int8, group, torch.float32)
            wide = graph.graph.call_function(qdq.DEQUANTIZE_GROUP, arguments)
        else:
            wide = graph.graph.call_function(qdq.DEQUANTIZE_CHANNEL, (*constants, 0, *limits(bits), torch.int8))
    node.args = (*node.args[:position], wide, *node.args[position + 1 :])
    return scales


def store_halves(graph: GraphModule, node: Node, position: int) -> None:
    """Replace the weight that is `node`'s argument `position` by a float16 constant and a cast."""
    weight = graphs.constant(graph, node.args[position])
    half = graphs.add_constant(graph, f"{node.name}_half", weight.half(), node)
    with graph.graph.inserting_before(node):
        wide = graph.graph.call_function(torch.ops.aten.to.dtype, (half, torch.float32))
    node.args = (*node.args[:position], wide, *node.args[position + 1 :])


def make_dynamic(graph: GraphModule, scheme: str = "row_int8", bits: int = 8, group: int | None = None) -> GraphModule:
    """Every conv and linear as dynamic int8 with weights of `bits` bits, the linear ones in groups."""
    for node in [n for n in graph.graph.nodes if graphs.is_weighted(n)]:
        is_conv = graphs.kind(node) == "conv"
        codes, scales = weight_codes(graphs.constant(graph, node.args[1]), bits, None if is_conv else group)
        stored = [
            graphs.add_constant(graph, f"{node.name}_codes", codes, node),
            graphs.add_constant(graph, f"{node.name}_scales", scales, node),
        ]
        x, _, bias, *rest = [*node.args, *[None] * (3 - len(node.args))]
        if is_conv:
            rest = [*rest, *[[1, 1], [0, 0], [1, 1], 1][len(rest) :]]
            node.target = qdq.DYNAMIC_CONV2D
        else:
            node.target = qdq.DYNAMIC_LINEAR
        node.args = (x, *stored, bias, *rest, scheme, bits)
    return graphs.finish(graph)
