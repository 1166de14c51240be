"""What merging methods share: which tokens are alike, who goes into whom, and tokens as means of those they stand for.

All but the ranks (`selection.rank`) is comparisons and products, so it lowers to every runtime: no gather, no scatter.
"""

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import CalibrationError
from .attention import Site
from .builder import Builder, aten
from .methods import Request
from .selection import multiplied, rank
from .sizes import ATTENDED, SIZE

# Cosines are compared in steps of this. Tokens that are the same have a cosine of 1 but for rounding, which differs
# from runtime to runtime: without steps it, and not the tokens' order, would say which of several such pairs is first.
ALIKE = 2.0**-14


def similarity(build: Builder, site: Site) -> Node:
    """Cosine of the tokens' keys, mean over the heads [B, N, N], in steps of ALIKE."""
    key = build.call(aten.mean.dim, site.key, [1])
    square = build.call(aten.sum.dim_IntList, build.call(aten.mul.Tensor, key, key), [-1], True)
    length = build.call(aten.sqrt.default, build.call(aten.clamp.default, square, 1e-12))
    unit = build.call(aten.div.Tensor, key, length)
    cosine = build.call(aten.matmul.default, unit, build.call(aten.transpose.int, unit, 1, 2))
    steps = build.call(aten.round.default, build.call(aten.mul.Tensor, cosine, 1.0 / ALIKE))
    return build.call(aten.mul.Tensor, steps, ALIKE)


def removed(site: Site, request: Request) -> int:
    """How many tokens are to be merged away. Raises CalibrationError where they are more than half."""
    gone = site.tokens - request.keep
    sources = (site.tokens - request.protected + 1) // 2
    if gone > sources:
        raise CalibrationError(
            f"merging can remove at most half of the tokens behind a block: {sources} of {site.tokens} here, not "
            f"{gone}. Keep more, or merge behind several blocks."
        )
    return gone


def refuse_masked(site: Site) -> None:
    """Raise CalibrationError where the attention has a mask: padding must not be merged into what is seen."""
    if site.mask is not None:
        raise CalibrationError(
            f"the attention of '{site.layer}' has a mask or a table of biases, and a merged token has no place in it: "
            "use a method that prunes (importance for text)."
        )


def sized(build: Builder, site: Site, request: Request) -> Node:
    """How many tokens each stands for [B or 1, N], followed from here on; attention counts them if `proportional`."""
    size = request.planes.get(SIZE) or build.constant("token_sizes", torch.ones(1, site.tokens))
    request.planes[SIZE] = size
    if request.options["proportional"]:
        request.planes[ATTENDED] = size
    return size


def alternating(tokens: int, protected: int) -> tuple[Tensor, Tensor]:
    """The sets A and B, bool [N] each: the tokens behind the protected ones in turns."""
    places = torch.arange(tokens)
    source = (places >= protected) & ((places - protected) % 2 == 0)
    return source, (places >= protected) & ~source


def first_of_best(build: Builder, score: Node) -> Node:
    """Where each row of a score [B, R, N] is highest, the first of equals: bool, one true in every row."""
    columns = int(score.meta["val"].shape[-1])
    best = build.call(aten.amax.default, score, [-1], True)
    # of equals the first, found by counting down
    down = build.constant("places_left", (columns - torch.arange(columns)).float().view(1, 1, columns))
    hit = build.call(aten.where.ScalarOther, build.call(aten.ge.Tensor, score, best), down, 0.0)
    return build.call(aten.eq.Tensor, hit, build.call(aten.amax.default, hit, [-1], True))


def matched(build: Builder, edges: Node, source: Tensor, target: Tensor, gone: int) -> tuple[Node, Node]:
    """The `gone` sources whose best edge to a target is highest go into that target; `edges` [B, N, N] are above -2.

    (which tokens go, bool [B, N]; what each token becomes, float32 [B, N, N], a single one in every row).
    """
    likeness, places = likeliest(build, edges, source, target)
    return joined(build, likeness, places, gone)


