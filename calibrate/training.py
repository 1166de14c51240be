"""Run parts of a quantized graph with gradients: rounding counts as the identity, and chosen tensors are trained.

The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432): what is rounded passes its gradient on where it is
not clipped, and steps learn as in LSQ (arXiv 1902.08153).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from . import qdq
from .coded import CodedLayer, coded, set_constant
from .graph import constant, kind
from .plan import Plan
from .ranges import SMALLEST_FLOAT, SMALLEST_HALF

Given = Mapping[Node, Callable[[], Tensor]]
# Half a code less a little: a latent weight this far from its code still rounds to it.
INSIDE = 0.4999


def straight_round(x: Tensor) -> Tensor:
    """`x` rounded half to even; its gradient is 1."""
    return x + (torch.round(x) - x).detach()


def fake_static(x: Tensor, scale: Tensor | float, zero: int, low: int, high: int) -> Tensor:
    """`x` after a round trip through codes in [low, high]; differentiable in x and in a scale that is a tensor."""
    if isinstance(scale, Tensor):
        return (torch.clamp(straight_round(x / scale) + zero, low, high) - zero) * scale
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high)


class Coins:
    """Random masks at the price of a look-up: drawn once, read from another place each time (drawing anew costs as much
    as a small convolution)."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        self.share, self._generator = share, generator
        self._drawn = torch.rand(2**20, generator=generator) < share if share else torch.empty(0, dtype=torch.bool)

    def mix(self, x: Tensor, other: Tensor) -> Tensor:
        """`x` with that share of its elements, at random, taken from `other`."""
        if not self.share:
            return x
        count = x.numel()
        if 2 * count > len(self._drawn):
            self._drawn = torch.rand(2 * count, generator=self._generator) < self.share
        start = int(torch.randint(len(self._drawn) - count + 1, (), generator=self._generator))
        return torch.where(self._drawn[start : start + count].view(x.shape), other, x)


class OneBit(Protocol):
    """Nodes that turn `source` into two values: `inner`, read by nothing else, and the `quantize` behind them."""

    source: Node
    inner: tuple[Node, ...]
    quantize: Node

    def value(self, x: Tensor) -> Tensor:
        """What the quantized value of `x` stands for; differentiable."""
        ...


class Runner:
    """Computes nodes of a quantized graph so that gradients reach what is trained.

    `given`: node -> what stands in for its value: a bias or gamma constant, a weight's dequantize node, and for a
    dynamic layer, keyed by the layer itself, its float weight. `steps`: quantize node -> its scale, float32 []. With
    `drop` a quantizer lets a share of its elements pass as they are (QDrop, arXiv 2203.05740). `bits`: what becomes one
    bit, and with which gradient; elsewhere a comparison has none.
    """

    def __init__(
        self,
        graph: GraphModule,
        given: Given,
        steps: Given | None = None,
        drop: Coins | None = None,
        bits: Iterable[OneBit] = (),
    ) -> None:
        self.given, self.steps, self.drop = given, steps or {}, drop
        self.bits = {b.quantize: b for b in bits}
        self._skipped = {n for b in self.bits.values() for n in b.inner}
        self._inner = Interpreter(graph, garbage_collect_values=False)
        self._graph = graph
        self.placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        self.nodes = list(graph.graph.nodes)
        self.outputs = list(self.nodes[-1].all_input_nodes)
        self._fixed: dict[Node, Any] = {}  # values of constants
        self._weights: dict[Node, Tensor] = {}  # of dynamic layers

    def run(self, nodes: Iterable[Node], env: dict[Node, Any]) -> dict[Node, Any]:
        """Compute `nodes`, in order, into `env`, which holds the values that come from elsewhere."""
        self._inner.env = env
        for node in nodes:
            if node.op in ("placeholder", "output") or node in env or node in self._skipped:
                continue
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in env:  # a constant that came after `nodes` were listed
                    env[source] = self._value(source)
            env[node] = self._value(node)
        return env

    def _value(self, node: Node) -> Any:
        if node in self.given and node.target not in qdq.DYNAMIC:
            return self.given[node]()
        if node in self._fixed:
            return self._fixed[node]
        if node in self.bits:
            return self.bits[node].value(self._inner.env[self.bits[node].source])
        args, _ = self._inner.fetch_args_kwargs_from_env(node) if node.op == "call_function" else ((), {})
        if node.target is qdq.QUANTIZE:
            return self._quantize(node, args)
        if node.target is qdq.DEQUANTIZE:
            return args[0]
        if node.target in qdq.DYNAMIC:
            return self._dynamic(node, args)
        if node.target is qdq.QUANTIZE_FLOAT8:
            with torch.no_grad():
                rounded = qdq.DEQUANTIZE_FLOAT8(node.target(*args), args[1])
            return args[0] + (rounded - args[0]).detach()
        if node.target is qdq.DEQUANTIZE_FLOAT8 and kind(node.args[0]) != "weight":
            return args[0]
        value = self._inner.run_node(node)
        if node.target in qdq.EXPANDING and not any(a in self.given for a in node.all_input_nodes):
            self._fixed[node] = value
        return value

    def _quantize(self, node: Node, args: tuple[Any, ...]) -> Tensor:
        x, scale, zero, low, high = args[:5]
        rounded = fake_static(x, self.steps[node]() if node in self.steps else scale, zero, low, high)
        return rounded if self.drop is None else self.drop.mix(rounded, x)

    def _dynamic(self, node: Node, args: tuple[Any, ...]) -> Tensor:
        x, bias = args[0], args[3]
        weight = self.given[node]() if node in self.given else self._stored(node)
        is_conv = node.target is qdq.DYNAMIC_CONV2D
        scheme = args[8] if is_conv else args[4]
        with torch.no_grad():
            codes, scale = qdq.dynamic_codes(x, scheme, (1, 2, 3) if is_conv else (-1,))
            rounded = codes * scale
        # The range is the data's own, so nothing is clipped: the gradient is 1 everywhere.
        x = x + (rounded - x).detach()
        if is_conv:
            return torch.nn.functional.conv2d(x, weight, bias, *args[4:8])
        return torch.nn.functional.linear(x, weight, bias)

    def _stored(self, node: Node) -> Tensor:
        if node not in self._weights:
            layer = coded(node)
            assert layer is not None
            self._weights[node] = layer.weight(self._graph)
        return self._weights[node]


