"""Small quantized graphs for the tests of the ONNX target, made by hand: min-max ranges, Q/DQ where a case wants it."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from calibrate import qdq
from calibrate.graph import add_constant, constant, finish, is_weighted, kind, weight_nodes
from calibrate.samples import InputSpec
from targets import Job


@dataclass(frozen=True)
class Recipe:
    """Which tensors carry codes: inputs and outputs of `compute`, outputs of `moves` with their input's parameters."""

    activation: torch.dtype = torch.int8
    symmetric: bool = False
    compute: tuple[str, ...] = ("conv", "linear", "add", "mean", "avg_pool", "cat", "mul")
    moves: tuple[str, ...] = ("slice", "pad", "max_pool", "reshape", "transpose")
    outputs: bool = True
    int32_bias: bool = True


def capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> GraphModule:
    """The float graph at the inputs' shapes, batch norm folded into the convolution before it."""
    graph = torch.export.export(model.eval(), inputs).module()
    for node in list(graph.graph.nodes):
        if node.op == "call_module":
            graph.graph.erase_node(node)
    for norm in [n for n in graph.graph.nodes if kind(n) == "batch_norm"]:
        _fold(graph, norm)
    return finish(graph)


def _fold(graph: GraphModule, norm: Node) -> None:
    conv = norm.args[0]
    if kind(conv) != "conv":
        return
    gamma, beta, mean, var = (constant(graph, a) for a in norm.args[1:5])
    factor = gamma / torch.sqrt(var + norm.args[7])
    weight, bias = weight_nodes(conv)
    old = constant(graph, bias) if bias is not None else torch.zeros_like(mean)
    folded = constant(graph, weight) * factor.view(-1, 1, 1, 1)
    new = [
        add_constant(graph, f"{conv.name}_w", folded, conv),
        add_constant(graph, f"{conv.name}_b", (old - mean) * factor + beta, conv),
    ]
    conv.args = (conv.args[0], *new, *conv.args[3:])
    norm.replace_all_uses_with(conv)
    graph.graph.erase_node(norm)


class _Ranges(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[str, tuple[float, float]] = {}

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and n.op != "get_attr":
            self.seen[n.name] = (min(float(value.min()), 0.0), max(float(value.max()), 0.0))
        return value


def quantize(graph: GraphModule, inputs: tuple[Tensor, ...], recipe: Recipe) -> GraphModule:
    """Insert Q/DQ by the recipe, ranges from this one batch."""
    ranges = _Ranges(graph)
    with torch.no_grad():
        ranges.run(*inputs)
    return _Quantizer(graph, ranges.seen, recipe).run()


class _Quantizer:
    def __init__(self, graph: GraphModule, ranges: dict[str, tuple[float, float]], recipe: Recipe) -> None:
        self.graph, self.ranges, self.recipe = graph, ranges, recipe
        self.done: dict[Node, Node] = {}
        self.parameters: dict[Node, tuple[float, int]] = {}

    def run(self) -> GraphModule:
        for node in list(self.graph.graph.nodes):
            what = kind(node)
            if what in self.recipe.moves and isinstance(node.args[0], Node) and node.args[0] in self.done.values():
                self._codes(node, self.parameters[node.args[0]])
            if what not in self.recipe.compute or (what in ("conv", "linear") and not is_weighted(node)):
                continue
            if any(isinstance(a, Node) and a.op == "get_attr" for a in node.args[:2]) and not is_weighted(node):
                continue
            operands = [node.args[0]] if is_weighted(node) else list(node.all_input_nodes)
            made = {a: self._codes(a) for a in operands if a not in self.done.values()}
            node.args = torch.fx.map_arg(node.args, lambda a, made=made: made.get(a, a))
            if is_weighted(node):
                self._weight(node)
            if self.recipe.outputs and next(iter(node.users)).op != "output":
                tail = _tail(node)
                self._codes(tail)
        return finish(self.graph)

    def _codes(self, node: Node, parameters: tuple[float, int] | None = None) -> Node:
        """The dequantized twin of `node`; every reader of `node` reads it from now on."""
        if node in self.done:
            return self.done[node]
        low, high = {torch.int8: (-128, 127), torch.uint8: (0, 255)}[self.recipe.activation]
        scale, zero = parameters or self._range(node, low, high)
        with self.graph.graph.inserting_after(node):
            codes = self.graph.graph.call_function(qdq.QUANTIZE, (node, scale, zero, low, high, self.recipe.activation))
        with self.graph.graph.inserting_after(codes):
            twin = self.graph.graph.call_function(
                qdq.DEQUANTIZE, (codes, scale, zero, low, high, self.recipe.activation)
            )
        node.replace_all_uses_with(twin, delete_user_cb=lambda user: user is not codes)
        self.done[node] = twin
        self.parameters[twin] = (scale, zero)
        return twin

    def _range(self, node: Node, low: int, high: int) -> tuple[float, int]:
        bottom, top = self.ranges[node.name]
        if self.recipe.symmetric:
            return float(torch.tensor(max(-bottom, top, 1e-6) / 127)), (low + high + 1) // 2
        scale = float(torch.tensor(max(top - bottom, 1e-6) / 255))
        return scale, int(max(low, min(high, round(low - bottom / scale))))

    def _weight(self, node: Node) -> None:
        weight_node, bias_node = weight_nodes(node)
        weight = constant(self.graph, weight_node)
        # Products with uint8 are summed in 16 bits on x86 without VNNI: 7 bits can't saturate there.
        top = 63 if self.recipe.activation is torch.uint8 else 127
        scales = (weight.flatten(1).abs().amax(1) / top).clamp(min=1e-8)
        codes = torch.round(weight / scales.view(-1, *[1] * (weight.ndim - 1))).clamp(-top, top).to(torch.int8)
        names = {"codes": codes, "scales": scales, "zeros": torch.zeros(len(scales), dtype=torch.int64)}
        made = [add_constant(self.graph, f"{node.name}_{k}", v, node) for k, v in names.items()]
        with self.graph.graph.inserting_before(node):
            weights = self.graph.graph.call_function(qdq.DEQUANTIZE_CHANNEL, (*made, 0, -top, top, torch.int8))
        bias = bias_node
        if bias_node is not None and self.recipe.int32_bias and node.args[0] in self.parameters:
            step = torch.tensor(self.parameters[node.args[0]][0]) * scales
            rounded = torch.round(constant(self.graph, bias_node) / step) * step
            bias = add_constant(self.graph, f"{node.name}_rounded", rounded, node)
        node.args = (node.args[0], weights, bias, *node.args[3:])


def _tail(node: Node) -> Node:
    user = next(iter(node.users))
    fused = len(node.users) == 1 and kind(user) in ("relu", "clamp")
    return user if fused else node


def job(graph: GraphModule, inputs: dict[str, Tensor], outputs: tuple[str, ...] = ("y",), **rules: object) -> Job:
    """A job for this graph at these inputs' shapes; opset 18 on ONNX Runtime unless told otherwise."""
    compute = rules.pop("compute", "float32")
    specs = tuple(
        InputSpec(k, tuple(v.shape), str(v.dtype).removeprefix("torch."), dynamic_batch=False)
        for k, v in inputs.items()
    )
    facts = SimpleNamespace(**{"runtime": "onnxruntime", "opset": 18, **rules})
    return Job("tiny", graph, specs, outputs, facts, compute)
