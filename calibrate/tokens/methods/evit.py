"""Keep what the class token attends to; the rest may be fused into one token (EViT, arXiv 2202.07800, section 3).

The score of a token is the class token's attention to it, mean over the heads. With `fuse`, one more token carries the
sum of what was dropped, weighted by attention (equation 3 of the paper, weights made to sum to one so that the fused
token has the size of a token).

The paper trains; without training, attention behind the cut would see one token where there were many. With
`proportional` it counts the fused token as often as it stands for one (ToMe, arXiv 2210.09461, equation 1).
"""

from typing import Any, ClassVar

from torch.fx import Node

from ...errors import CalibrationError
from ..attention import Site, probabilities
from ..builder import Builder, aten
from ..merging import sized
from ..selection import Ranked, Reduction, multiplied, rank, ranked, ranked_by
from ..sizes import ATTENDED, SIZE
from . import Request


class Evit:
    attention = True
    defaults: ClassVar[dict[str, Any]] = {"fuse": True, "proportional": True}

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        if not request.protected:
            raise CalibrationError("evit ranks tokens by the attention of a class token, and this model has none")
        score = class_attention(build, site)
        if not request.options["fuse"] or request.keep == site.tokens:
            return ranked(build, score, request.keep, request.protected, request.form)
        if request.keep < request.protected + 2:
            raise CalibrationError(
                f"evit keeps {request.keep} tokens, and one of them is the fused rest: keep more, or set fuse to false."
            )
        places = rank(build, score, request.protected)
        best = ranked_by(build, places, request.keep - 1, request.form)
        gone = build.call(aten.ge.Scalar, places, float(request.keep - 1))
        size = sized(build, site, request)
        count = build.call(aten.sum.dim_IntList, build.call(aten.where.ScalarOther, gone, size, 0.0), [-1], True)
        return WithRest(best, rest(build, score, gone), count)


def class_attention(build: Builder, site: Site) -> Node:
    """The first token's attention to each token, mean over the heads [B, N]."""
    row = build.call(aten.select.int, probabilities(site), -2, 0)
    return build.call(aten.mean.dim, row, [1])


# Attention below this in sum is no rest worth a token; half precision would read less as zero, and divide by it.
LEAST = 2.0**-14


def rest(build: Builder, score: Node, gone: Node) -> Node:
    """Weights [B, 1, N] of the tokens that are `gone`: their scores, summing to one."""
    weight = build.call(aten.where.ScalarOther, gone, score, 0.0)
    total = build.call(aten.sum.dim_IntList, weight, [-1], True)
    share = build.call(aten.div.Tensor, weight, build.call(aten.clamp.default, total, LEAST))
    return build.call(aten.unsqueeze.default, share, 1)


class WithRest:
    """The best tokens, and behind them one that is the weighted sum of the rest."""

    def __init__(self, best: Ranked, weights: Node, size: Node) -> None:
        self.best, self.weights, self.size, self.count = best, weights, size, best.count + 1

    def take(self, build: Builder, operand: Node, dim: int, batch: int | None) -> Node:
        if operand.meta["val"].dim() != 3 or (dim, batch) != (-2, -3):
            raise CalibrationError(
                f"'{build.layer}' holds something for each token's place, and the fused token has no place: set fuse "
                "to false."
            )
        kept = self.best.take(build, operand, dim, batch)
        fused = multiplied(build, self.weights, operand, dim, batch)
        return build.call(aten.cat.default, [kept, fused], 1)

    def carry(self, build: Builder, name: str, plane: Node) -> Node:
        if name in (SIZE, ATTENDED):
            return build.call(aten.cat.default, [self.best.carry(build, name, plane), self.size], 1)
        raise CalibrationError(f"evit cannot fuse tokens whose {name} an earlier cut follows: set fuse to false")


METHOD = Evit()
