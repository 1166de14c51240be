"""Tokens that stand for several: attention and means over tokens count them as often as they stand for.

With sizes s, softmax(q kᵀ + log s) v is what attention over the tokens before merging would be if merged ones were
alike (ToMe, arXiv 2210.09461, equation 1); a mean over tokens becomes one weighted by size.
"""

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from .attention import Site
from .axes import batch_axis, holds_tokens
from .axis import Trail, refuse
from .builder import Builder, aten

# Names of the planes [B, N]: how many tokens each stands for; the same where attention is to count them.
SIZE, ATTENDED = "sizes", "attended sizes"


def attended(graph: GraphModule, sites: Sequence[Site], cuts: Sequence[tuple[int, Node | None]]) -> None:
    """Add log size to the scores of every attention; `cuts` are (block, sizes behind it or None), in order."""
    for site in sites:
        sizes = [plane for block, plane in cuts if block < site.block]
        if sizes and sizes[-1] is not None:
            _attended(graph, site, sizes[-1])


def _attended(graph: GraphModule, site: Site, size: Node) -> None:
    build = Builder(graph, site.node, f"{site.layer}.sizes")
    more = build.call(aten.log.default, size)
    more = build.call(aten.unsqueeze.default, build.call(aten.unsqueeze.default, more, 1), 1)
    if site.probabilities is not None:
        scores = build.call(aten.add.Tensor, site.node.args[0], more)
        site.node.args = (scores, *site.node.args[1:])
        return
    mask = site.mask
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        more = build.call(aten.where.ScalarOther, mask, more, torch.finfo(torch.float32).min)
    elif mask is not None:
        more = build.call(aten.add.Tensor, mask, more)
    if len(site.node.args) > 3:
        site.node.update_arg(3, more)
    else:
        site.node.update_kwarg("attn_mask", more)


def weighted(graph: GraphModule, trail: Trail, size: Node) -> None:
    """Weigh the tokens by size [B, N] in every mean and sum over them on the trail."""
    for node in trail.pooled:
        if str(node.target).startswith(("aten.amax", "aten.amin")):
            continue
        source = node.args[0]
        assert isinstance(source, Node)
        axes = trail.axes[source]
        batch = batch_axis(axes)
        if batch is None:
            refuse(node, "it pools tokens where the batch is folded into another axis, so sizes cannot weigh them")
        (at,) = [i for i, axis in enumerate(axes) if holds_tokens(axis)]
        build = Builder(graph, node, f"{node.name}.sizes")
        weight = size
        if axes[at][0].skipped:
            weight = build.call(aten.slice.Tensor, size, 1, axes[at][0].skipped, 2**63 - 1)
        if "sum" not in str(node.target):
            mean = build.call(aten.mean.dim, weight, [1], True)
            weight = build.call(aten.div.Tensor, weight, mean)
        shape = [1] * len(axes)
        shape[at], shape[batch] = axes[at][0].size, -1
        weight = build.call(aten.reshape.default, weight, shape)
        node.args = (build.call(aten.mul.Tensor, source, weight), *node.args[1:])
