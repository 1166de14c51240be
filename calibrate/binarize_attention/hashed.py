"""Hashed linear attention: similarity counts equal bits of two hash codes, and no softmax is left (EcoFormer, arXiv
2209.09004)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from .. import signs
from ..attention_bits import Place, Seen, Unfit, channel_means, values
from ..attention_parts import masks_of
from ..errors import CalibrationError
from ..tokens.attention import HIDDEN, Site, visible
from ..tokens.builder import Builder, aten

ROUNDS = 50
DAMPING = 1e-4


class Hashed:
    """(h (Kᵀ V) + (b + 1) sum V) / (h sum K + M (b + 1)) for the codes h of a query and K of the keys, b signs each.

    Every similarity b + 1 + h k is at least 1, so nothing divides by zero. A sum over keys leaves padding out. The
    paper learns hash functions of kernel features and shares queries with keys; here each has directions of its own,
    in closed form: those that carry the scores (a singular value decomposition between both under their covariances),
    turned by one rotation so that signs lose least (ITQ). Scores with a bias or a causal mask have no such form.
    """

    defaults: ClassVar[dict[str, Any]] = {"bits": 16}

    def write(self, place: Place, options: Mapping[str, Any]) -> Node:
        """See `AttentionBinarizer.write`. Raises CalibrationError for a number of bits that is none."""
        a, bits = place.attention, options["bits"]
        if not isinstance(bits, int) or isinstance(bits, bool) or bits < 1:
            raise CalibrationError(f"hash codes have one bit or more, not {bits!r}")
        masks = masks_of(a)
        _refuse(place, [mask for mask, _ in masks])
        found = directions(place.samples, min(bits, int(a.query.meta["val"].shape[-1])), place.seed)
        build = place.build(a.output)
        query = _codes(place, build, a.query, found.query, found.query_threshold, turned=False)
        keys = _codes(place, build, a.keys, found.keys, found.keys_threshold, turned=True)
        return _linear(build, query, keys, a.value, _visible(build, place, masks))


def _refuse(place: Place, masks: list[Node]) -> None:
    """Raises Unfit where scores are changed by more than one mask of padding."""
    if len(masks) > 1:
        raise Unfit("more than one mask or bias is on its scores, and hashed attention has room for one of padding")
    if masks and place.attention.query.meta["val"].dim() != 4:
        raise Unfit("its heads lie in the batch and it has a mask: hashed attention cannot tell whose padding it is")
    for (mask,) in values(place.graph, place.batches, masks) if masks else ():
        if mask.is_floating_point() and bool(((mask > HIDDEN) & (mask != 0)).any()):
            raise Unfit("a bias is added to its scores, which hashed attention has no form for")
        wide = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape)
        if not bool((wide == wide[:, :1, :1]).all()):
            raise Unfit("its mask differs between queries or heads, and hashed attention sums keys once for all")


def _visible(build: Builder, place: Place, masks: list[tuple[Node, bool]]) -> Node | None:
    """1 for keys that are no padding and 0 for others, float32 [B or 1, 1, M, 1]; None without a mask."""
    if not masks:
        return None
    (mask, hides), a = masks[0], place.attention
    row = visible(build, Site(0, a.softmax, a.query, a.keys, a.value, mask, None, a.softmax, hides))
    for axis in (1, 3):
        row = build.call(aten.unsqueeze.default, row, axis)
    one, none = (build.constant(n, torch.full((1, 1, 1, 1), v)) for n, v in (("seen", 1.0), ("padding", 0.0)))
    return build.call(aten.where.self, row, one, none)


@dataclass(frozen=True)
class Directions:
    """Bits are x @ `query` >= `query_threshold`, and likewise of keys: float32 [H, d, b] and [H, b]."""

    query: Tensor
    keys: Tensor
    query_threshold: Tensor
    keys_threshold: Tensor


def directions(samples: Sequence[Seen], bits: int, seed: int) -> Directions:
    """Directions whose products are the scores as far as so many can be, turned to where signs lose least."""
    means, roots = [], []
    for rows in ([(s.query, s.asking) for s in samples], [(s.keys, s.seen) for s in samples]):
        mean = channel_means(rows)
        means.append(mean)
        roots.append(_root(rows, mean))
    u, size, v = torch.linalg.svd(roots[0].mT @ roots[1])
    half = size[:, :bits].clamp(min=1e-12).sqrt().unsqueeze(-2)
    left = torch.linalg.solve_triangular(roots[0].mT, u[..., :bits], upper=True) * half
    right = torch.linalg.solve_triangular(roots[1].mT, v.mT[..., :bits], upper=True) * half
    apart = [_picked(s.query, s.asking, means[0], left) for s in samples]
    apart += [_picked(s.keys, s.seen, means[1], right) for s in samples]
    turn = torch.stack([_rotation([x[h] for x in apart], seed) for h in range(left.shape[0])])
    left, right = left @ turn, right @ turn
    return Directions(
        left.float(),
        right.float(),
        (means[0].unsqueeze(-2) @ left).squeeze(-2).float(),
        (means[1].unsqueeze(-2) @ right).squeeze(-2).float(),
    )


def _root(rows: Sequence[tuple[Tensor, Tensor]], mean: Tensor) -> Tensor:
    """The lower root of the covariance, float64 [H, d, d]."""
    size = mean.shape[-1]
    total, count = torch.zeros(*mean.shape, size).double(), torch.zeros(mean.shape[0]).double()
    for x, m in rows:
        apart = (x.double() - mean.unsqueeze(1)) * m.unsqueeze(-1)
        total, count = total + (apart.mT @ apart).sum(0), count + m.sum((0, 2))
    moments = total / count.clamp(min=1).view(-1, 1, 1)
    level = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    return torch.linalg.cholesky(moments + torch.eye(size).double() * (DAMPING * level).view(-1, 1, 1))


def _picked(x: Tensor, counts: Tensor, mean: Tensor, along: Tensor) -> list[Tensor]:
    """For each head, the rows that count along its directions: [n, b]."""
    made = (x.double() - mean.unsqueeze(1)) @ along
    return [made[:, h][counts[:, h]] for h in range(made.shape[1])]


def _rotation(rows: list[Tensor], seed: int) -> Tensor:
    """ITQ: the rotation under which rows lie nearest to corners of a cube; float64 [b, b]."""
    z = torch.cat(rows)
    start = torch.randn(z.shape[1], z.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn, _ = torch.linalg.qr(start)
    for _ in range(ROUNDS):
        u, _, v = torch.linalg.svd(z.mT @ torch.where(z @ turn >= 0, 1.0, -1.0).double())
        turn = u @ v
    return turn


def _codes(place: Place, build: Builder, source: Node, along: Tensor, bound: Tensor, turned: bool) -> Node:
    """Signs +1 and -1 of [..., N, b], or `turned` [..., b, M]; their scale is held, as the similarity wants it."""
    constant = build.constant("directions", place.shaped(along.mT if turned else along))
    pair = (constant, source) if turned else (source, constant)
    made = build.call(aten.matmul.default, *pair)
    threshold = place.shaped(bound.unsqueeze(2 if turned else 1))
    found, back = signs.write(build, made, threshold, place.codes)
    found.quantize.meta[signs.HELD] = True
    return back


def _linear(build: Builder, query: Node, keys: Node, value: Node, seen: Node | None) -> Node:
    """The output [..., N, e] from codes [..., N, b] and [..., b, M]; `seen` [..., M, 1] is 1 and 0."""
    least = float(int(query.meta["val"].shape[-1]) + 1)
    if seen is not None:
        value = build.call(aten.mul.Tensor, value, seen)
        count = build.call(aten.mul.Tensor, build.call(aten.sum.dim_IntList, seen, [-2], True), least)
        codes = build.call(aten.matmul.default, keys, seen)
    else:
        codes, count = build.call(aten.sum.dim_IntList, keys, [-1], True), least * int(keys.meta["val"].shape[-1])
    total = build.call(aten.mul.Tensor, build.call(aten.sum.dim_IntList, value, [-2], True), least)
    above = build.call(aten.matmul.default, query, build.call(aten.matmul.default, keys, value))
    below = build.call(aten.add.Tensor, build.call(aten.matmul.default, query, codes), count)
    return build.call(aten.div.Tensor, build.call(aten.add.Tensor, above, total), below)


METHOD = Hashed()
