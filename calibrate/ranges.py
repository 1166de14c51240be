"""From calibration data to the scale and zero point of every quantized tensor, in constant memory.

Two passes. The first fills one histogram per tensor. The second runs the race: for every tensor, each candidate range
that the observers propose is judged by the error it causes in the *output of the layers that read the tensor* (for a
tensor that no weighted layer reads, in the tensor itself); the least error wins, tensor by tensor.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from . import observers
from .errors import CalibrationError
from .graph import is_weighted
from .histogram import Histogram
from .placement import Sites
from .plan import Plan, QParams

Progress = Callable[[int], None]
# Smallest normal float16: below it steps between neighbours no longer shrink with the number.
SMALLEST_HALF = 2.0**-14
# The product of two such scales, a kernel's step, is still a normal float32 number.
SMALLEST_FLOAT = 2.0**-63


def qparams(low: float, high: float, plan: Plan, observer: str = "") -> QParams:
    """Scale and zero point for real values in [low, high], low <= 0 <= high.

    Zero is always a code. Symmetric: zero_point 0, scale = reach / 127; the codes keep their whole range, as runtimes
    saturate there. The scale is a float32 number.
    """
    if plan.activation == "int16":
        scale = representable(max(-low, high) / 32767, plan)
        return QParams(scale, 0, -32768, 32767, "int16", observer)
    if plan.symmetric:
        reach = max(-low, high)
        scale = representable(reach / 127, plan)
        return QParams(scale, 0, -128, 127, "int8", observer)
    qmin, qmax = (-128, 127) if plan.activation == "int8" else (0, 255)
    scale = representable((high - low) / 255, plan)
    zero = int(min(max(round(qmin - low / scale), qmin), qmax))
    return QParams(scale, zero, qmin, qmax, plan.activation, observer)


def representable(scale: float, plan: Plan) -> float:
    """The nearest scale the runtime can store, float32 or float16 and not below the smallest that serves; 1 for 0."""
    if scale == 0:
        return 1.0
    if plan.half_scales:
        return float(np.float16(max(scale, SMALLEST_HALF)))
    return float(np.float32(max(scale, SMALLEST_FLOAT)))


def fake_quantize(x: Tensor, q: QParams) -> Tensor:
    """`x` after a round trip through its codes."""
    codes = torch.clamp(torch.round(x * (1.0 / q.scale)) + q.zero_point, q.qmin, q.qmax)
    return (codes - q.zero_point) * q.scale


class _Watch(Interpreter):
    """Runs the float graph and hands every float tensor that is a site to `see(site, value)`."""

    def __init__(self, graph: GraphModule, sites: Sites, see: Callable[[str, Tensor], None]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.sites, self.see = sites, see

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.sites.group_of and isinstance(value, Tensor):
            self.see(n.name, value)
        return value


def fill_histograms(
    graph: GraphModule, sites: Sites, batches: Iterable[list[Tensor]], progress: Progress | None = None
) -> dict[str, Histogram]:
    """One histogram per site over every batch. `batches` yields the graph's positional inputs."""
    histograms: dict[str, Histogram] = {name: Histogram() for name in sites.group_of}
    watch = _Watch(graph, sites, lambda name, value: histograms[name].add(value.float()))
    seen = 0
    with torch.no_grad():
        for inputs in batches:
            watch.run(*inputs)
            seen += len(inputs[0]) if inputs[0].dim() else 1
            if progress:
                progress(seen)
    if not seen:
        raise CalibrationError("the calibration data is empty: at least one sample is needed")
    return histograms


def candidates(histogram: Histogram, plan: Plan) -> list[QParams]:
    """What the plan's observers propose for one tensor, duplicates removed."""
    used = histogram.counts > 0
    values, counts = histogram.centers[used], histogram.counts[used]

    def error(low: float, high: float) -> float:
        return float(((fake_quantize(values, qparams(low, high, plan)) - values).square() * counts).sum())

    found: dict[tuple[float, int], QParams] = {}
    for name in plan.observers:
        for low, high in observers.find(name)(histogram, error):
            if high > low:
                q = qparams(low, high, plan, name)
                found.setdefault((q.scale, q.zero_point), q)
    return list(found.values()) or [qparams(0.0, 0.0, plan, "constant")]


def race(
    graph: GraphModule,
    sites: Sites,
    proposals: dict[int, list[QParams]],
    batches: Iterable[list[Tensor]],
    progress: Progress | None = None,
) -> dict[int, QParams]:
    """Pick, group by group, the proposal with the least squared error in what reads the tensor."""
    errors: dict[int, np.ndarray] = {g: np.zeros(len(p)) for g, p in proposals.items()}
    readers: dict[str, list[Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        if is_weighted(node) and isinstance(node.args[0], Node) and node.args[0].name in sites.group_of:
            readers[node.args[0].name].append(node)

    class _Race(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if not isinstance(value, Tensor):
                return value
            if n.name in sites.group_of and not readers[n.name]:
                self._score(n.name, value, lambda x: x)
            source = n.args[0] if n.args else None
            if isinstance(source, Node) and n in readers.get(source.name, ()):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                self._score(
                    source.name,
                    args[0],
                    lambda x: n.target(x, *args[1:], **kwargs),
                    value,
                )
            return value

        def _score(
            self, name: str, x: Tensor, through: Callable[[Tensor], Tensor], reference: Tensor | None = None
        ) -> None:
            group = sites.group_of[name]
            options = proposals[group]
            if len(options) < 2:
                return
            reference = x if reference is None else reference
            power = float(reference.double().square().sum()) or 1.0
            for i, q in enumerate(options):
                # Relative to the output's power, so that several readers of one tensor weigh alike.
                errors[group][i] += float((through(fake_quantize(x, q)) - reference).double().square().sum()) / power

    runner = _Race(graph, garbage_collect_values=True)
    seen = 0
    with torch.no_grad():
        for inputs in batches:
            runner.run(*inputs)
            seen += len(inputs[0]) if inputs[0].dim() else 1
            if progress:
                progress(seen)
    return {g: options[_winner(errors[g])] for g, options in proposals.items()}


# A proposal must beat the first (the whole range, where min-max runs) by this factor: the race hears a few samples,
# and clipping errors of successive layers add up while rounding errors average out.
MARGIN = 0.9


def _winner(errors: np.ndarray) -> int:
    best = int(np.argmin(errors))
    return best if errors[best] < MARGIN * errors[0] else 0
