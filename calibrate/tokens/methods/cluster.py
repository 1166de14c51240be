"""Cluster tokens and put all of them back where a model needs every one (Expediting ViT, arXiv 2210.01035).

The tokens behind the protected ones are clustered by k-means on the residual stream, as the paper does: a token of a
cluster is the mean of its members, weighted by size; the first centroids are the means of runs of neighbouring tokens.
Attention behind counts clusters by their size (`proportional`, as ToMe does). Where the model's output has a value for
every token, they are put back behind the last block, or behind the block `until`: each token of a cluster gets what
the blocks between added to the cluster, and keeps its own `deviation` from the mean it went into. Models that pool
their tokens or read a class token alone run on clusters to their end.

Two departures from the paper, since the rest of the model is not trained for this: a token belongs to one cluster and
not to several in part, so that tokens that are the same are put back exactly; and the paper puts back the clusters
themselves (`deviation` off), whose error on a small ViT's last tokens was half as large again.

All is comparisons and products, in either form, so it lowers to every runtime.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ...errors import CalibrationError
from ..attention import Site
from ..builder import Builder, aten
from ..merging import Merged, first_of_best, refuse_masked, sized
from ..selection import ABOVE_ALL, Reduction
from . import Request

# The size of a cluster that no token is in: attention leaves it out, and its logarithm is finite in half precision.
EMPTY = 1e-6
# The least that is divided by, and no zero in half precision.
LEAST = 2.0**-14


class Cluster:
    attention = False
    reconstructs = True
    # iterations: rounds of k-means; until: the block behind which tokens are put back, None for the last, if needed.
    defaults: ClassVar[dict[str, Any]] = {"iterations": 3, "deviation": True, "proportional": True, "until": None}

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        refuse_masked(site)
        rounds = int(request.options["iterations"])
        if rounds < 1:
            raise CalibrationError("cluster needs at least one round of k-means: set iterations to 1 or more")
        size = sized(build, site, request)
        if request.keep == site.tokens:
            return Clustered(build.constant("itself", torch.eye(site.tokens).unsqueeze(0)), size, request.keep)
        runs = neighbours(site.tokens, request.keep, request.protected)
        belongs, weights, together = _clustered(build, site.residual, size, runs, request.protected, rounds)
        whole = site.residual if request.options["deviation"] else None
        return Clustered(weights, together, request.keep, belongs, whole)


def neighbours(tokens: int, clusters: int, protected: int) -> Tensor:
    """[clusters, tokens] of ones and zeros: the protected tokens alone, the others in runs of nearly equal length."""
    rest, runs = tokens - protected, clusters - protected
    which = protected + torch.arange(rest) * runs // rest
    return torch.nn.functional.one_hot(torch.cat([torch.arange(protected), which]), clusters).T.float()


def _clustered(
    build: Builder, tokens: Node, size: Node, runs: Tensor, protected: int, rounds: int
) -> tuple[Node, Node, Node]:
    """(which cluster each token belongs to [B, N, K], what makes each cluster [B, K, N], sizes of clusters [B, K])."""
    own = torch.eye(runs.shape[1], runs.shape[0]).bool()
    allowed = own.clone()
    allowed[protected:, protected:] = True
    may = build.constant("clusters_of_tokens", allowed)
    first, _ = means(build, build.constant("runs", runs.unsqueeze(0)), size)
    weights = first
    for _ in range(rounds):
        centroids = build.call(aten.matmul.default, weights, tokens)
        near = nearness(build, tokens, centroids)
        near = build.call(aten.where.ScalarOther, may, near, -ABOVE_ALL)
        belongs = build.call(aten.to.dtype, first_of_best(build, near), torch.float32)
        made, total = means(build, build.call(aten.transpose.int, belongs, 1, 2), size)
        # a cluster that nobody is near to stays where it began
        weights = build.call(aten.where.self, build.call(aten.lt.Scalar, total, 0.5), first, made)
    together = build.call(aten.clamp.default, build.call(aten.squeeze.dim, total, -1), EMPTY)
    return belongs, weights, together


def means(build: Builder, groups: Node, size: Node) -> tuple[Node, Node]:
    """Weights [B, K, N] of the mean over each group by size, and each group's size [B, K, 1]; 0 where one is empty."""
    parts = build.call(aten.mul.Tensor, groups, build.call(aten.unsqueeze.default, size, 1))
    total = build.call(aten.sum.dim_IntList, parts, [-1], True)
    return build.call(aten.div.Tensor, parts, build.call(aten.clamp.default, total, LEAST)), total


def nearness(build: Builder, tokens: Node, centroids: Node) -> Node:
    """(x · c - |c|² / 2) / C [B, N, K]: highest where |x - c| is lowest; divided by C, sums fit half precision."""
    scaled = build.call(aten.mul.Tensor, centroids, 1.0 / int(centroids.meta["val"].shape[-1]))
    products = build.call(aten.matmul.default, tokens, build.call(aten.transpose.int, scaled, 1, 2))
    squares = build.call(aten.sum.dim_IntList, build.call(aten.mul.Tensor, centroids, scaled), [-1])
    half = build.call(aten.unsqueeze.default, build.call(aten.mul.Tensor, squares, 0.5), 1)
    return build.call(aten.sub.Tensor, products, half)


class Clustered(Merged):
    """Tokens as clusters; `belongs` [B, N, K] says which (None: each is its own), `whole` [B, N, C] are the tokens."""

    def __init__(
        self, weights: Node, size: Node, count: int, belongs: Node | None = None, whole: Node | None = None
    ) -> None:
        super().__init__(weights, size, count)
        self.belongs, self.whole = belongs, whole

    def restored(self, build: Builder, operand: Node, kept: Node | None) -> Node:
        if self.belongs is None:
            return operand
        if kept is None or self.whole is None:
            return build.call(aten.matmul.default, self.belongs, operand)
        added = build.call(aten.sub.Tensor, operand, kept)
        return build.call(aten.add.Tensor, self.whole, build.call(aten.matmul.default, self.belongs, added))


METHOD = Cluster()
