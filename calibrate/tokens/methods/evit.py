"""Keep what the class token attends to; the rest may be fused into one token (EViT, arXiv 2202.07800, section 3).

The score of a token is the class token's attention to it, mean over the heads. With `fuse`, one more token carries the
sum of what was dropped, weighted by attention (equation 3 of the paper, weights made to sum to one so that the fused
token has the size of a token).

The paper trains; without training, attention behind the cut would see one token where there were many. With
`proportional` it counts the fused token as often as it stands for one (ToMe, arXiv 2210.09461, equation 1).
"""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from ...errors import CalibrationError
from ..attention import Site
from ..builder import Builder, aten
from ..merging import sized
from ..selection import Ranked, Reduction, alike, between, multiplied, rank, ranked, ranked_by
from ..sizes import ATTENDED, SIZE
from ..written_out import class_attention
from . import Request


class Evit:
    attention = False
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
        size = sized(build, site, request)
        if request.form == "topk":
            gone = between(build, places, request.keep - 1, site.tokens)
            return WithRest(best, share(build, gone.carry(build, "scores", score)), size, gone)
        dropped = build.call(aten.ge.Scalar, places, float(request.keep - 1))
        return WithRest(best, rest(build, score, dropped), size, dropped)


# Attention below this in sum is no rest worth a token; half precision would read less as zero, and divide by it.
LEAST = 2.0**-14


def rest(build: Builder, score: Node, gone: Node) -> Node:
    """Weights [B, 1, N] of the tokens that are `gone`: their scores, summing to one."""
    return share(build, build.call(aten.where.ScalarOther, gone, score, 0.0))


def share(build: Builder, weight: Node) -> Node:
    """Weights [B, N] made to sum to one, [B, 1, N]."""
    total = build.call(aten.sum.dim_IntList, weight, [-1], True)
    part = build.call(aten.div.Tensor, weight, build.call(aten.clamp.default, total, LEAST))
    return build.call(aten.unsqueeze.default, part, 1)


class WithRest:
    """The best tokens, and behind them one that is the weighted sum of the rest.

    `weights` [B, 1, N] are of all tokens where `gone` says which are dropped, bool [B, N]; of those alone where `gone`
    takes them. `size` [B or 1, N]: what every token counts as.
    """

    def __init__(self, best: Ranked, weights: Node, size: Node, gone: Ranked | Node) -> None:
        self.best, self.weights, self.size, self.gone, self.count = best, weights, size, gone, best.count + 1

    def take(self, build: Builder, operand: Node, dim: int, batch: int | None) -> Node:
        if operand.meta["val"].dim() != 3 or (dim, batch) != (-2, -3):
            raise CalibrationError(
                f"'{build.layer}' holds something for each token's place, and the fused token has no place: set fuse "
                "to false."
            )
        kept = self.best.take(build, operand, dim, batch)
        if isinstance(self.gone, Ranked):
            operand = self.gone.take(build, operand, dim, batch)
        fused = multiplied(build, self.weights, operand, dim, batch)
        return build.call(aten.cat.default, [kept, fused], 1)

    def carry(self, build: Builder, name: str, plane: Node) -> Node:
        if name in (SIZE, ATTENDED):
            return self._sizes(build)
        raise CalibrationError(f"evit cannot fuse tokens whose {name} an earlier cut follows: set fuse to false")

    def _sizes(self, build: Builder) -> Node:
        """What the tokens that stay count as, the fused one as all that it stands for: a constant where it can be."""
        each, tokens = alike(build.graph, self.size), int(self.size.meta["val"].shape[-1])
        if each is not None:
            sizes = torch.full((1, self.count), each)
            sizes[0, -1] = each * (tokens - self.best.count)
            return build.constant("token_sizes_kept", sizes)
        if isinstance(self.gone, Ranked):
            dropped = self.gone.carry(build, SIZE, self.size)
        else:
            dropped = build.call(aten.where.ScalarOther, self.gone, self.size, 0.0)
        count = build.call(aten.sum.dim_IntList, dropped, [-1], True)
        return build.call(aten.cat.default, [self.best.carry(build, SIZE, self.size), count], 1)


METHOD = Evit()
