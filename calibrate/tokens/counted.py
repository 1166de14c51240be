"""Pruned tokens that are still counted: each that goes is counted with the one of those that stay it is most like.

Without training, attention behind a cut would give the class token, and whatever stays, the weight of all that is gone,
evenly. With sizes it gives it to what was alike (the counting of ToMe, arXiv 2210.09461, equation 1, without merging).
"""

import torch
from torch.fx import Node

from .attention import Site
from .builder import Builder, aten
from .merging import first_of_best, similarity, sized
from .methods import Request
from .selection import Ranked, Reduction, ranked_by
from .sizes import ATTENDED, SIZE


class Counted:
    """The tokens of lowest rank, each with how many it is counted as."""

    def __init__(self, best: Ranked, size: Node) -> None:
        self.best, self.size, self.count = best, size, best.count

    def take(self, build: Builder, operand: Node, dim: int, batch: int | None) -> Node:
        return self.best.take(build, operand, dim, batch)

    def carry(self, build: Builder, name: str, plane: Node) -> Node:
        return self.best.carry(build, name, self.size if name in (SIZE, ATTENDED) else plane)


def counted(build: Builder, site: Site, request: Request, places: Node, seen: Node | None) -> Reduction:
    """Keep the tokens whose rank `places` [B, N] is below `request.keep`, and count the others with them.

    `seen` bool [B, N] are no padding: padding is counted with nothing. The protected tokens stay single.
    """
    best = ranked_by(build, places, request.keep, request.form)
    if not request.options["proportional"] or request.keep == site.tokens:
        return best
    size = sized(build, site, request)
    stays = build.call(aten.lt.Scalar, places, float(request.keep))
    free = build.constant("unprotected", torch.arange(site.tokens) >= request.protected)
    takes = build.call(aten.logical_and.default, stays, free)
    if seen is not None:
        takes = build.call(aten.logical_and.default, takes, seen)
    goes = build.call(aten.logical_not.default, stays)
    if seen is not None:
        goes = build.call(aten.logical_and.default, goes, seen)
    like = build.call(
        aten.where.ScalarOther, build.call(aten.unsqueeze.default, takes, 1), similarity(build, site), -2.0
    )
    first = build.call(aten.to.dtype, first_of_best(build, like), torch.float32)
    moved = build.call(aten.where.ScalarOther, goes, size, 0.0)
    gained = build.call(aten.matmul.default, build.call(aten.unsqueeze.default, moved, 1), first)
    return Counted(best, build.call(aten.add.Tensor, size, build.call(aten.squeeze.dim, gained, 1)))