def carrier(layer: CodedLayer) -> Node:
    """The node that `Runner.given` knows a layer's weight by: its dequantize node, or the dynamic layer itself."""
    source = layer.node if layer.dynamic else layer.node.args[1]
    assert isinstance(source, Node)
    return source


def latent_steps(graph: GraphModule, layer: CodedLayer, weight: Tensor | None) -> Tensor:
    """The float weight in units of the layer's scales, moved no further than it takes to round to the present codes.

    float32, the weight's shape. Where `weight` is None (no float layer to be had), the codes themselves.
    """
    codes = constant(graph, layer.codes).float()
    if weight is None or weight.shape != codes.shape:
        return codes
    wanted = (weight.double() / layer.step(graph)).float()
    levels = layer.levels(graph)
    if levels is not None:
        return _beside(wanted, codes, levels)
    return torch.minimum(torch.maximum(wanted, codes - INSIDE), codes + INSIDE)


def _beside(wanted: Tensor, codes: Tensor, levels: Tensor) -> Tensor:
    """`wanted` moved no further than it takes to be nearest to `codes` among the row's `levels` [out, n]."""
    shape = (-1, *[1] * (codes.dim() - 1))
    low, high = codes, codes
    for i in range(levels.shape[1] - 1):
        below, above = levels[:, i].view(shape), levels[:, i + 1].view(shape)
        reach = (above - below) * INSIDE
        high = torch.where((codes == below) & (above > below), codes + reach, high)
        low = torch.where((codes == above) & (above > below), codes - reach, low)
    return torch.minimum(torch.maximum(wanted, low), high)


@dataclass
class LearnedScale:
    """Scales of a layer, trained as factors exp(p) so that they stay positive and one learning rate serves all."""

    start: Tensor
    tied: bool
    shape: tuple[int, ...]
    log: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.log = torch.zeros(() if self.tied else self.start.shape, requires_grad=True)

    def value(self) -> Tensor:
        """Scales as they are stored: [out] or [out, groups]."""
        return self.start * torch.exp(self.log)

    def spread(self) -> Tensor:
        """The scales, to be multiplied with a weight of `shape` element by element."""
        scales = self.value()
        if scales.dim() == 2:
            return scales.repeat_interleave(self.shape[1] // scales.shape[1], 1)
        return scales.view(-1, *[1] * (len(self.shape) - 1))


def stored_scales(scales: Tensor, plan: Plan) -> Tensor:
    """Learned scales as the runtime can store them: float32 or float16 numbers, no smaller than what serves."""
    if plan.half_scales:
        return scales.detach().clamp(min=SMALLEST_HALF).half().float()
    return scales.detach().clamp(min=SMALLEST_FLOAT).float()


@dataclass
class Saved:
    """A layer's stored numbers, to put back what training did not improve."""

    layer: CodedLayer
    codes: Tensor
    scales: Tensor
    args: tuple[Any, ...]

    @classmethod
    def of(cls, graph: GraphModule, layer: CodedLayer) -> "Saved":
        """Remember `layer` as it stands."""
        return cls(layer, constant(graph, layer.codes), constant(graph, layer.scales), tuple(layer.node.args))

    def restore(self, graph: GraphModule) -> None:
        """Put codes, scales and bias back."""
        set_constant(graph, self.layer.codes, self.codes)
        set_constant(graph, self.layer.scales, self.scales)
        self.layer.node.args = self.args
