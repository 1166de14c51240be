"""The race between candidate ranges: the one that moves the model's outputs least wins, tensor by tensor.

What a range does to the outputs is told to first order from gradients, one backward pass for all tensors and
candidates, on a few samples. With g the gradient at a tensor of a random projection of the outputs (of unit variance,
so that the expected square is the squared error of all outputs; compare the Hessian-guided metric of PTQ4ViT, arXiv
2111.12293, section 3.3):

- values inside the range move by independent roundings: mean(g²) * step² / 12 for each that is not zero;
- values outside move to its ends together, all in one direction: their part is (sum of g * distance)² per sample. A
  few samples tell how much the outputs feel a clipped distance, but not how often values lie far out: that is counted
  in the histogram of all samples.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from .histogram import Floats, Histogram
from .placement import Sites
from .plan import QParams

Progress = Callable[[int], None]
# A proposal must beat the first (the whole range, where min-max runs) by this factor: samples not seen reach further.
MARGIN = 0.9
# Clipped values on the race's samples from which the outputs' answer to a threshold is told; with fewer it is what they
# answered to the next narrower threshold.
EVENTS = 30
# Samples that race. Of each the outputs' answer is one random number squared: fewer make the choice a draw.
RACERS = 32
# Clipped values of a tensor that are looked at, of one batch: about so many, in whole samples.
CLIPPED = 2**11
# Values of a tensor whose gradients are looked at, of one batch.
HEARD = 2**13
# Values of the sites held at a time, with what autograd keeps beside them about four times as many bytes.
HELD = 2**24
SEED = 0


@dataclass
class _Member:
    """What the outputs answer to changes of one tensor, summed over samples; arrays per threshold, narrow to wide."""

    lows: Floats
    highs: Floats
    square: float = 0.0  # of gradients, where the value is not zero
    nonzero: int = 0
    values: int = 0
    samples: int = 0
    answers: dict[int, Floats] = field(default_factory=dict)  # by sign: energy, squared answer, events [3, thresholds]

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """One batch: `x` and `gradient` [n, ...]."""
        x, gradient = _by_sample(x, x), _by_sample(gradient, x)
        every = 1 if x.numel() <= HEARD else x.numel() // HEARD | 1
        # NumPy compares and finds several times faster than torch does on one core.
        heard, felt = (np.ascontiguousarray(t.reshape(-1).numpy()[::every]) for t in (x, gradient))
        self.square += float(np.vdot(felt * (heard != 0), felt))
        self.nonzero += int(np.count_nonzero(heard))
        self.values += x.numel()
        self.samples += len(x)
        for sign, ends in ((-1, self.lows), (1, self.highs)):
            found = _clipped(x, gradient, ends, sign, heard)
            self.answers[sign] = self.answers.get(sign, np.zeros_like(found)) + found

    def cost(self, histogram: Histogram, lows: Floats, highs: Floats, steps: Floats) -> Floats:
        """The squared error of the outputs for each candidate [low, high], relative to the outputs' power."""
        noise = self.square / max(self.nonzero, 1)
        width = self.values / max(self.samples, 1)
        below, share_below = self._clipping(histogram, self.lows, -1, noise)
        above, share_above = self._clipping(histogram, self.highs, 1, noise)
        at_low, at_high = np.searchsorted(-self.lows, -lows), np.searchsorted(self.highs, highs)
        inside = np.maximum(histogram.nonzero - share_below[at_low] - share_above[at_high], 0.0)
        return np.asarray(width * (below[at_low] + above[at_high] + noise * inside * steps**2 / 12))

    def _clipping(self, histogram: Histogram, ends: Floats, sign: int, noise: float) -> tuple[Floats, Floats]:
        energy, answer, events = self.answers[sign]
        gains, gain = np.empty(len(ends)), noise
        for i in range(len(ends)):
            if events[i] >= EVENTS:
                # A few samples understate it: values that are heard at all count like those inside, or more.
                gain = max(answer[i] / energy[i], noise) if answer[i] > 0 else 0.0
            gains[i] = gain
        distance, share = histogram.beyond(ends, sign)
        return gains * distance, share


def _by_sample(x: Tensor, like: Tensor) -> Tensor:
    """[n, values] with the values of a sample as `like` has them in memory, so that nothing is copied."""
    order = sorted(range(1, like.dim()), key=lambda axis: -like.stride(axis))
    return x.permute(0, *order).reshape(len(x), -1) if like.dim() else x.reshape(1, 1)


def _clipped(x: Tensor, gradient: Tensor, ends: Floats, sign: int, some: Floats) -> Floats:
    """For each end: squared distance of what lies beyond it, squared answer of the outputs, how many lie there."""
    narrowest = float(ends[0])
    share = float(np.count_nonzero(some > narrowest if sign > 0 else some < narrowest)) / max(len(some), 1)
    # Where many lie there, a few samples tell as much.
    samples = min(len(x), max(2, int(CLIPPED / max(share * x.shape[1], 1.0))))
    looked = x[:samples].reshape(-1).numpy()
    at = np.flatnonzero(looked > narrowest if sign > 0 else looked < narrowest)
    if not len(at):
        return np.zeros((3, len(ends)))
    rows = at // x.shape[1]
    values = looked[at].astype(np.float64) * sign
    slopes = gradient[:samples].reshape(-1).numpy()[at].astype(np.float64)
    # Past so many ends does each value lie; sums over values past an end, per sample, then give every end at once.
    passed = np.searchsorted(ends * sign, values, side="left") - 1
    cell, shape = rows * len(ends) + passed, (-1, len(ends))

    def past(weights: Floats | None, cells: Any, size: int) -> Floats:
        sums = np.bincount(cells, weights, size).reshape(shape)
        return np.asarray(np.cumsum(sums[:, ::-1], axis=1)[:, ::-1])

    end, size = ends * sign, samples * len(ends)
    answer = past(slopes * values, cell, size) - end * past(slopes, cell, size)
    events, first, second = (past(w, passed, len(ends))[0] for w in (None, values, values**2))
    energy = np.maximum(second - 2 * end * first + end**2 * events, 0.0)
    return np.stack([energy, (answer**2).sum(0), events])


