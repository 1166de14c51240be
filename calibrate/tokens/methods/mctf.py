"""Fuse tokens that are alike, tell little and stand for few (MCTF, multi-criteria token fusion, arXiv 2403.10030).

The edge between tokens i and j is ((cos + 1) / 2)^(1/τs) · (aᵢ aⱼ)^(1/τi) · (zᵢ zⱼ)^(1/τz), with the cosine of their
keys, a = 1 / the attention a token receives (mean over heads and queries) and z = 1 / its size (section 3.1 of the
paper; it divides a and z by their largest, which scales all edges alike and changes no choice). A fused token is the
mean of its parts weighted by attention times size. Matching may go `both_ways`: half of the tokens to remove go from
set A into B, then the others from B, with all they hold, into what is left of A, by the same edges. The paper does so
in training; without it a small ViT stayed closer to itself with A to B alone, so that is the default here.

An approximation: the paper takes the attention of the layer ahead, computed before its tokens are fused. Tokens here go
between attention and MLP, where the layer ahead has no input yet, so the attention is that of the block just left. The
paper's re-use of the pooled attention is replaced by proportional attention (log size added to the scores), which is
the same where fused tokens are alike.

All but the ranks is comparisons and products, in either form. The tokens keep their order.
"""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from ...errors import CalibrationError
from ..attention import Site
from ..builder import Builder, aten
from ..merging import alternating, grouped, matched, merged, refuse_masked, removed, similarity, sized
from ..selection import Reduction
from ..sizes import SIZE
from . import Request
from .importance import received

# Attention received is one on average; less than this counts as this, which is no zero in half precision.
LEAST = 2.0**-14


class MCTF:
    attention = True
    halves = True
    # similarity, information, size: the temperatures τ of the three criteria, 0 leaves one out; both_ways: see above;
    # attentive: weigh the parts of a token by attention as well as by size.
    defaults: ClassVar[dict[str, Any]] = {
        "similarity": 1.0,
        "information": 20.0,
        "size": 40.0,
        "both_ways": False,
        "attentive": True,
        "proportional": True,
    }

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        refuse_masked(site)
        gone, options = removed(site, request), request.options
        if min(float(options[name]) for name in ("similarity", "information", "size")) < 0:
            raise CalibrationError("mctf needs temperatures of 0 or more: similarity, information and size")
        first = SIZE not in request.planes
        size = sized(build, site, request)
        attention = build.call(aten.clamp.default, received(build, site, None), LEAST)
        edges = _edges(build, site, attention, None if first else size, options)
        groups = (
            _both_ways(build, edges, gone, request) if options["both_ways"] else _one_way(build, edges, gone, request)
        )
        weight = build.call(aten.mul.Tensor, attention, size) if options["attentive"] else None
        return merged(build, groups, size, weight)


def _edges(build: Builder, site: Site, attention: Node, size: Node | None, options: Any) -> Node:
    """How much two tokens should be fused, [B, N, N], not negative; sizes that are all one are left out."""
    if options["similarity"]:
        near = build.call(aten.mul.Tensor, build.call(aten.add.Tensor, similarity(build, site), 1.0), 0.5)
        near = build.call(aten.clamp.default, near, 0.0)  # a cosine may round to below -1
        edges = _power(build, near, 1.0 / float(options["similarity"]))
    else:
        edges = build.constant("alike", torch.ones(1, site.tokens, site.tokens))
    for plane, temperature in ((attention, options["information"]), (size, options["size"])):
        if plane is None or not temperature:
            continue
        factor = _power(build, plane, -1.0 / float(temperature))
        edges = build.call(aten.mul.Tensor, edges, build.call(aten.unsqueeze.default, factor, 2))
        edges = build.call(aten.mul.Tensor, edges, build.call(aten.unsqueeze.default, factor, 1))
    return edges


def _power(build: Builder, value: Node, exponent: float) -> Node:
    return value if exponent == 1.0 else build.call(aten.pow.Tensor_Scalar, value, exponent)


def _one_way(build: Builder, edges: Node, gone: int, request: Request) -> Node:
    tokens = int(edges.meta["val"].shape[-1])
    return grouped(build, *matched(build, edges, *alternating(tokens, request.protected), gone), gone)


def _both_ways(build: Builder, edges: Node, gone: int, request: Request) -> Node:
    """Half of the tokens go from A into B; then, of B, the others with all they hold into those of A that are left."""
    tokens = int(edges.meta["val"].shape[-1])
    a, b = alternating(tokens, request.protected)
    half = gone // 2
    goes, becomes = matched(build, edges, a, b, half)
    taken = build.call(aten.unsqueeze.default, goes, 1)
    left = build.call(aten.where.ScalarSelf, taken, -1.5, edges)
    goes_back, becomes_back = matched(build, left, b, a, gone - half)
    either = build.call(aten.logical_or.default, goes, goes_back)
    return grouped(build, either, build.call(aten.matmul.default, becomes, becomes_back), gone)


METHOD = MCTF()