def likeliest(build: Builder, edges: Node, source: Tensor, target: Tensor) -> tuple[Node, Node]:
    """(`edges` [B, N, N] from sources to targets, -2 elsewhere; the rank [B, N] of each token by its best one)."""
    pairs = build.constant("pairs", source[:, None] & target[None, :])
    likeness = build.call(aten.where.ScalarOther, pairs, edges, -2.0)
    best = build.call(aten.squeeze.dim, build.call(aten.amax.default, likeness, [-1], True), -1)
    score = build.call(aten.where.ScalarOther, build.constant("sources", source), best, -3.0)
    return likeness, rank(build, score, 0)


def joined(build: Builder, likeness: Node, places: Node, gone: int) -> tuple[Node, Node]:
    """What `matched` returns, for what `likeliest` did."""
    goes = build.call(aten.lt.Scalar, places, float(gone))
    column = build.call(aten.unsqueeze.default, goes, 2)
    first = build.call(aten.to.dtype, first_of_best(build, likeness), torch.float32)
    # a choice of booleans has no kernel in ONNX Runtime
    tokens = int(likeness.meta["val"].shape[-1])
    return goes, build.call(aten.where.self, column, first, build.constant("itself", torch.eye(tokens)))


def grouped(build: Builder, goes: Node, becomes: Node, gone: int) -> Node:
    """Which tokens make which, float32 [B, N - gone, N] of ones and zeros; every column has a single one."""
    tokens = int(becomes.meta["val"].shape[-1])
    turned = build.call(aten.transpose.int, becomes, 1, 2)
    return build.call(aten.matmul.default, _rows(build, goes, tokens, gone), turned)


def _rows(build: Builder, goes: Node, tokens: int, gone: int) -> Node:
    """One row per token that stays, in their order: float32 [B, N - gone, N]."""
    stays = build.call(aten.rsub.Scalar, build.call(aten.to.dtype, goes, torch.float32), 1.0)
    before = build.constant("tokens_before", torch.ones(tokens, tokens).triu(1))
    place = build.call(aten.matmul.default, stays, before)
    wanted = build.constant("kept_places", torch.arange(tokens - gone, dtype=torch.float32).view(1, -1, 1))
    hit = build.call(aten.eq.Tensor, build.call(aten.unsqueeze.default, place, 1), wanted)
    hit = build.call(aten.to.dtype, hit, torch.float32)
    return build.call(aten.mul.Tensor, hit, build.call(aten.unsqueeze.default, stays, 1))


class Merged:
    """Tokens as means of those they were made of: `weights` [B, count, N], rows summing to one; `size` [B, count]."""

    def __init__(self, weights: Node, size: Node, count: int) -> None:
        self.weights, self.size, self.count = weights, size, count

    def take(self, build: Builder, operand: Node, dim: int, batch: int | None) -> Node:
        value = operand.meta["val"]
        if value.dim() > 3 or (dim, batch) != (-2, -3) or not value.dtype.is_floating_point:
            raise CalibrationError(
                f"'{build.layer}' is a mask or a table of pairs of tokens, and a merged token has no place in it: "
                "use a method that prunes (importance for text)."
            )
        return multiplied(build, self.weights, operand, dim, batch)

    def carry(self, build: Builder, name: str, plane: Node) -> Node:
        if name in (SIZE, ATTENDED):
            return self.size
        raise CalibrationError(f"tokens cannot be merged once '{name}' are followed: use one method for all blocks")


def merged(build: Builder, groups: Node, size: Node, weight: Node | None = None) -> Merged:
    """Means over `groups` [B, K, N] of ones and zeros, weighted by `weight` [B, N], or by size where there is none."""
    parts = build.call(aten.mul.Tensor, groups, build.call(aten.unsqueeze.default, size, 1))
    total = build.call(aten.sum.dim_IntList, parts, [-1], True)
    together = build.call(aten.squeeze.dim, total, -1)
    if weight is not None:
        parts = build.call(aten.mul.Tensor, groups, build.call(aten.unsqueeze.default, weight, 1))
        total = build.call(aten.sum.dim_IntList, parts, [-1], True)
    return Merged(build.call(aten.div.Tensor, parts, total), together, int(groups.meta["val"].shape[1]))
