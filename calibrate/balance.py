"""What linked layers make of scaled and shifted channels: ranges seen, candidates, and the error each would cause."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from .affine import input_factor, input_reach, layer_of, output_reach
from .errors import CalibrationError
from .graph import constant, is_weighted, layer_name
from .links import Link
from .plan import Plan, QParams
from .ranges import fake_quantize, qparams
from .weights import fitted_scales, spread, weight_codes

# A channel whose weights or values stay below this is dead: it keeps its scale (arXiv 1906.04721, its authors' code).
DEAD = 1e-8
# No channel is scaled by more than this against the others: what a few samples hardly use may be used by others.
LIMIT = 64.0
EXPONENTS = (0.25, 0.5, 0.75, 1.0)
# Observers may clip a tensor: each candidate is judged at the best of these shares of its range.
SHARES = (1.0, 0.85, 0.7, 0.55)


@dataclass(frozen=True)
class Candidate:
    """Channels become (x - shift) / scale; both float64 [channels]."""

    label: str
    scale: Tensor
    shift: Tensor

    @property
    def moves(self) -> bool:
        """Whether it shifts anything."""
        return bool(self.shift.any())


@dataclass
class Seen:
    """Least and largest value per input channel of each reader, least per output channel of each source; float64."""

    low: dict[Node, Tensor] = field(default_factory=dict)
    high: dict[Node, Tensor] = field(default_factory=dict)
    least: dict[Node, Tensor] = field(default_factory=dict)

    def of(self, link: Link) -> tuple[Tensor, Tensor]:
        """(least, largest) per channel of the link over all that its readers read."""
        lows = [self.low[r].unflatten(0, (-1, n)).amin(1) for r, n in link.readers.items()]
        highs = [self.high[r].unflatten(0, (-1, n)).amax(1) for r, n in link.readers.items()]
        return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


class _Reading(Interpreter):
    """Runs the graph; calls `see(node, input, output)` at every node in `wanted`."""

    def __init__(self, graph: GraphModule, wanted: set[Node], see: Callable[[Node, Tensor, Tensor], None]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.wanted, self.see = wanted, see

    def run_node(self, n: Node) -> Any:
        source = self.env[n.args[0]] if n in self.wanted and isinstance(n.args[0], Node) else None
        value = super().run_node(n)
        if source is not None:
            self.see(n, source, value)
        return value


def look(graph: GraphModule, links: list[Link], batches: Iterable[list[Tensor]]) -> Seen:
    """One pass: the ranges of what every reader reads and every source computes."""
    seen = Seen()
    axes = {n: layer_of(graph, n).axis for link in links for n in (link.source, *link.readers)}  # type: ignore[union-attr]
    readers = {r for link in links for r in link.readers}

    def see(node: Node, x: Tensor, y: Tensor) -> None:
        if node in readers:
            _widen(seen, node, x, axes[node])
        least = y.double().movedim(axes[node], 0).flatten(1).amin(1)
        seen.least[node] = torch.minimum(seen.least[node], least) if node in seen.least else least

    run = _Reading(graph, set(axes), see)
    with torch.no_grad():
        for inputs in batches:
            run.run(*inputs)
    if links and not seen.least:
        raise CalibrationError("the calibration data is empty: at least one sample is needed")
    return seen


def _widen(seen: Seen, node: Node, x: Tensor, axis: int) -> None:
    flat = x.double().movedim(axis, 0).flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    seen.low[node] = torch.minimum(seen.low[node], low) if node in seen.low else low
    seen.high[node] = torch.maximum(seen.high[node], high) if node in seen.high else high


def reach(graph: GraphModule, link: Link) -> Tensor:
    """The largest weight that reads each channel, over all readers: float64 [channels]."""
    found = []
    for reader, repeat in link.readers.items():
        layer = layer_of(graph, reader)
        assert layer is not None
        found.append(input_reach(graph, layer).unflatten(0, (-1, repeat)).amax(1))
    return torch.stack(found).amax(0)


def candidates(graph: GraphModule, link: Link, seen: Seen, shift: Tensor | None) -> list[Candidate]:
    """The channels as they are, as DFQ makes them from weights alone, then a^e and a^e / w^(1 - e) for each exponent e:
    a what is read, w the weights' reach (SmoothQuant, arXiv 2211.10438, equation 4, between two layers).

    With `shift` each of them shifted as well.
    """
    low, high = seen.of(link)
    weights = reach(graph, link)
    source = layer_of(graph, link.source)
    assert source is not None
    made = output_reach(graph, source)
    none = torch.zeros_like(low)
    found = [Candidate("none", torch.ones_like(low), none)]
    for moved in [none] if shift is None or not bool(shift.any()) else [none, shift]:
        values = torch.maximum((low - moved).abs(), (high - moved).abs())
        alive = (values > DEAD) & (weights > DEAD)
        more = ", shifted" if bool(moved.any()) else ""
        classic = (made / weights.clamp(min=DEAD)).sqrt()
        found.append(
            Candidate(f"0.5 of weights before and behind{more}", _scale(classic, alive & (made > DEAD)), moved)
        )
        if more:
            found.append(Candidate("none, shifted", torch.ones_like(low), moved))
        for e in EXPONENTS:
            found.append(Candidate(f"{e:g} of the ranges{more}", _scale(values**e, alive), moved))
            if e < 1:
                balanced = values**e / weights.clamp(min=DEAD) ** (1 - e)
                found.append(Candidate(f"{e:g} against the weights{more}", _scale(balanced, alive), moved))
    return found


def _scale(raw: Tensor, alive: Tensor) -> Tensor:
    """`raw` with geometric mean 1 over living channels, limited; dead channels keep 1."""
    if not bool(alive.any()):
        return torch.ones_like(raw)
    centre = raw[alive].log().mean().exp()
    return torch.where(alive, (raw / centre).clamp(1 / LIMIT, LIMIT), torch.ones_like(raw))


def errors(
    graph: GraphModule,
    links: list[Link],
    options: dict[Node, list[Candidate]],
    seen: Seen,
    plan: Plan,
    batches: Iterable[list[Tensor]],
) -> dict[Node, list[float]]:
    """For each link (by source) and candidate: squared error of what its readers compute from activations in one
    scale per tensor and weights in codes, relative to the power of what they compute in float."""
    total = {link.source: torch.zeros(len(options[link.source]), len(SHARES)) for link in links}
    owners: dict[Node, list[Link]] = {}
    for link in links:
        for reader in link.readers:
            owners.setdefault(reader, []).append(link)
    prepared = {
        (link.source, r): _prepare(graph, link, r, options[link.source], seen, plan)
        for link in links
        for r in link.readers
    }

    def see(node: Node, x: Tensor, y: Tensor) -> None:
        power = float(y.double().square().sum()) or 1.0
        for link in owners[node]:
            for i, attempt in enumerate(prepared[(link.source, node)]):
                for j in range(len(SHARES)):
                    total[link.source][i, j] += float((attempt(x, j) - y).double().square().sum()) / power

    run = _Reading(graph, set(owners), see)
    with torch.no_grad():
        for inputs in batches:
            run.run(*inputs)
    return {source: error.amin(1).tolist() for source, error in total.items()}


def _prepare(
    graph: GraphModule, link: Link, reader: Node, options: list[Candidate], seen: Seen, plan: Plan
) -> list[Callable[[Tensor, int], Tensor]]:
    """The reader as a function of its float input and one of `SHARES`, once per candidate, on quantized values."""
    layer = layer_of(graph, reader)
    assert layer is not None
    weight = constant(graph, layer.weight).double()
    bias = constant(graph, layer.bias) if layer.bias is not None else None
    form = replace(plan.format_of(layer_name(reader)), group=None, kind="int")
    low_code, high_code = plan.code_range(form.bits)
    made: list[Callable[[Tensor, int], Tensor]] = []
    for option in options:
        scale = option.scale.repeat_interleave(link.readers[reader])
        shift = option.shift.repeat_interleave(link.readers[reader])
        low = float(((seen.low[reader] - shift) / scale).amin().clamp(max=0))
        high = float(((seen.high[reader] - shift) / scale).amax().clamp(min=0))
        ranges = [qparams(low * share, high * share, plan) for share in SHARES]
        scaled = (weight * input_factor(layer, scale)).float()
        if is_weighted(reader):
            steps = fitted_scales(scaled, plan, form)
            codes = weight_codes(scaled, steps, low_code, high_code)
            scaled = (codes.double() * spread(steps.double(), scaled.shape)).float()
        shape = (-1, *[1] * (-layer.axis - 1))
        divisor, offset = scale.float().view(shape), shift.float().view(shape)
        more = _at_shift(reader, weight.float(), shift, layer.axis) if option.moves else None

        def attempt(
            x: Tensor,
            share: int,
            q: list[QParams] = ranges,
            w: Tensor = scaled,
            d: Tensor = divisor,
            o: Tensor = offset,
            m: Tensor | None = more,
        ) -> Tensor:
            codes = fake_quantize((x - o) / d, q[share])
            y = reader.target(codes, w, bias, *reader.args[3:], **_others(reader))
            result: Tensor = y if m is None else y + m
            return result

        made.append(attempt)
    return made


def _others(node: Node) -> dict[str, Any]:
    return {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}


def _at_shift(reader: Node, weight: Tensor, shift: Tensor, axis: int) -> Tensor:
    """What the layer adds to its outputs for an input that is `shift` everywhere; it does not pad."""
    if axis == -1:
        return weight @ shift.float()
    sizes = weight.shape[2:]
    dilation = reader.args[5] if len(reader.args) > 5 else reader.kwargs.get("dilation", 1)
    gaps = (
        list(dilation) * (len(sizes) // len(dilation))
        if isinstance(dilation, list | tuple)
        else [dilation] * len(sizes)
    )
    window = [(k - 1) * g + 1 for k, g in zip(sizes, gaps, strict=True)]
    flat = shift.float().view(1, -1, *[1] * len(sizes)).expand(1, -1, *window)
    result: Tensor = reader.target(flat, weight, None, *reader.args[3:], **_others(reader))
    return result
