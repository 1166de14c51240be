"""Merge the tokens that are most alike into one, weighted by how many each stands for (ToMe, arXiv 2210.09461).

The tokens behind the protected ones are split in turns into sets A and B; each token of A finds the token of B whose
key is most like its own (cosine, mean over heads), and those with the best match are merged into it (section 3).
Attention behind adds the logarithm of a token's size to its scores (proportional attention, equation 1), and means over
tokens weigh them by size. Models pre-trained by masking do better with `proportional` off (section 4.2).

All is comparisons and products, in either form: no scatter. The tokens keep their order.
"""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from ...errors import CalibrationError
from ..attention import Site
from ..builder import Builder, aten
from ..selection import Reduction, multiplied, rank
from ..sizes import ATTENDED, SIZE
from . import Request
from .zero_tprune import similarity


class ToMe:
    attention = False
    defaults: ClassVar[dict[str, Any]] = {"proportional": True}

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        gone = site.tokens - request.keep
        sources = (site.tokens - request.protected + 1) // 2
        if gone > sources:
            raise CalibrationError(
                f"merging can remove at most half of the tokens behind a block: {sources} of {site.tokens} here, not "
                f"{gone}. Keep more, or merge behind several blocks."
            )
        size = request.planes.get(SIZE) or build.constant("token_sizes", torch.ones(1, site.tokens))
        groups = grouped(build, site, gone, request.protected)
        merged = Merged(build, groups, size, request.keep)
        request.planes[SIZE] = size
        if request.options["proportional"]:
            request.planes[ATTENDED] = size
        return merged


def grouped(build: Builder, site: Site, gone: int, protected: int) -> Node:
    """Which tokens make which, float32 [B, N - gone, N] of ones and zeros; every column has a single one."""
    tokens = site.tokens
    places = torch.arange(tokens)
    source = (places >= protected) & ((places - protected) % 2 == 0)
    target = (places >= protected) & ~source
    pairs = build.constant("pairs", source[:, None] & target[None, :])
    likeness = build.call(aten.where.ScalarOther, pairs, similarity(build, site), -2.0)
    best = build.call(aten.amax.default, likeness, [-1], True)
    # of equal targets the first, found by counting down
    down = build.constant("places_left", (tokens - places).float().view(1, 1, tokens))
    hit = build.call(aten.where.ScalarOther, build.call(aten.ge.Tensor, likeness, best), down, 0.0)
    first = build.call(aten.eq.Tensor, hit, build.call(aten.amax.default, hit, [-1], True))
    score = build.call(
        aten.where.ScalarOther, build.constant("sources", source), build.call(aten.squeeze.dim, best, -1), -3.0
    )
    goes = build.call(aten.lt.Scalar, rank(build, score, 0), float(gone))
    column = build.call(aten.unsqueeze.default, goes, 2)
    first = build.call(aten.to.dtype, first, torch.float32)  # a choice of booleans has no kernel in ONNX Runtime
    becomes = build.call(aten.where.self, column, first, build.constant("itself", torch.eye(tokens)))
    return build.call(
        aten.matmul.default, _rows(build, goes, tokens, gone), build.call(aten.transpose.int, becomes, 1, 2)
    )


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
    """Tokens as means of those they were made of, weighted by size."""

    def __init__(self, build: Builder, groups: Node, size: Node, count: int) -> None:
        self.groups, self.count = groups, count
        weights = build.call(aten.mul.Tensor, groups, build.call(aten.unsqueeze.default, size, 1))
        total = build.call(aten.sum.dim_IntList, weights, [-1], True)
        self.size = build.call(aten.squeeze.dim, total, -1)
        self.weights = build.call(aten.div.Tensor, weights, total)

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


METHOD = ToMe()
