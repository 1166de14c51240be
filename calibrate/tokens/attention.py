"""Find the self-attention of each encoder block, written as one operator or by hand, and the residual add after it.

Tokens are cut there, between attention and MLP (ToMe, arXiv 2210.09461, section 3): the attention before has seen all
tokens, and its scores say which matter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import CalibrationError
from ..graph import constant, is_constant, kind, layer_name
from .builder import Builder, aten

# What may stand between the product of queries and keys and their softmax: scale, mask, bias, shape of the heads.
BETWEEN = frozenset(("mul", "div", "add", "where", "reshape", "cast", "expand", "clamp"))
# What is added to the score of a key that is not to be seen is below this; no learned bias is.
HIDDEN = -1000.0
# A mark in `meta` of what a cut made of a mask or a table.
REDUCED = "reduced_by_a_cut"
# What a layer's sum passes on its way to a mask: all that is computed without trained layers.
TRAINED = frozenset(("linear", "conv", "embedding", "layer_norm", "attention", "softmax"))


@dataclass(frozen=True)
class Site:
    """The attention of block `block`: `query`, `key`, `value` are [..., N, d], heads in front of N.

    `node` is the attention operator or the softmax; `probabilities` [..., N, N] is None where they are not written
    out; `mask` is what is added to (or chooses among) the scores, `hides` that a true there hides.
    `residual` [B, N, C] is the sum after the attention.
    """

    block: int
    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    probabilities: Node | None
    residual: Node
    hides: bool = False

    @property
    def layer(self) -> str:
        return layer_name(self.node)

    @property
    def tokens(self) -> int:
        return int(self.residual.meta["val"].shape[1])


def probabilities(site: Site) -> Node:
    """The probabilities [B, H, N, N] of an attention that is written out."""
    found = site.probabilities
    assert found is not None
    if found.meta["val"].dim() != 4:
        raise CalibrationError(
            f"the attention of '{site.layer}' has its heads folded into the batch, so scores cannot be averaged over "
            "heads: use a method that does not look at attention (even)."
        )
    return found


def visible(build: Builder, site: Site) -> Node | None:
    """Which tokens are no padding, bool [B or 1, N]: those that the first token may attend to; None without a mask."""
    if site.mask is None:
        return None
    row = site.mask
    while row.meta["val"].dim() < 4:
        row = build.call(aten.unsqueeze.default, row, 0)
    row = build.call(aten.select.int, build.call(aten.select.int, row, 1, 0), 1, 0)
    if row.meta["val"].dtype == torch.bool:
        return build.call(aten.logical_not.default, row) if site.hides else row
    return build.call(aten.gt.Scalar, row, HIDDEN)


def sites(graph: GraphModule) -> list[Site]:
    """The self-attention of every block, in order.

    Raises CalibrationError when there is none, when it is causal, or when it does not see all tokens (windows).
    """
    found: list[Site] = []
    for node in graph.graph.nodes:
        parts = _operator(node) if kind(node) == "attention" else _by_hand(node) if kind(node) == "softmax" else None
        if parts is None:
            continue
        query, key, value, mask, hides, table = parts
        if tuple(query.meta["val"].shape[-2:-1]) != tuple(key.meta["val"].shape[-2:-1]):
            continue  # cross-attention: its keys are no tokens of this stream
        _refuse_causal(graph, node, mask)
        residual = _residual(graph, node, int(key.meta["val"].shape[-2]))
        found.append(Site(len(found), node, query, key, value, mask, table, residual, hides))
    if not found:
        raise CalibrationError(
            "token pruning needs a transformer encoder, and this model has no self-attention (a convolutional network "
            "has no tokens to drop): leave token pruning out of the recipe."
        )
    return found


# query, key, value, mask, whether a true in the mask hides, probabilities
Parts = tuple[Node, Node, Node, Node | None, bool, Node | None]


def _operator(node: Node) -> Parts:
    query, key, value = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    return query, key, value, mask if isinstance(mask, Node) else None, False, None


def _by_hand(softmax: Node) -> Parts | None:
    """softmax(q kᵀ ...) v; None for a softmax that is no attention."""
    rank = softmax.meta["val"].dim()
    if rank < 3 or softmax.args[1] not in (-1, rank - 1):
        return None
    scores, mask, hides = _scores(softmax.args[0])
    last = _product(softmax)
    if scores is None or last is None:
        return None
    query, keys = scores.args[:2]
    value = last.args[1]
    key = _untransposed(keys)
    if key is None or not isinstance(query, Node) or not isinstance(value, Node):
        return None
    return query, key, value, mask, hides, softmax


def _scores(source: object) -> tuple[Node | None, Node | None, bool]:
    """The product of queries and keys behind scale, bias and mask; the mask nearest the softmax; whether true hides."""
    mask: Node | None = None
    hides = False
    while isinstance(source, Node) and kind(source) in BETWEEN:
        tensors = [a for a in source.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
        inner = [a for a in tensors if _leads_to_product(a)]
        if len(inner) != 1:
            return None, None, False
        others = [a for a in tensors if a is not inner[0]]
        if mask is None and kind(source) in ("add", "where") and others:
            chooses = [a for a in others if a.meta["val"].dtype == torch.bool]
            mask = (chooses or others)[0]
            hides = bool(chooses) and source.args[1] is not inner[0]  # where(seen, scores, ...) is the other sense
        source = inner[0]
    return (source, mask, hides) if isinstance(source, Node) and kind(source) == "matmul" else (None, None, False)


def _leads_to_product(node: Node) -> bool:
    """Whether the scores come in through `node`; a mask that a cut reduced (by a product) is none."""
    while kind(node) in BETWEEN and REDUCED not in node.meta:
        inner = [a for a in node.all_input_nodes if kind(a) == "matmul" or kind(a) in BETWEEN]
        if len(inner) > 1:
            return any(_leads_to_product(a) for a in inner)
        if not inner:
            return False
        node = inner[0]
    return kind(node) == "matmul" and REDUCED not in node.meta


def _product(softmax: Node) -> Node | None:
    """The product of probabilities and values, behind at most a change of shape or dtype."""
    for user in softmax.users:
        if kind(user) == "matmul" and user.args[0] is softmax:
            return user
        if kind(user) in ("cast", "reshape", "expand"):
            found = _product(user)
            if found is not None:
                return found
    return None


def _untransposed(keys: object) -> Node | None:
    """The k of kᵀ, when the last operator is the one that turned it round; None where it is something else."""
    if not isinstance(keys, Node) or kind(keys) != "transpose":
        return None
    source, rank = keys.args[0], keys.meta["val"].dim()
    if keys.target is aten.transpose.int:
        turned = {int(d) % rank for d in keys.args[1:3]} == {rank - 1, rank - 2}
        return source if turned and isinstance(source, Node) else None
    return None


def _residual(graph: GraphModule, node: Node, tokens: int) -> Node:
    """The first sum behind `node` that adds what was before it: [B, tokens, C]."""
    behind = {node}
    for later in graph.graph.nodes:
        reached = [a for a in later.all_input_nodes if a in behind]
        if not reached:
            continue
        behind.add(later)
        skips = [a for a in later.all_input_nodes if a not in behind and not is_constant(a)]
        if kind(later) == "add" and skips and later.op == "call_function":
            shape = later.meta["val"].shape
            if _same_shape(later, skips[0]) and _same_shape(later, reached[0]):
                _refuse_windows(node, shape, tokens)
                return later
    raise CalibrationError(
        f"no residual sum follows the attention of '{layer_name(node)}', so there is no place to drop tokens: only "
        "encoders with a residual stream can be pruned."
    )


def _same_shape(one: Node, other: Node) -> bool:
    a, b = one.meta["val"].shape, other.meta["val"].shape
    return len(a) == len(b) and all(str(x) == str(y) for x, y in zip(a, b, strict=True))


def _refuse_windows(node: Node, shape: torch.Size, tokens: int) -> None:
    if len(shape) == 3 and isinstance(shape[1], int) and shape[1] == tokens:
        return
    if len(shape) == 3 and isinstance(shape[0], int) and shape[0] == tokens:
        raise CalibrationError(
            f"'{layer_name(node)}' has its tokens on the first axis; build the model with the batch first."
        )
    raise CalibrationError(
        f"the attention of '{layer_name(node)}' sees {tokens} tokens of a stream of {tuple(map(str, shape))}: it is "
        "windowed (as in Swin), and windows need all their tokens. Only encoders whose attention sees all tokens can "
        "be pruned."
    )


def _refuse_causal(graph: GraphModule, node: Node, mask: Node | None) -> None:
    causal = kind(node) == "attention" and (node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))
    if causal or (mask is not None and _hides_what_follows(graph, mask)):
        raise CalibrationError(
            f"the attention of '{layer_name(node)}' is causal: a causal decoder reads each token with those before it "
            "only, and its output belongs to the last. Token pruning is for encoders."
        )


def _hides_what_follows(graph: GraphModule, mask: Node) -> bool:
    """Whether a triangular constant is among what the mask is made of."""
    seen, stack = set(), [mask]
    while stack:
        node = stack.pop()
        if node in seen or kind(node) in TRAINED:
            continue
        seen.add(node)
        if str(node.target).startswith(("aten.tril", "aten.triu")):
            return True
        if is_constant(node) and triangular(constant(graph, node)):
            return True
        stack += node.all_input_nodes
    return False


def triangular(table: Tensor) -> bool:
    """Whether [..., N, N] says that no token sees a later one: bool in either sense, or a float added to scores."""
    if table.dim() < 2 or table.shape[-1] != table.shape[-2] or table.shape[-1] < 2:
        return False
    square = table.reshape(-1, *table.shape[-2:])[0]
    upper = torch.ones_like(square, dtype=torch.bool).triu(1)
    later, earlier = square[upper], square[~upper]
    if table.dtype == torch.bool:
        return bool((later != earlier[0]).all() and (earlier == earlier[0]).all())
    return bool((later < HIDDEN).all() and (earlier == 0).all())
