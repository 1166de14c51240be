"""Take the chosen tokens out of a value, in forms that suit different runtimes and give identical tokens.

Which tokens stay is a rank: how many tokens come before one, by a larger score or by an equal score and a lower index.
The form "rank" counts by comparison. "topk" sorts: the TopK of ONNX and of TFLite puts the lower index first among
equals, as a stable sort does. So ties are broken alike on every runtime.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.fx import GraphModule, Node

from ..errors import CalibrationError
from ..graph import constant, is_constant, kind
from .builder import Builder, aten

FORMS = ("topk", "rank")
# A mark in `meta` of a rank: the tokens in the order of their ranks, int64 [B, N], where they were sorted.
ORDER = "order_of_tokens"
# Above every score; a float32 that half precision would read as infinity, which is above every score as well.
ABOVE_ALL = 3.0e38
# Operators whose result is finite whatever a user feeds, or no number that a token holds.
FINITE = frozenset(("linear", "conv", "layer_norm", "embedding", "softmax", "compare", "shape"))


class Reduction(Protocol):
    """How N tokens become `count`: `take` applies it to the axis `dim` of an operand (both counted from the last).

    `batch` is the axis that the batch has, or would have once the operand is broadcast; None where it has none.
    """

    count: int

    def take(self, build: Builder, operand: Node, dim: int, batch: int | None) -> Node: ...

    def carry(self, build: Builder, name: str, plane: Node) -> Node:
        """Reduce a plane [B, N] that travels with the tokens from cut to cut."""
        ...


class Fixed:
    """The same tokens for every sample: `indices` in rising order."""

    def __init__(self, indices: Sequence[int], tokens: int, form: str) -> None:
        self.indices, self.tokens, self.form = list(indices), tokens, form
        self.count = len(self.indices)

    def take(self, build: Builder, operand: Node, dim: int, batch: int | None) -> Node:
        chosen = torch.tensor(self.indices)
        if is_constant(operand):
            kept = constant(build.graph, operand).index_select(dim, chosen)
            return build.constant(f"{operand.target}_kept", kept)
        if self.form == "topk":
            return build.call(aten.index_select.default, operand, dim, build.constant("kept_tokens", chosen))
        rows = torch.nn.functional.one_hot(chosen, self.tokens).float()
        return multiplied(build, build.constant("kept_tokens", rows), operand, dim, None)

    def carry(self, build: Builder, name: str, plane: Node) -> Node:
        return self.take(build, plane, -1, -2)


class Ranked:
    """The `count` tokens of lowest rank, per sample, in the order of their rank; see `ranked`."""

    def __init__(self, count: int, index: Node | None, rows: Node | None) -> None:
        self.count, self.index, self.rows = count, index, rows

    def take(self, build: Builder, operand: Node, dim: int, batch: int | None) -> Node:
        if batch is None:
            raise CalibrationError(
                f"'{build.layer}': a table is read by the tokens where the batch is folded into another axis, so each "
                "sample cannot have tokens of its own there; use a fixed pattern (even)."
            )
        if self.index is not None:
            return gathered(build, operand, self.index, dim, batch)
        assert self.rows is not None
        return multiplied(build, self.rows, operand, dim, batch)

    def carry(self, build: Builder, name: str, plane: Node) -> Node:
        value = alike(build.graph, plane)
        if value is not None:
            return build.constant(f"{name}_kept", torch.full((1, self.count), value))
        return self.take(build, plane, -1, -2)


def alike(graph: GraphModule, plane: Node) -> float | None:
    """What every token of a constant float plane [1, N] has; None where they differ, or are computed."""
    if not is_constant(plane):
        return None
    values = constant(graph, plane)
    same = values.dtype.is_floating_point and bool((values == values.flatten()[0]).all())
    return float(values.flatten()[0]) if same else None


def rank(build: Builder, score: Node, protected: int) -> Node:
    """The rank of each token, float32 [B, N], for a score [B, N]; the first `protected` tokens come first.

    Where the runtime sorts, what a stable sort does to the indices, turned round by sorting these.
    """
    tokens = int(score.meta["val"].shape[1])
    places = torch.arange(tokens)
    if protected:
        first = build.constant("protected_tokens", places < protected)
        score = build.call(aten.where.ScalarSelf, first, ABOVE_ALL, score)
    if build.sorts:
        order = build.item(build.call(aten.sort.stable, score, stable=True, dim=-1, descending=True), 1)
        places = build.item(build.call(aten.sort.stable, order, stable=True, dim=-1, descending=False), 1)
        result = build.call(aten.to.dtype, places, torch.float32)
        result.meta[ORDER] = order
        return result
    mine, other = build.call(aten.unsqueeze.default, score, 2), build.call(aten.unsqueeze.default, score, 1)
    earlier = build.constant("earlier_tokens", places[None, :] < places[:, None])
    ahead = build.call(aten.gt.Tensor, other, mine)
    level = build.call(aten.ge.Tensor, other, mine)
    # "where" of two booleans would say it in one, but ONNX Runtime has no kernel for that
    before = build.call(aten.logical_or.default, ahead, build.call(aten.logical_and.default, level, earlier))
    return build.call(aten.sum.dim_IntList, build.call(aten.to.dtype, before, torch.float32), [-1])


def ranked(build: Builder, score: Node, keep: int, protected: int, form: str) -> Ranked:
    """Keep the `keep` tokens of highest score [B, N], the first `protected` among them, as "topk" or as "rank"."""
    return ranked_by(build, rank(build, score, protected), keep, form)


def ranked_by(build: Builder, places: Node, keep: int, form: str) -> Ranked:
    """Keep the tokens whose rank [B, N] is below `keep`."""
    if form == "topk":
        return between(build, places, 0, keep)
    wanted = build.constant("kept_ranks", torch.arange(keep, dtype=torch.float32).view(1, keep, 1))
    hit = build.call(aten.eq.Tensor, build.call(aten.unsqueeze.default, places, 1), wanted)
    return Ranked(keep, None, build.call(aten.to.dtype, hit, torch.float32))


def between(build: Builder, places: Node, first: int, end: int) -> Ranked:
    """The tokens of rank `first` to `end` - 1, where they were sorted (`rank`)."""
    return Ranked(end - first, build.call(aten.slice.Tensor, places.meta[ORDER], 1, first, end), None)


def gathered(build: Builder, operand: Node, index: Node, dim: int, batch: int) -> Node:
    """Gather `index` [B, K] along the axis `dim` of an operand that is broadcast over the batch."""
    operand = lengthened(build, operand, -batch)
    rank_ = operand.meta["val"].dim()
    shape = [1] * rank_
    shape[dim], shape[batch] = int(index.meta["val"].shape[1]), -1
    index = build.call(aten.reshape.default, index, shape)
    mine = operand.meta["val"].shape
    spread = [-1 if i in (dim % rank_, batch % rank_) else d for i, d in enumerate(mine)]
    index = build.call(aten.expand.default, index, spread)
    if isinstance(mine[batch], int) and mine[batch] == 1:
        length = index.meta["val"].shape[batch]
        size = length if isinstance(length, int) else build.call(aten.sym_size.int, index, batch % rank_)
        operand = build.call(aten.expand.default, operand, [size if i == batch % rank_ else -1 for i in range(rank_)])
    return build.call(aten.gather.default, operand, dim, index)


def multiplied(build: Builder, rows: Node, operand: Node, dim: int, batch: int | None) -> Node:
    """Multiply `rows` [B, K, N] (one per kept token; [K, N] where `batch` is None) into the axis `dim` of an operand.

    Exact: every row has a single one. What may be infinite (a mask of -inf) goes through a plane of its own, since
    0 · inf is no number; integers and booleans go through float32, exact below 2^24.
    """
    before = operand.meta["val"].dtype
    if not before.is_floating_point:
        operand = build.call(aten.to.dtype, operand, torch.float32)
    if before.is_floating_point and may_be_infinite(build.graph, operand):
        hidden = build.call(aten.eq.Scalar, operand, float("-inf"))
        clean = build.call(aten.where.ScalarSelf, hidden, 0.0, operand)
        apart = _product(build, rows, build.call(aten.to.dtype, hidden, torch.float32), dim, batch)
        kept = _product(build, rows, clean, dim, batch)
        return build.call(aten.where.ScalarSelf, build.call(aten.gt.Scalar, apart, 0.5), float("-inf"), kept)
    result = _product(build, rows, operand, dim, batch)
    if before == torch.bool:
        return build.call(aten.gt.Scalar, result, 0.5)
    return result if before.is_floating_point else build.call(aten.to.dtype, result, before)


def _product(build: Builder, rows: Node, operand: Node, dim: int, batch: int | None) -> Node:
    operand = lengthened(build, operand, max(-(batch or 0), 2))
    if dim == -2 and (batch is None or batch < -2):
        return build.call(aten.matmul.default, _aligned(build, rows, batch), operand)
    length = operand.meta["val"].dim()
    first = [] if batch is None else [batch % length]
    order = [*first, *(i for i in range(length) if i not in (*first, dim % length)), dim % length]
    if order != list(range(length)):
        operand = build.call(aten.permute.default, operand, order)
    if batch is None:
        made = build.call(aten.matmul.default, operand, build.call(aten.transpose.int, rows, -2, -1))
    else:
        made = _per_sample(build, operand, rows)
    back = [order.index(i) for i in range(length)]
    return made if back == list(range(length)) else build.call(aten.permute.default, made, back)


def _per_sample(build: Builder, operand: Node, rows: Node) -> Node:
    """[B, ..., N] times `rows` [B, K, N] the other way round, with the axes between folded into one."""
    rest = [int(d) for d in operand.meta["val"].shape[1:-1]]
    new, old = (int(d) for d in rows.meta["val"].shape[1:])
    if not rest or rest[-1] == 1:  # a product with single rows: LiteRT's converter miscounts the axes of some of these
        between = rest[:-1]
        single = build.call(aten.reshape.default, operand, [-1, *between, 1, old])
        rows = build.call(aten.reshape.default, rows, [-1, *(1 for _ in between), new, old])
        made = build.call(aten.sum.dim_IntList, build.call(aten.mul.Tensor, rows, single), [-1])
    else:
        flat = build.call(aten.reshape.default, operand, [-1, math.prod(rest), old])
        made = build.call(aten.matmul.default, flat, build.call(aten.transpose.int, rows, -2, -1))
    return build.call(aten.reshape.default, made, [-1, *rest, new])


def _aligned(build: Builder, rows: Node, batch: int | None) -> Node:
    """`rows` with the batch at the axis `batch`."""
    if batch is None or batch == -3:
        return rows
    _, one, other = rows.meta["val"].shape
    return build.call(aten.reshape.default, rows, [-1, *[1] * (-batch - 3), int(one), int(other)])


def lengthened(build: Builder, operand: Node, length: int) -> Node:
    """The operand with axes of 1 in front, until it has at least `length`."""
    while operand.meta["val"].dim() < length:
        operand = build.call(aten.unsqueeze.default, operand, 0)
    return operand


def may_be_infinite(graph: GraphModule, operand: Node) -> bool:
    """Whether -inf may be in a value: in a constant it is made of, as a written number, or in what a user feeds."""
    seen, stack = set(), [operand]
    while stack:
        node = stack.pop()
        if node in seen or kind(node) in FINITE:
            continue
        seen.add(node)
        if node.op == "placeholder" and node.meta["val"].dtype.is_floating_point:
            return True
        if is_constant(node):
            stored = constant(graph, node)
            if stored.dtype.is_floating_point and bool(stored.isinf().any()):
                return True
        if kind(node) == "log" or any(isinstance(a, float) and a in (float("inf"), float("-inf")) for a in node.args):
            return True
        stack += node.all_input_nodes
    return False
