"""Super tokens: what all tokens are associated with in part (super token sampling, arXiv 2211.11167).

The super tokens behind the protected ones begin as means of runs of neighbouring tokens. Each token is associated with
all of them by a softmax over how near they are, on tokens that a layer norm has brought to one scale;
a super token is the mean of all tokens weighted by association and size, and its size is the sum of both,
so that sizes sum to the number of tokens. The association puts the tokens back where a model needs every one, as
`cluster` does: each gets its share of what the blocks between added to the super tokens.

What differs from the paper: it trains a new architecture, whose every block samples super tokens, lets them attend to
each other and maps them back, and whose tokens see the nine super tokens around them on a grid. Here a captured encoder
is cut, all blocks behind run on the super tokens, and a token may join any of them, since a captured graph knows no
grid. Nearness is that of distances and not of products, which without training would favour those of large norm.
`sharpness` multiplies distances in the softmax, a factor for each channel: it begins close to hard clusters, works so
untrained, and is what `recover` trains. On a small ViT it stayed a little behind `cluster`, trained or not.

All is products, comparisons and a softmax, in either form.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ...errors import CalibrationError
from ..attention import Site
from ..builder import Builder, aten
from ..merging import refuse_masked, sized
from ..selection import ABOVE_ALL, Reduction
from ..trained import trained_constant
from . import Request
from .cluster import EMPTY, LEAST, Clustered, means, neighbours


class SuperTokens:
    attention = False
    reconstructs = True
    trains = True
    # sharpness: how hard the association begins; deviation, proportional, until: as in `cluster`.
    defaults: ClassVar[dict[str, Any]] = {"sharpness": 64.0, "deviation": True, "proportional": True, "until": None}

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        refuse_masked(site)
        sharpness = float(request.options["sharpness"])
        if sharpness <= 0:
            raise CalibrationError("super_tokens needs a sharpness above 0: 64 is close to hard clusters")
        size = sized(build, site, request)
        if request.keep == site.tokens:
            return Clustered(build.constant("itself", torch.eye(site.tokens).unsqueeze(0)), size, request.keep)
        runs = neighbours(site.tokens, request.keep, request.protected)
        first, _ = means(build, build.constant("runs", runs.unsqueeze(0)), size)
        belongs = _associated(build, site.residual, first, request.protected, sharpness)
        weights, total = means(build, build.call(aten.transpose.int, belongs, 1, 2), size)
        # one that nothing is near to is what it began as
        weights = build.call(aten.where.self, build.call(aten.lt.Scalar, total, LEAST), first, weights)
        together = build.call(aten.clamp.default, build.call(aten.squeeze.dim, total, -1), EMPTY)
        whole = site.residual if request.options["deviation"] else None
        return Clustered(weights, together, request.keep, belongs, whole)


def _associated(build: Builder, tokens: Node, first: Node, protected: int, sharpness: float) -> Node:
    """How much of each token [B, N, K] is in each super token, rows summing to one; the protected ones are their own.

    The logits are those of -s |x - c|² / (2 C), less what is the same for every c.
    """
    count, width = int(tokens.meta["val"].shape[1]), int(tokens.meta["val"].shape[-1])
    x = build.call(aten.layer_norm.default, tokens, [width])
    centroids = build.call(aten.matmul.default, first, x)
    scale = trained_constant(build, "sharpness", torch.full((1, 1, width), sharpness))
    scaled = build.call(aten.mul.Tensor, build.call(aten.mul.Tensor, centroids, 1.0 / width), scale)
    products = build.call(aten.matmul.default, x, build.call(aten.transpose.int, scaled, 1, 2))
    squares = build.call(aten.sum.dim_IntList, build.call(aten.mul.Tensor, centroids, scaled), [-1])
    half = build.call(aten.unsqueeze.default, build.call(aten.mul.Tensor, squares, 0.5), 1)
    logits = build.call(aten.sub.Tensor, products, half)
    may = build.constant("super_tokens_of_tokens", _allowed(count, int(first.meta["val"].shape[1]), protected))
    return build.call(aten.softmax.int, build.call(aten.where.ScalarOther, may, logits, -ABOVE_ALL), -1)


def _allowed(tokens: int, count: int, protected: int) -> Tensor:
    """Which super tokens [N, K] a token may be in: a protected one in its own alone, the others in all behind those."""
    own = torch.eye(tokens, count).bool()
    own[protected:] = False
    own[protected:, protected:] = True
    return own


METHOD = SuperTokens()
