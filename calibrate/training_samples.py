"""Calibration samples for steps that train: some to learn from, some held out to judge by, and minibatches of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from .graph import run
from .steps import Context, first

# Every fourth part of the samples is held out: trained on the rest, judged on these.
HELD_PART = 4
BATCH = 32
# What the widest tensor of all samples together may take, in bytes; a walk keeps a few such tensors for each graph.
MOST_BYTES = 256 * 2**20
TOO_FEW = "there are too few samples to hold some out to judge by: give at least two batches"


@dataclass(frozen=True)
class Samples:
    """Batches of the graph's positional inputs: `all` = those to learn from, then those held out.

    `rowwise`: the batch may vary, so that minibatches can mix samples of all batches. `classes`: for every batch its
    class indices, int64 [N], where the context has labels.
    """

    all: list[list[Tensor]]
    held_from: int
    rowwise: bool
    classes: list[Tensor] | None = None

    @classmethod
    def of(cls, graph: GraphModule, context: Context, limit: int, part: int = HELD_PART) -> "Samples | None":
        """Up to `limit` samples, fewer where the graph's tensors are large; None when none can be held out."""
        limit = min(limit, _affordable(graph))
        rowwise = _varies(graph)
        batches = first(context, limit)
        if not rowwise:
            held = max(1, len(batches) // part)
            classes = _split(context.labels, batches)
            return cls(batches, len(batches) - held, False, classes) if len(batches) > 1 else None
        rows = [torch.cat(column)[:limit] for column in zip(*batches, strict=True)]
        held = max(1, len(rows[0]) // part) if rows else 0
        if not rows or len(rows[0]) - held < 1:
            return None
        learn = list(zip(*(r[:-held].split(BATCH) for r in rows), strict=True))
        judge = list(zip(*(r[-held:].split(BATCH) for r in rows), strict=True))
        ready = [list(b) for b in [*learn, *judge]]
        return cls(ready, len(learn), True, _split(context.labels, ready))

    @property
    def train(self) -> list[list[Tensor]]:
        """The batches to learn from."""
        return self.all[: self.held_from]

    @property
    def held(self) -> list[list[Tensor]]:
        """The batches held out."""
        return self.all[self.held_from :]

    @property
    def train_classes(self) -> list[Tensor | None]:
        """The class indices of every batch to learn from; None where there are none."""
        return self._of_all[: self.held_from]

    @property
    def held_classes(self) -> list[Tensor | None]:
        """The class indices of every batch held out."""
        return self._of_all[self.held_from :]

    @property
    def _of_all(self) -> list[Tensor | None]:
        return [None] * len(self.all) if self.classes is None else [*self.classes]


class Rows:
    """Minibatches drawn from recorded batches; a batch is a list of tensors (or None), alike in every batch."""

    def __init__(self, batches: list[list[Tensor | None]], rowwise: bool) -> None:
        count = [len(b[0]) if isinstance(b[0], Tensor) and b[0].dim() else 1 for b in batches]
        alike = all(t is None or (t.dim() and len(t) == n) for b, n in zip(batches, count, strict=True) for t in b)
        self._batches = batches
        self._whole: list[Tensor | None] | None = None
        if rowwise and alike:
            columns = zip(*batches, strict=True)
            self._whole = [torch.cat(list(c)) if c[0] is not None else None for c in columns]
        targets = [b[-1] for b in batches if b[-1] is not None]
        power = sum(float(t.double().square().sum()) for t in targets) / max(1, sum(t.numel() for t in targets))
        self.spread = math.sqrt(power) or 1.0  # root mean square of the last column

    def minibatch(self, size: int, generator: torch.Generator) -> list[Tensor | None]:
        """`size` samples of all batches at random, or one whole batch where samples cannot be mixed."""
        if self._whole is None:
            return self._batches[int(torch.randint(len(self._batches), (), generator=generator))]
        count = len(next(t for t in self._whole if t is not None))
        chosen = torch.randperm(count, generator=generator)[:size]
        return [t[chosen] if t is not None else None for t in self._whole]


def output_db(reference: GraphModule, graph: GraphModule, batches: Iterable[list[Tensor]]) -> float:
    """Signal to noise, dB, of the floating point outputs of `graph` against `reference`; -inf where not finite."""
    error = power = 0.0
    for batch in batches:
        for wanted, got in zip(run(reference, batch), run(graph, batch), strict=True):
            if wanted.is_floating_point():
                error += float((got - wanted).double().square().sum())
                power += float(wanted.double().square().sum())
    if error == 0:
        return math.inf
    return 10 * math.log10(power / error) if power > 0 and math.isfinite(error) else -math.inf


def _split(labels: Tensor | None, batches: list[list[Tensor]]) -> list[Tensor] | None:
    """The labels of each batch; batches hold the samples in the order of the labels, maybe not all of them."""
    if labels is None:
        return None
    sizes = [len(b[0]) for b in batches]
    return list(labels[: sum(sizes)].split(sizes))


def _varies(graph: GraphModule) -> bool:
    """Whether every input of the graph has a batch axis of any length."""
    inputs = [n.meta.get("val") for n in graph.graph.nodes if n.op == "placeholder"]
    return all(isinstance(v, Tensor) and v.dim() > 0 and not isinstance(v.shape[0], int) for v in inputs)


def _affordable(graph: GraphModule) -> int:
    """How many samples' widest tensors fit in `MOST_BYTES`."""
    widest = 1
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor):
            sizes = [int(s) for s in value.shape[1:] if isinstance(s, int)]
            widest = max(widest, math.prod(sizes) * 4)
    return max(2, MOST_BYTES // widest)
