"""Keep what a page rank on the attention graph finds, after dropping what is alike (Zero-TPrune, arXiv 2305.17328).

Stage I' votes once to order the tokens, stage S drops the tokens of the less important half that are most like one of
the other half (cosine of their keys), stage I ranks by weighted page rank and keeps the best (section 3). Heads whose
ranks vary too little or too much have no say (variance-based head filter); the others are joined by their root mean
square (emphasising informative region).

What goes is still counted, with what it is most like (`counted`); the paper does without.

The variance is that of ranks scaled to a mean of one: with a sum of one it could not exceed 1/N, and the paper's bounds
would leave no head at all. Where no head survives, all have a say.
"""

import math
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ...errors import CalibrationError
from ..attention import Site, probabilities, visible
from ..builder import Builder, aten
from ..counted import counted
from ..merging import similarity
from ..selection import Reduction, rank
from . import Request

# Rounds of voting by thirds of the model's depth. The paper votes 30 to 50 times in the first layers, whose ranks
# converge slowly, and once in the last; here each round is an operator in the file, so there are fewer.
ROUNDS = (8, 5, 1)


class ZeroTPrune:
    attention = True
    # similar: the share of what goes that stage S drops (the paper: 10 tokens per cut); rounds: None for ROUNDS by
    # depth; low, high: the head filter's bounds.
    defaults: ClassVar[dict[str, Any]] = {
        "similar": 0.75,
        "rounds": None,
        "low": 0.01,
        "high": 0.7,
        "proportional": True,
    }

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        options = request.options
        rounds = options["rounds"] or ROUNDS[min(int(request.depth * 3), 2)]
        similar = round(float(options["similar"]) * (site.tokens - request.keep))
        if not 0 <= options["similar"] <= 1 or rounds < 1:
            raise CalibrationError("zero_tprune needs at least one round of voting, and similar is a share from 0 to 1")
        seen = visible(build, site)
        alive = build.call(aten.to.dtype, seen, torch.float32) if seen is not None else None
        bounds = (float(options["low"]), float(options["high"]))
        if similar:
            first = page_rank(build, site, 1, request.protected, alive, bounds)
            gone = self._alike(build, site, first, similar, request.protected)
            left = build.call(aten.rsub.Scalar, build.call(aten.to.dtype, gone, torch.float32), 1.0)
            alive = left if alive is None else build.call(aten.mul.Tensor, alive, left)
        score = page_rank(build, site, rounds, request.protected, alive, bounds)
        if alive is not None:
            score = build.call(aten.where.ScalarOther, build.call(aten.gt.Scalar, alive, 0.5), score, -1.0)
        return counted(build, site, request, rank(build, score, request.protected), seen)

    def _alike(self, build: Builder, site: Site, score: Node, count: int, protected: int) -> Node:
        """The `count` tokens of the less important half that are most like one of the other half, bool [B, N]."""
        places = rank(build, score, protected)
        half = protected + math.ceil((site.tokens - protected) / 2)
        lower = build.call(aten.ge.Scalar, places, float(half))
        upper = build.call(
            aten.logical_and.default,
            build.call(aten.lt.Scalar, places, float(half)),
            build.call(aten.ge.Scalar, places, float(protected)),
        )
        likeness = similarity(build, site)
        likeness = build.call(aten.where.ScalarOther, build.call(aten.unsqueeze.default, upper, 1), likeness, -2.0)
        best = build.call(aten.amax.default, likeness, [-1])
        best = build.call(aten.where.ScalarOther, lower, best, -3.0)
        most = build.call(aten.lt.Scalar, rank(build, best, 0), float(count))
        return build.call(aten.logical_and.default, most, lower)


def page_rank(
    build: Builder, site: Site, rounds: int, protected: int, alive: Node | None, bounds: tuple[float, float]
) -> Node:
    """Weighted page rank of the tokens [B, N] with mean one: s <- s A per head, then heads joined.

    The class token starts with √N votes for each of the others'. `alive` [B, N] are the tokens that take part.
    """
    tokens = site.tokens
    start = torch.ones(tokens)
    start[:protected] = math.sqrt(tokens)
    votes = build.constant("votes", (start / start.mean()).view(1, 1, 1, tokens))
    table = probabilities(site)
    if alive is not None:
        alive = build.call(aten.unsqueeze.default, build.call(aten.unsqueeze.default, alive, 1), 1)
        votes = build.call(aten.mul.Tensor, alive, votes)
    for _ in range(rounds):
        votes = build.call(aten.matmul.default, votes, table)
        if alive is not None:
            votes = build.call(aten.mul.Tensor, votes, alive)
    mean = build.call(aten.clamp.default, build.call(aten.mean.dim, votes, [-1], True), 1e-12)
    votes = build.call(aten.squeeze.dim, build.call(aten.div.Tensor, votes, mean), 2)
    return _joined(build, votes, bounds)


def _joined(build: Builder, votes: Node, bounds: tuple[float, float]) -> Node:
    """Root mean square over the heads whose variance lies within the bounds [B, H, N] -> [B, N]."""
    off = build.call(aten.sub.Tensor, votes, 1.0)
    variance = build.call(aten.mean.dim, build.call(aten.mul.Tensor, off, off), [-1], True)
    says = build.call(
        aten.logical_and.default,
        build.call(aten.ge.Scalar, variance, bounds[0]),
        build.call(aten.le.Scalar, variance, bounds[1]),
    )
    weight = build.call(aten.to.dtype, says, torch.float32)
    count = build.call(aten.sum.dim_IntList, weight, [1], True)
    none = build.call(aten.to.dtype, build.call(aten.lt.Scalar, count, 0.5), torch.float32)
    weight = build.call(aten.add.Tensor, weight, none)
    squares = build.call(aten.mul.Tensor, build.call(aten.mul.Tensor, votes, votes), weight)
    total = build.call(aten.sum.dim_IntList, squares, [1])
    heads = build.call(aten.sum.dim_IntList, weight, [1])
    return build.call(aten.sqrt.default, build.call(aten.div.Tensor, total, heads))


METHOD = ZeroTPrune()
