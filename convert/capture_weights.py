"""The trained numbers of a captured graph: how many there are, and whether they are numbers."""

import torch
from torch.fx import GraphModule, Node

from calibrate.graph import constant, is_constant, kind
from convert.errors import TightfitError

NORMS = ("batch_norm", "layer_norm", "group_norm", "rms_norm")
MULTIPLYING = ("conv", "conv_transpose", "linear", "matmul", "embedding", "prelu", *NORMS)


def count_parameters(graph: GraphModule) -> int:
    """Elements of all nn.Parameters that the graph reads; buffers (running statistics, masks) don't count."""
    return sum(
        constant(graph, n).numel() for n in graph.graph.nodes if is_constant(n) and n.meta.get("parameter") and n.users
    )


def refuse_not_finite(graph: GraphModule, model: str) -> None:
    """Raise TightfitError naming the tensors with NaN, or with Inf where a layer multiplies by them.

    A buffer may hold -inf: attention masks do.
    """
    bad = [(n, what) for n in graph.graph.nodes if is_constant(n) and n.users and (what := _not_finite(graph, n))]
    if bad:
        names = ", ".join(f"'{n.meta.get('fqn', n.target)}' ({what})" for n, what in bad[:4])
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise TightfitError(
            f"{model} has weights that are no numbers: {names}{more}. The training diverged or the file is damaged; "
            "use an earlier checkpoint."
        )


def _not_finite(graph: GraphModule, node: Node) -> str:
    stored = constant(graph, node)
    if not stored.is_floating_point() or bool(torch.isfinite(stored).all()):
        return ""
    nan = int(torch.isnan(stored).sum())
    if nan:
        return f"{nan} NaN of {stored.numel()}"
    multiplied = node.meta.get("parameter") or any(kind(u) in MULTIPLYING for u in node.users)
    return f"{int(torch.isinf(stored).sum())} Inf of {stored.numel()}" if multiplied else ""
