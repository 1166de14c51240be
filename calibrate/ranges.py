"""From calibration data to the scale and zero point of every quantized tensor, in constant memory.

One pass fills a histogram per tensor; a few samples run the race (`race`) between the ranges that observers propose.
"""

import ctypes
import functools
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from . import observers
from .errors import CalibrationError
from .histogram import Floats, Histogram
from .placement import Sites
from .plan import ActivationType, Plan, QParams

Progress = Callable[[int], None]
# Smallest normal float16: below it steps between neighbours no longer shrink with the number.
SMALLEST_HALF = 2.0**-14
# The product of two such scales, a kernel's step, is still a normal float32 number.
SMALLEST_FLOAT = 2.0**-63
# Proposals are alike when their scales differ by less than this share, and their zero points by as much of 256 codes.
ALIKE = 0.01


def qparams(low: float, high: float, plan: Plan, observer: str = "") -> QParams:
    """Scale and zero point for real values in [low, high], low <= 0 <= high.

    Zero is always a code. Symmetric: zero_point 0, scale = reach / 127; the codes keep their whole range, as runtimes
    saturate there. The scale is a float32 number.
    """
    scales, zeros = _grids(np.array([low]), np.array([high]), plan)
    return QParams(float(scales[0]), int(zeros[0]), *_codes(plan), observer)


def _codes(plan: Plan) -> tuple[int, int, ActivationType]:
    """The least and largest code of an activation, and their type."""
    if plan.activation == "int16":
        return -32768, 32767, "int16"
    if plan.symmetric:
        return -128, 127, "int8"
    return (-128, 127, "int8") if plan.activation == "int8" else (0, 255, "uint8")


def _grids(lows: Floats, highs: Floats, plan: Plan) -> tuple[Floats, Floats]:
    """Scales and zero points of ranges, arrays of equal length."""
    qmin, qmax, dtype = _codes(plan)
    if plan.symmetric or dtype == "int16":
        return _stored(np.maximum(-lows, highs) / qmax, plan), np.zeros(len(lows))
    scales = _stored((highs - lows) / 255, plan)
    return scales, np.clip(np.rint(qmin - lows / scales), qmin, qmax)


def representable(scale: float, plan: Plan) -> float:
    """The nearest scale the runtime can store, float32 or float16 and not below the smallest that serves; 1 for 0."""
    return float(_stored(np.array([scale]), plan)[0])


def _stored(scales: Floats, plan: Plan) -> Floats:
    smallest, dtype = (SMALLEST_HALF, np.float16) if plan.half_scales else (SMALLEST_FLOAT, np.float32)
    return np.where(scales == 0, 1.0, np.maximum(scales, smallest).astype(dtype).astype(np.float64))


def fake_quantize(x: Tensor, q: QParams) -> Tensor:
    """`x` after a round trip through its codes."""
    codes = torch.clamp(torch.round(x * (1.0 / q.scale)) + q.zero_point, q.qmin, q.qmax)
    return (codes - q.zero_point) * q.scale


def _watched(graph: GraphModule, sites: Sites, see: Callable[[str, object], None]) -> GraphModule:
    """The float graph as code that hands every tensor that is a site to `see(site, value)` as soon as it is there."""
    copied = Graph()
    made: dict[Node, Node] = {}
    first: list[Node] = []  # the inputs come before anything is computed
    for node in graph.graph.nodes:
        made[node] = copied.node_copy(node, lambda n: made[n])
        if node.name in sites.group_of:
            first.append(node)
        if node.op != "placeholder":
            for site in first:
                copied.call_function(see, (site.name, made[site]))
            first = []
    return GraphModule(graph, copied)


# Batches after which freed memory is given back.
TRIMMED = 4


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None
    return found


def give_back() -> None:
    """Let the C library hand freed memory back: in the holes that activations leave, memory seemed to grow with the
    number of batches, by a third in a ViT, while what is alive does not."""
    trim = _trim()
    if trim is not None:
        trim(0)


def fill_histograms(
    graph: GraphModule, sites: Sites, batches: Iterable[list[Tensor]], progress: Progress | None = None
) -> dict[str, Histogram]:
    """One histogram per site over every batch. `batches` yields the graph's positional inputs."""
    histograms: dict[str, Histogram] = {name: Histogram() for name in sites.group_of}

    def see(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            histograms[name].add(value.float())

    watch = _watched(graph, sites, see)
    seen = 0
    with torch.no_grad():
        for number, inputs in enumerate(batches):
            watch(*inputs)
            if number % TRIMMED == 0:
                give_back()
            seen += len(inputs[0]) if inputs[0].dim() else 1
            if progress:
                progress(seen)
    if not seen:
        raise CalibrationError("the calibration data is empty: at least one sample is needed")
    return histograms


def candidates(histogram: Histogram, plan: Plan) -> list[QParams]:
    """What the plan's observers propose for one tensor, in their order, without what is nearly a proposal before it."""
    qmin, qmax, dtype = _codes(plan)

    def error(lows: Floats, highs: Floats) -> Floats:
        if plan.symmetric or dtype == "int16":
            highs = np.maximum(-lows, highs)
            lows = -highs
        return histogram.error(lows, highs, qmax - qmin + 1)

    proposed = [(low, high, name) for name in plan.observers for low, high in observers.find(name)(histogram, error)]
    proposed = [p for p in proposed if p[1] > p[0]]
    if not proposed:
        return [qparams(0.0, 0.0, plan, "constant")]
    scales, zeros = _grids(np.array([p[0] for p in proposed]), np.array([p[1] for p in proposed]), plan)
    likeness = np.rint(np.log(scales) / ALIKE).tolist(), np.rint(zeros / (256 * ALIKE)).tolist()
    first: dict[tuple[float, float], int] = {}
    for i, key in enumerate(zip(*likeness, strict=True)):
        first.setdefault(key, i)
    kept = ((float(scales[i]), int(zeros[i]), proposed[i][2]) for i in first.values())
    return [QParams(scale, zero, qmin, qmax, dtype, name) for scale, zero, name in kept]
