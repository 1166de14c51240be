"""Runs a quantized graph with the arithmetic of integer kernels, so that artifacts can be held to it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from . import kernels16, qdq
from .graph import MOVEMENT, chooses_tokens, constant, kind, operator_name

# Below this, every partial sum of a dot product of codes is an integer that float32 holds exactly.
EXACT = 2.0**24
HALF_MAX = 65504.0
# A float32 bias that is a whole number of steps carries the rounding of two products and a division.
WHOLE = 4 * torch.finfo(torch.float32).eps
# How a kernel adds two int8 tensors of different scales: in float32 as ONNX Runtime, in fixed point as XNNPACK.
Adder = Literal["float", "fixed_point"]
# What turns numbers into codes.
ROUNDS = (qdq.QUANTIZE, *qdq.DYNAMIC, qdq.QUANTIZE_FLOAT8)


@dataclass(frozen=True)
class _Kernel:
    """The constants of one integer conv or linear: codes as float numbers, the step of its accumulator per channel."""

    codes: Tensor
    input_scale: float
    unit: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class _Output:
    """Where an integer kernel writes its codes: the quantize node's parameters and the bounds of a fused activation."""

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype

    def codes(self, steps: Tensor) -> Tensor:
        return torch.clamp(torch.round(steps) + self.zero_point, self.low, self.high).to(self.dtype)

    def clamped(self, codes: Tensor) -> Tensor:
        return torch.clamp(codes, self.low, self.high).to(self.dtype)