class _Gradients(Interpreter):
    """Runs the graph with autograd on, and keeps the tensors that race."""

    def __init__(self, graph: GraphModule, names: set[str]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.names = names
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, Tensor):
            if not value.requires_grad:  # an input, or what comes of integers
                value = value.detach().requires_grad_()
            self.kept[n.name] = value
        return value

    def gradients(self, inputs: list[Tensor], random: torch.Generator) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Tensor -> (value, gradient of one random projection of the outputs); None where no output depends on it."""
        self.kept = {}
        with torch.enable_grad():
            outputs = self.run(*inputs)
            total = torch.zeros(())
            for y in outputs if isinstance(outputs, tuple | list) else (outputs,):
                if isinstance(y, Tensor) and y.requires_grad:
                    power = float(y.detach().double().square().sum()) or 1.0
                    total = total + (y * torch.randn(y.shape, generator=random)).sum() * power**-0.5
            names = list(self.kept)
            tensors = [self.kept[n] for n in names]
            found: Sequence[Tensor | None] = [None] * len(names)
            if total.requires_grad:
                found = torch.autograd.grad(total, tensors, allow_unused=True)
        self.kept = {}
        return {n: (x.detach(), g) for n, x, g in zip(names, tensors, found, strict=True)}


def race(
    graph: GraphModule,
    sites: Sites,
    proposals: dict[int, list[QParams]],
    histograms: dict[str, Histogram],
    batches: Iterable[list[Tensor]],
    progress: Progress | None = None,
) -> dict[int, QParams]:
    """Pick, group by group, the proposal that moves the outputs least.

    `histograms` are those of every site; `batches` yields the graph's positional inputs, of which the first few run. A
    tensor that no output depends on by way of derivatives is judged by its own error.
    """
    racing = {g: p for g, p in proposals.items() if len(p) > 1}
    members = {n: _member(racing[g]) for n, g in sites.group_of.items() if g in racing}
    unheard: set[str] = set()
    if members:
        runner = _Gradients(graph, set(members))
        random = torch.Generator().manual_seed(SEED)
        done = 0
        for inputs in _slices(graph, batches, [histograms[n] for n in members]):
            for name, (x, gradient) in runner.gradients(inputs, random).items():
                unheard |= {name} if gradient is None else set()
                members[name].add(x.float(), torch.ones_like(x) if gradient is None else gradient.float())
            done += len(inputs[0]) if inputs[0].dim() else 1
            if progress:
                progress(done)
    won = {g: options[0] for g, options in proposals.items()}
    for group, options in racing.items():
        lows, highs, steps = _ends(options)
        costs = [
            member.cost(histograms[name], lows, highs, steps)
            for name, member in members.items()
            if sites.group_of[name] == group and member.samples
        ]
        if costs:
            won[group] = options[winner(np.sum(costs, axis=0))]
        if any(sites.group_of[name] == group for name in unheard):
            won[group] = replace(won[group], observer=f"{won[group].observer}, judged by the tensor's own error")
    return won


def winner(costs: Floats) -> int:
    """The least cost, where it is below the first by the margin; else the first."""
    best = int(np.argmin(costs))
    return best if costs[best] < MARGIN * costs[0] else 0


def _ends(options: list[QParams]) -> tuple[Floats, Floats, Floats]:
    """The least and largest number of each option, and its step."""
    scales, zeros = np.array([(q.scale, q.zero_point) for q in options]).T
    return (options[0].qmin - zeros) * scales, (options[0].qmax - zeros) * scales, scales


def _member(options: list[QParams]) -> _Member:
    lows, highs, _ = _ends(options)
    return _Member(np.unique(lows)[::-1].copy(), np.unique(highs))


def _slices(graph: GraphModule, batches: Iterable[list[Tensor]], seen: list[Histogram]) -> Iterable[list[Tensor]]:
    """The first few samples, in batches small enough that all sites fit in memory where the batch may vary."""
    first = next(n for n in graph.graph.nodes if n.op == "placeholder")
    value = first.meta.get("val")
    varies = isinstance(value, Tensor) and value.dim() > 0 and not isinstance(value.shape[0], int)
    held = sum(h.seen / max(h.batches, 1) for h in seen)
    done = 0
    for inputs in batches:
        count = len(inputs[0]) if inputs[0].dim() else 1
        if done >= RACERS:
            break
        size = max(1, min(count, int(HELD * count / max(held, 1.0)))) if varies else count
        for start in range(0, count, size):
            yield [x[start : start + size] for x in inputs] if varies else inputs
            done += size
