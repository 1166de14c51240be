"""Write one attention operator out as products and a softmax, where a method needs to see the probabilities."""

import math
from dataclasses import replace

import torch
from torch.fx import GraphModule

from .attention import Site
from .builder import Builder, aten


def written_out(graph: GraphModule, site: Site) -> Site:
    """The site with its probabilities as a node [..., N, N]; the model's function is unchanged to float32 rounding.

    softmax(q kᵀ · scale + mask) v, as torch defines the operator; a boolean mask says which keys are seen.
    """
    if site.probabilities is not None:
        return site
    node = site.node
    build = Builder(graph, node, site.layer, chooses=False)
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = 1.0 / math.sqrt(int(site.query.meta["val"].shape[-1]))
    turned = build.call(aten.transpose.int, site.key, -2, -1)
    scores = build.call(aten.mul.Tensor, build.call(aten.matmul.default, site.query, turned), scale)
    if site.mask is not None and site.mask.meta["val"].dtype == torch.bool:
        scores = build.call(aten.where.ScalarOther, site.mask, scores, torch.finfo(torch.float32).min)
    elif site.mask is not None:
        scores = build.call(aten.add.Tensor, scores, site.mask)
    probabilities = build.call(aten.softmax.int, scores, -1)
    product = build.call(aten.matmul.default, probabilities, site.value)
    node.replace_all_uses_with(product)
    product.meta["layer"] = node.meta.get("layer", product.name)
    graph.graph.erase_node(node)
    return replace(site, node=probabilities, probabilities=probabilities)
