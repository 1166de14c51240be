"""Write one attention operator out as products and a softmax, or one row of it, where a method needs to see it."""

import math
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from .attention import Site, probabilities
from .builder import Builder, aten


def written_out(graph: GraphModule, site: Site) -> Site:
    """The site with its probabilities as a node [..., N, N]; the model's function is unchanged to float32 rounding.

    softmax(q kᵀ · scale + mask) v, as torch defines the operator; a boolean mask says which keys are seen.
    """
    if site.probabilities is not None:
        return site
    node = site.node
    build = Builder(graph, node, site.layer, chooses=False)
    made = _probabilities(build, site, site.query, site.mask)
    product = build.call(aten.matmul.default, made, site.value)
    node.replace_all_uses_with(product)
    product.meta["layer"] = node.meta.get("layer", product.name)
    graph.graph.erase_node(node)
    return replace(site, node=made, probabilities=made)


def class_attention(build: Builder, site: Site) -> Node:
    """The first token's attention to each token, mean over the heads [B, N].

    An attention that is one operator stays one, since runtimes have kernels for it: the row is computed beside it.
    """
    if site.probabilities is not None:
        return build.call(aten.mean.dim, build.call(aten.select.int, probabilities(site), -2, 0), [1])
    mask = site.mask
    if mask is not None and mask.meta["val"].dim() > 1 and int(mask.meta["val"].shape[-2]) > 1:
        mask = build.call(aten.slice.Tensor, mask, -2, 0, 1)
    query = build.call(aten.slice.Tensor, site.query, -2, 0, 1)
    return build.call(aten.mean.dim, _probabilities(build, site, query, mask), [1, 2])


def _probabilities(build: Builder, site: Site, query: Node, mask: Node | None) -> Node:
    scale = site.node.kwargs.get("scale")
    if scale is None:
        scale = 1.0 / math.sqrt(int(site.query.meta["val"].shape[-1]))
    turned = build.call(aten.transpose.int, site.key, -2, -1)
    scores = build.call(aten.mul.Tensor, build.call(aten.matmul.default, query, turned), scale)
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        scores = build.call(aten.where.ScalarOther, mask, scores, torch.finfo(torch.float32).min)
    elif mask is not None:
        scores = build.call(aten.add.Tensor, scores, mask)
    return build.call(aten.softmax.int, scores, -1)
