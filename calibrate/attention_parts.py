"""Find every attention of a graph, quantized or not, as two products with a softmax between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import qdq
from .graph import is_constant, kind, layer_name
from .tokens.attention import BETWEEN, Site
from .tokens.builder import aten
from .tokens.written_out import written_out

# What may stand between the scores and their softmax, and between probabilities and their product with the values.
BEFORE = BETWEEN | {"qdq", "sub"}
BEHIND = frozenset(("cast", "reshape", "expand", "qdq"))
PRODUCTS = frozenset((aten.matmul.default, aten.bmm.default))


@dataclass(frozen=True)
class Attention:
    """`scores` = `query` @ `keys`; `probabilities` = softmax of them behind scale and mask; `output` = those @ `value`.

    query [..., N, d], keys [..., d, M], value [..., M, e], all float32; `probabilities` is what `output` reads, free of
    codes. `softmax` is the operator itself, `name` what people know it by.
    """

    name: str
    softmax: Node
    scores: Node
    probabilities: Node
    output: Node

    @property
    def query(self) -> Node:
        """[..., N, d]."""
        return _node(self.scores.args[0])

    @property
    def keys(self) -> Node:
        """[..., d, M]: turned round already."""
        return _node(self.scores.args[1])

    @property
    def value(self) -> Node:
        """[..., M, e]."""
        return _node(self.output.args[1])


def write_out(graph: GraphModule, refused: dict[str, str]) -> None:
    """Replace attention operators by products and a softmax; `refused` gets the reason for those that cannot be."""
    for node in [n for n in graph.graph.nodes if kind(n) == "attention"]:
        reason = _refusal(node)
        if reason is not None:
            refused[layer_name(node)] = reason
            continue
        query, key, value = (_node(a) for a in node.args[:3])
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        site = Site(0, node, query, key, value, mask if isinstance(mask, Node) else None, None, node)
        written_out(graph, site).node.meta["layer"] = site.layer


def _refusal(node: Node) -> str | None:
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    if causal:
        return "its causal mask is inside the operator: give the mask as a tensor (attn_mask)"
    heads = [tuple(map(str, _node(a).meta["val"].shape[:-2])) for a in node.args[:2]]
    return None if heads[0] == heads[1] else "its queries and keys have different numbers of heads"


def find(graph: GraphModule) -> Iterator[Attention]:
    """Every attention that is written out, in the order in which they are computed."""
    for node in graph.graph.nodes:
        rank = node.meta["val"].dim() if kind(node) == "softmax" else 0
        if rank < 3 or node.args[1] not in (-1, rank - 1):
            continue
        scores, output = _scores(node), _output(node)
        if scores is not None and output is not None:
            yield Attention(layer_name(node), node, scores, uncoded(_node(output.args[0])), output)


def float_between(attention: Attention) -> None:
    """Take the codes between scores and softmax away: their scale belongs to scores that were no sums of signs."""
    node = attention.softmax
    for source in _chain(node):
        if source.target is qdq.DEQUANTIZE:
            source.replace_all_uses_with(uncoded(source))


def masks_of(attention: Attention) -> list[tuple[Node, bool]]:
    """What is added to the scores, or chooses among them, with more than one number; and whether a true there hides."""
    chain, found = _chain(attention.softmax), []
    for node, inner in pairwise(chain):
        tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
        others = [a for a in tensors if a is not inner and a.meta["val"].dim() > 0]
        chooses = [a for a in others if a.meta["val"].dtype == torch.bool]
        if others:
            found.append(((chooses or others)[0], bool(chooses) and node.args[1] is not inner))
    return found


def uncoded(node: Node) -> Node:
    """What stands before the quantization of `node`, where it is a tensor that came back from codes."""
    if node.target is qdq.DEQUANTIZE:
        codes = _node(node.args[0])
        if codes.target is qdq.QUANTIZE:
            return uncoded(_node(codes.args[0]))
    return node


def _scores(softmax: Node) -> Node | None:
    """The product of queries and keys behind scale, bias, mask and codes."""
    last = _chain(softmax)[-1]
    both = all(isinstance(a, Node) and not is_constant(a) for a in last.args[:2])
    return last if last.target in PRODUCTS and both else None


def _chain(softmax: Node) -> list[Node]:
    """What leads from the softmax back to the product, which comes last; shorter where there is none."""
    found = [softmax]
    while found[-1].target not in PRODUCTS:
        inner = [a for a in found[-1].all_input_nodes if _leads_to_product(a)]
        if len(inner) != 1:
            break
        found.append(inner[0])
    return found


def _leads_to_product(node: Node) -> bool:
    if node.target in PRODUCTS:
        return True
    return kind(node) in BEFORE and any(_leads_to_product(a) for a in node.all_input_nodes)


def _output(node: Node) -> Node | None:
    """The product of probabilities and values."""
    for user in node.users:
        if user.target in PRODUCTS and user.args[0] is node:
            return user
        found = _output(user) if kind(user) in BEHIND else None
        if found is not None:
            return found
    return None


def _node(argument: object) -> Node:
    assert isinstance(argument, Node)
    return argument
