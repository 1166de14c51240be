"""Look for what int8 breaks: outlier channels, lone extremes, idle heads, fragile layers; change nothing."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from calibrate.graph import constant, is_weighted, kind, layer_name, operator_name, weight_nodes
from calibrate.histogram import Histogram
from calibrate.plan import Entry
from calibrate.steps import Context

# A channel that reaches so many times what the median channel does wastes two bits or more of all the others.
OUTLIER = 6.0
# A range so many times wider than what all but one in a thousand values need is an extreme's.
LONE = 4.0
# A head whose largest probability is so large on average looks at one token: it has learned to do nothing
# (arXiv 2306.12929), by softmax inputs that grow without bound.
IDLE = 0.95
# Ranges of a weight's input channels that differ so much lose bits in any scale per output channel.
UNEVEN = 16.0
# A layer that loses more in int8, its own input and weight alone quantized, is worth more bits.
FRAGILE_DB = 25.0


@dataclass
class _Seen:
    """One layer: its input per channel (largest magnitude) and as a whole, and what it loses in int8 by itself."""

    channels: Tensor | None = None
    histogram: Histogram = field(default_factory=Histogram)
    noise: float = 0.0
    power: float = 0.0


class Diagnose:
    """Every finding names a layer, what is wrong there in numbers, and the step that is made for it.

    Looks at a few samples. `auto` tries what a finding names.
    """

    exact = True

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        watch = _Watch(graph)
        done = 0
        with torch.no_grad():
            for inputs in context.few_batches():
                watch.run(*inputs)
                done += len(inputs[0])
                context.progress("diagnose", done)
        ledger = [Entry("diagnose", layer, advice, what) for layer, advice, what in _findings(graph, watch)]
        return ledger or [Entry("diagnose", "model", "nothing found", "no outliers, lone extremes or fragile layers")]

    def ensures(self, graph: GraphModule) -> str | None:
        return None


class _Watch(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.seen: dict[Node, _Seen] = defaultdict(_Seen)
        self.heads: dict[Node, list[Tensor]] = defaultdict(list)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if is_weighted(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self._layer(n, args, kwargs, value)
        elif kind(n) == "attention":
            self.heads[n].append(_largest_probability(*self.fetch_args_kwargs_from_env(n)))
        elif kind(n) == "softmax" and value.dim() == 4:
            self.heads[n].append(value.amax(-1).mean((0, 2)))
        return value

    def _layer(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x, weight = args[0], args[1]
        axis = -1 if kind(node) == "linear" else 1
        found = self.seen[node]
        others = [d for d in range(x.dim()) if d != axis % x.dim()]
        reach = x.abs().amax(others)
        found.channels = reach if found.channels is None else torch.maximum(found.channels, reach)
        found.histogram.add(x.float())
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        step = ((high - low) / 255).clamp(min=1e-30)
        coarse = torch.round(x / step) * step
        rows = weight.abs().flatten(1).amax(1).clamp(min=1e-30).view(-1, *[1] * (weight.dim() - 1)) / 127
        rounded = torch.round(weight / rows) * rows
        again = node.target(coarse, rounded, *args[2:], **kwargs)
        found.noise += float((again - output).double().square().sum())
        found.power += float(output.double().square().sum())


def _largest_probability(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Per head, the mean over queries of the largest attention probability: float32 [heads]."""
    query, key = args[:2]
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    scale = kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
    logits = query @ key.transpose(-1, -2) * scale
    if isinstance(mask, Tensor):
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return torch.softmax(logits, -1).nan_to_num().amax(-1).mean((0, 2))


def _findings(graph: GraphModule, watch: _Watch) -> Iterable[tuple[str, str, str]]:
    told: set[tuple[Node, str]] = set()
    for node, found in watch.seen.items():
        layer, source = layer_name(node), node.args[0]
        assert isinstance(source, Node)
        for advice, what in (*_of_input(node, source, found), *_of_weight(graph, node)):
            if (source, advice) not in told:  # q, k and v read one tensor
                told.add((source, advice))
                yield layer, advice, what
        loss = 10 * math.log10(found.power / found.noise) if found.noise and found.power else math.inf
        if loss < FRAGILE_DB:
            yield layer, "more bits", f"in int8 by itself it keeps {loss:.1f} dB: leave it float, or weights only"
    for node, parts in watch.heads.items():
        mean = torch.stack(parts).mean(0)
        idle = [i for i, p in enumerate(mean.tolist()) if p > IDLE]
        if idle:
            what = f"heads {', '.join(map(str, idle))} put {float(mean[idle].min()):.0%} or more on one token"
            yield layer_name(node), "keep attention float", f"{what}: they do nothing, by inputs without bound"


def _of_input(node: Node, source: Node, found: _Seen) -> Iterable[tuple[str, str]]:
    assert found.channels is not None
    reach = found.channels
    median = float(reach.median())
    if len(reach) > 3 and median > 0 and float(reach.max()) > OUTLIER * median:
        count = int((reach > OUTLIER * median).sum())
        what = (
            f"{count} of {len(reach)} input channels, most {int(reach.argmax())}, reach {float(reach.max()):.3g}, "
            f"{float(reach.max()) / median:.0f} times the median channel"
        )
        yield ("equalize" if kind(node) == "conv" else _remedy(source)), what
    histogram = found.histogram
    if histogram.finite:
        widest = max(-histogram.low, histogram.high)
        usual = histogram.magnitude(0.999)
        if usual and widest > LONE * usual:
            yield "clip ranges", f"one value in 1,000 or fewer takes the range from {usual:.3g} to {widest:.3g}"


def _remedy(source: Node) -> str:
    """What takes outliers from a tensor, by what makes it."""
    return "smooth" if kind(source) in ("layer_norm", "linear", "gelu", "attention", "reshape") else "split_outliers"


def _of_weight(graph: GraphModule, node: Node) -> Iterable[tuple[str, str]]:
    weight_node, _ = weight_nodes(node)
    assert weight_node is not None
    weight = constant(graph, weight_node)
    if operator_name(node) != "conv2d" or weight.shape[1] == 1:
        return
    reach = weight.abs().transpose(0, 1).flatten(1).amax(1)
    alive = reach[reach > 1e-8]
    if len(alive) > 1 and float(alive.max() / alive.min()) > UNEVEN:
        yield "equalize", f"weights of its input channels differ {float(alive.max() / alive.min()):.0f} times in range"


STEP = Diagnose()