class Simulation(Interpreter):
    """The torch simulation every artifact must match.

    A conv or linear on codes with constant weight codes is computed as kernels do: an exact integer accumulator, the
    bias in it, and where its output is quantized (a relu or clamp between) one multiplication by the float32 number
    input_scale * weight_scale / output_scale, rounded half to even. In float32 where the largest possible sum stays
    below 2^24, else in float64. A mean of codes is an exact sum and one such multiplication; an add of codes follows
    `adder` (XNNPACK src/qs8-vadd: multipliers of 21 bits; ONNX Runtime's QLinearAdd: two fused multiply-adds in
    float32, checked against it code by code). A matmul of two dequantized tensors runs in float64. With "fixed_point",
    16-bit activations follow `kernels16`, and scales of groups are rounded as LiteRT keeps them (`group_scales`).

    Everything else runs as the graph is written. With `compute` "float16" the whole graph does, and every float32 value
    is rounded to float16 (saturated at ±65504) after the node that makes it: runtimes that compute in halves dequantize
    to halves, and store halves that they summed in single precision.

    `jitter` moves every value that is about to be quantized, or that tokens are chosen by, by up to this share of
    itself, at random with a fixed seed: what comes out then shows how far rounding in another order can carry the
    output.
    """

    def __init__(
        self, graph: GraphModule, compute: str = "float32", adder: Adder = "float", jitter: float = 0.0
    ) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._half = compute == "float16"
        self._adder = adder
        self._jitter = jitter
        self._random = torch.Generator().manual_seed(0)
        self._kernels: dict[Node, _Kernel] = {}
        self._dynamic: dict[Node, Tensor] = {}
        self._wide: set[Node] = set()
        self._outputs: dict[Node, _Output] = {}  # compute node -> how its codes are written
        self._written: dict[Node, Node] = {}  # quantize node -> the compute node whose codes it stands for
        self._codes: dict[Node, Tensor] = {}
        self._weights: dict[Node, Tensor] = {}  # dequantized constants, computed once
        for node in graph.graph.nodes:
            if node.target is qdq.DYNAMIC_LINEAR or not (self._half or jitter):
                self._recognise(graph, node)

    def _recognise(self, graph: GraphModule, node: Node) -> None:
        if node.target is qdq.DYNAMIC_LINEAR:
            codes = constant(graph, node.args[1])
            largest = float(codes.float().abs().sum(1).max()) * 255
            self._dynamic[node] = codes.float() if largest < EXACT else codes.double()
        kernel = _kernel(graph, node)
        if kernel is not None:
            self._kernels[node] = kernel
        elif kind(node) in ("conv", "linear", "matmul") and _on_codes(node):
            self._wide.add(node)
        if node.target is not qdq.QUANTIZE:
            return
        found = _writer(node)
        if found is None:
            return
        source, output = found
        if source in self._kernels or _is_mean(source) or _is_add(source):
            self._outputs[source], self._written[node] = output, source

    @property
    def rounds_freely(self) -> bool:
        """Whether some codes are made from float arithmetic, whose last bit depends on the order of additions: from
        something other than an integer kernel, moved codes or the input itself."""
        if self._half:
            return True
        for node in self.module.graph.nodes:
            if node.target in (qdq.DYNAMIC_LINEAR, qdq.DYNAMIC_CONV2D, qdq.QUANTIZE_FLOAT8):
                return True
            if node.target is not qdq.QUANTIZE or node in self._written:
                continue
            source = node.args[0]
            while kind(source) in (*MOVEMENT, "max_pool", "getitem", "relu", "clamp"):
                source = source.all_input_nodes[0]
            if source.op != "placeholder" and source.target is not qdq.DEQUANTIZE:
                return True
        return False

    def run_node(self, n: Node) -> Any:
        value = self._run(n)
        if self._half and n.op != "output" and isinstance(value, Tensor) and value.dtype == torch.float32:
            value = value.clamp(-HALF_MAX, HALF_MAX).half().float()
        if n.target in qdq.EXPANDING and all(a.op == "get_attr" for a in n.all_input_nodes):
            self._weights[n] = value
        return value

    def _run(self, n: Node) -> Any:
        if n in self._weights:
            return self._weights[n]
        source = self._written.get(n)
        if source in self._codes:
            assert source is not None
            return self._codes.pop(source)
        args, kwargs = self.fetch_args_kwargs_from_env(n) if n.op == "call_function" else ((), {})
        if n in self._kernels:
            return self._run_kernel(n, list(args), kwargs)
        if n in self._wide:
            wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
            return n.target(*wide, **kwargs).float()
        if n in self._outputs:
            write = _mean_codes if _is_mean(n) else _float_add if self._adder == "float" else _fixed_point_add
            if self._sixteen(self._outputs[n]):
                write = _mean_codes16 if _is_mean(n) else _add_codes16
            self._codes[n] = write(n, args, self._outputs[n])
        if self._jitter and chooses_tokens(n):
            args = tuple(self._moved(a, v) for a, v in zip(n.args, args, strict=True))
        if self._jitter and n.target in ROUNDS:
            args = (self._jittered(args[0]), *args[1:])
            if n not in self._dynamic:
                return n.target(*args, **kwargs)
        if self._adder == "fixed_point" and n.target is qdq.DEQUANTIZE_GROUP:
            is_table = any(kind(user) == "embedding" for user in n.users)
            args = (args[0], args[1].half().float() if is_table else args[1], *args[2:])
            return n.target(*args, **kwargs)
        if n in self._dynamic:
            if self._adder == "fixed_point" and args[2].dim() == 2:
                args = (*args[:2], group_scales(args[2], args[1].shape[1] // args[2].shape[1]), *args[3:])
            return _dynamic_linear(self._dynamic[n], *args)
        if self._jitter and chooses_tokens(n):
            return n.target(*args, **kwargs)
        return super().run_node(n)

    def _moved(self, source: object, value: Any) -> Any:
        """What a token cut reads from outside it, with jitter."""
        from_outside = isinstance(source, Node) and source.op == "call_function" and not chooses_tokens(source)
        return self._jittered(value) if from_outside and isinstance(value, Tensor) else value

    def _jittered(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        noise = torch.rand(value.shape, generator=self._random) * 2 - 1
        return value * (1 + self._jitter * noise)

    def _sixteen(self, output: _Output) -> bool:
        return self._adder == "fixed_point" and kernels16.fits(output.dtype)

    def _run_kernel(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        kernel = self._kernels[node]
        bias = args[2] if len(args) > 2 else None
        codes = torch.round(args[0].to(kernel.dtype) / kernel.input_scale)
        total = node.target(codes, kernel.codes, None, *args[3:], **kwargs)
        channels = (1, -1, *[1] * (total.dim() - 2)) if kind(node) == "conv" else (-1,)
        unit = kernel.unit.view(channels)
        output = self._outputs.get(node)
        if output is not None and self._sixteen(output):
            self._codes[node] = self._sixteen_bit(node, total, bias, output)
            return self._codes[node].float() * output.scale
        if bias is not None:
            whole = whole_steps(bias, kernel.unit)
            if whole is None:  # a bias of its own precision: added after the scale
                return (total.float() * unit + bias.view(channels)).float()
            total = (total.double() + whole.view(channels)).float()
        if output is not None:
            factor = unit / torch.tensor(output.scale, dtype=torch.float32)
            self._codes[node] = output.codes(total.float() * factor)
        return total.float() * unit

    def _sixteen_bit(self, node: Node, total: Tensor, bias: Tensor | None, output: _Output) -> Tensor:
        kernel = self._kernels[node]
        scales = kernel.unit.double() / kernel.input_scale
        weight = node.args[1]
        if isinstance(weight, Node) and isinstance(weight.args[1], Node):
            scales = constant(self.module, weight.args[1]).double()
        if bias is not None:  # an int64 of the step that the double product of the two scales is
            whole = torch.round(bias.double() / (kernel.input_scale * scales))
            total = total.double() + whole.view((1, -1, *[1] * (total.dim() - 2)) if kind(node) == "conv" else (-1,))
        write = kernels16.conv_codes if kind(node) == "conv" else kernels16.linear_codes
        return output.clamped(write(total, _single(kernel.input_scale), scales, _single(output.scale)))


def group_scales(scales: Tensor, group: int) -> Tensor:
    """Scales of groups [out, groups] as LiteRT computes with them: float16 in the file, bfloat16 in XNNPACK's kernels.

    XNNPACK takes groups that are multiples of 32; for others the built-in kernel computes with the file's numbers.
    """
    return scales.bfloat16().half().bfloat16().float() if group % 32 == 0 else scales.half().float()


def _single(value: float) -> float:
    """A scale as a file holds it: a float32 number."""
    return float(torch.tensor(value, dtype=torch.float32))


def _dynamic_linear(
    wide: Tensor, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, scheme: str, bits: int = 8
) -> Tensor:
    """`qdq.dynamic_linear` with the weight's codes as float numbers already, wide enough for exact sums."""
    q, scale = qdq.dynamic_codes(x, scheme, (-1,))
    if scales.dim() == 2:
        y = qdq.grouped_product(q, codes, scales) * scale
    else:
        y = torch.nn.functional.linear(q.to(wide.dtype), wide).float() * (scale * scales)
    return y if bias is None else y + bias


def _kernel(graph: GraphModule, node: Node) -> _Kernel | None:
    if kind(node) not in ("conv", "linear") or not _on_codes(node):
        return None
    x, weight = node.args[:2]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    codes_node, scales_node = weight.args[:2]
    if not isinstance(codes_node, Node) or codes_node.op != "get_attr" or not isinstance(x.args[1], float):
        return None
    assert isinstance(scales_node, Node)
    codes = constant(graph, codes_node)
    reach = int(x.args[4]) - int(x.args[3])
    largest = float(codes.float().abs().flatten(1).sum(1).max()) * reach
    dtype = torch.float32 if largest < EXACT else torch.float64
    unit = torch.tensor(x.args[1], dtype=torch.float32) * constant(graph, scales_node)
    return _Kernel(codes.to(dtype), x.args[1], unit, dtype)


def _on_codes(node: Node) -> bool:
    operands = [a for a in node.args[:2] if isinstance(a, Node)]
    return len(operands) == 2 and all(a.target in (qdq.DEQUANTIZE, qdq.DEQUANTIZE_CHANNEL) for a in operands)


def _is_add(node: Node) -> bool:
    return kind(node) == "add" and len(node.args) == 2 and _on_codes(node) and not node.kwargs


def _is_mean(node: Node) -> bool:
    source = node.args[0] if node.args else None
    return kind(node) == "mean" and isinstance(source, Node) and source.target is qdq.DEQUANTIZE and len(node.args) > 1


def _writer(quantize: Node) -> tuple[Node, _Output] | None:
    """The node before `quantize`, past activations that alone read each other, and how its codes come out."""
    node, scale, zero, low, high, dtype = quantize.args
    assert isinstance(scale, float)
    assert isinstance(zero, int)
    assert isinstance(low, int)
    assert isinstance(high, int)
    assert isinstance(dtype, torch.dtype)
    while isinstance(node, Node) and kind(node) in ("relu", "clamp") and len(node.users) == 1:
        smallest, largest = (0.0, None) if kind(node) == "relu" else bounds(node)
        if smallest is not None:
            low = max(low, min(high, round(smallest / scale) + zero))
        if largest is not None:
            high = min(high, max(low, round(largest / scale) + zero))
        node = node.args[0]
    if not isinstance(node, Node) or len(node.users) != 1:
        return None
    return node, _Output(scale, zero, low, high, dtype)


def bounds(node: Node) -> tuple[float | None, float | None]:
    """The least and the largest value that a clamp, hardtanh or relu6 lets through; None where there is no limit."""
    name = str(node.target)
    given = [a for a in node.args[1:3] if isinstance(a, int | float)]
    if "relu6" in name:
        return 0.0, 6.0
    if "hardtanh" in name:
        return (float(given[0]), float(given[1])) if len(given) == 2 else (-1.0, 1.0)
    limits = [node.args[1] if len(node.args) > 1 else None, node.args[2] if len(node.args) > 2 else None]
    limits = [node.kwargs.get(k, v) for k, v in zip(("min", "max"), limits, strict=True)]
    if "clamp_max" in name:
        limits = [None, limits[0]]
    low, high = (float(v) if isinstance(v, int | float) else None for v in limits)
    return low, high


def _steps(value: Tensor, source: object) -> tuple[Tensor, float]:
    """Codes minus zero point of a dequantized tensor, exact in float64, and its scale."""
    assert isinstance(source, Node)
    scale = source.args[1]
    assert isinstance(scale, float)
    return torch.round(value.double() / scale), scale


def _fixed_point_add(node: Node, args: Any, output: _Output) -> Tensor:
    """XNNPACK's add: fixed-point multipliers of the two scale ratios, one rounding shift, half up."""
    a, scale_a = _steps(args[0], node.args[0])
    b, scale_b = _steps(args[1], node.args[1])
    ratios = torch.tensor([scale_a, scale_b], dtype=torch.float32) / torch.tensor(output.scale, dtype=torch.float32)
    shift = 20 - int(torch.floor(torch.log2(ratios.max().double())))
    left, right = (torch.round(ratios.double() * 2.0**shift)).tolist()
    total = torch.floor((2.0 ** (shift - 1) + left * a + right * b) / 2.0**shift)
    return torch.clamp(total + output.zero_point, output.low, output.high).to(output.dtype)


def _add_codes16(node: Node, args: Any, output: _Output) -> Tensor:
    a, scale_a = _steps(args[0], node.args[0])
    b, scale_b = _steps(args[1], node.args[1])
    return output.clamped(
        kernels16.add_codes(a, _single(scale_a), b, _single(scale_b), _single(output.scale)) + output.zero_point
    )


def _float_add(node: Node, args: Any, output: _Output) -> Tensor:
    """QLinearAdd: round(fma(a, ra, fma(b, rb, c))) on codes with their zero points, in float32."""
    codes, ratios, zeros = [], [], []
    for value, source in zip(args[:2], node.args[:2], strict=True):
        steps, scale = _steps(value, source)
        zero = source.args[2]
        codes.append((steps + zero).float())
        ratios.append(torch.tensor(scale, dtype=torch.float32) / torch.tensor(output.scale, dtype=torch.float32))
        zeros.append(torch.tensor(float(zero)))
    offset = output.zero_point - _fused(zeros[0], ratios[0], ratios[1] * zeros[1])
    total = torch.round(_fused(codes[0], ratios[0], _fused(codes[1], ratios[1], offset)))
    return torch.clamp(total, output.low, output.high).to(output.dtype)


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded to float32 once, as a fused multiply-add does; float64 holds codes times float32 exactly."""
    return (a.double() * b.double() + c.double()).float()


def _mean_codes16(node: Node, args: Any, output: _Output) -> Tensor:
    total, count, scale = _sum_of_codes(node, args)
    return output.clamped(kernels16.mean_codes(total, count, _single(scale), _single(output.scale)))


def _sum_of_codes(node: Node, args: Any) -> tuple[Tensor, int, float]:
    """The sum that a mean is made of, exact in float64, over how many codes it runs, and their scale."""
    steps, scale = _steps(args[0], node.args[0])
    if operator_name(node) == "mean":
        axes, keep = args[1], bool(args[2]) if len(args) > 2 else False
    else:  # adaptive pooling to one value per channel
        axes, keep = list(range(2, steps.dim())), True
    total = steps.sum(axes, keepdim=keep)
    return total, steps.numel() // max(total.numel(), 1), scale


def _mean_codes(node: Node, args: Any, output: _Output) -> Tensor:
    """An exact sum of codes, then one multiplication by scale / (output scale * count)."""
    total, count, scale = _sum_of_codes(node, args)
    divisor = torch.tensor(output.scale, dtype=torch.float32) * count
    return output.codes(total.float() * (torch.tensor(scale, dtype=torch.float32) / divisor))


@dataclass(frozen=True)
class IntegerKernels:
    """Which nodes the simulation computes as integer kernels: `kernels` are conv and linear nodes with their constants,
    `outputs` says how a node's codes are written, `written` which node's codes a quantize node stands for."""

    kernels: dict[Node, _Kernel]
    outputs: dict[Node, _Output]
    written: dict[Node, Node]


def integer_kernels(graph: GraphModule) -> IntegerKernels:
    """What a target that writes its own kernels has to compute in integers, to the bit."""
    found = Simulation(graph)
    return IntegerKernels(found._kernels, found._outputs, found._written)


def whole_steps(bias: Tensor, unit: Tensor) -> Tensor | None:
    """A bias as whole steps of the accumulator (float64), or None: it is then added after the scale, in float32."""
    steps = bias.double() / unit.double()
    whole = torch.round(steps)
    return None if bool(((steps - whole).abs() > WHOLE * steps.abs()).any()) else whole


def simulate(
    graph: GraphModule, compute: str = "float32", adder: Adder = "float", jitter: float = 0.0
) -> Callable[[Iterable[Tensor]], tuple[Tensor, ...]]:
    """A callable that runs `graph` as integer kernels would; see `Simulation`."""
    interpreter = Simulation(graph, compute, adder, jitter)

    def call(inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            result = interpreter.run(*inputs)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    return call
