"""Which inputs are a text's tokens, and which of their places are padding.

What a layer computes at padding is masked out later, so a layer must not be fitted to it: half of the places of short
sentences would outvote the words.
"""

from torch import Tensor
from torch.fx import GraphModule, Node


def ids(graph: GraphModule) -> list[Node]:
    """The inputs [B, N] that are looked up in a table: the ids of a text's tokens, and what is beside them."""
    return [n for n in graph.graph.nodes if n.op == "placeholder" and _looked_up(n)]


def _looked_up(node: Node) -> bool:
    value = node.meta["val"]
    read = any(str(u.target).startswith("aten.embedding") and u.args[1] is node for u in node.users)
    return read and value.dim() == 2 and not value.dtype.is_floating_point


def visible(graph: GraphModule, inputs: list[Tensor]) -> Tensor | None:
    """The places that are no padding, bool [B, N], for one batch of the graph's inputs; None where no input says so.

    Such an input has the ids' shape, is not looked up itself, holds ones and zeros alone, and a one in every row.
    """
    texts = ids(graph)
    if not texts:
        return None
    names = [n for n in graph.graph.nodes if n.op == "placeholder"]
    shape = inputs[names.index(texts[0])].shape
    for node, value in zip(names, inputs, strict=True):
        if node in texts or value.shape != shape or not bool(((value == 0) | (value == 1)).all()):
            continue
        if bool(value.bool().any(1).all()):
            return value.bool()
    return None
