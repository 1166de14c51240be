"""Where Q/DQ goes: which tensors become codes so that the runtime's integer kernels apply.

A conv or linear with constant weights always wants its input as codes. Any other kind (add, mean, ...) wants codes
only where all its tensors come as codes anyway: an island grows from the weighted layers, it never starts at an add.
So an additive attention mask, a positional embedding or a residual stream of LayerNorms stays float by construction.
An activation that a kernel fuses (relu, clamp) belongs to the layer before it: the codes are written after it.
What chooses tokens computes in float on values that were not rounded to codes: a rank is a comparison of neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from .graph import (
    CHOOSES_TOKENS,
    chooses_tokens,
    constant_made,
    is_constant,
    is_weighted,
    kept_float,
    kind,
    layer_name,
    weight_nodes,
)
from .plan import Plan

FUSED = ("relu", "clamp")
CHOICE = "it decides by comparison (which tokens stay, which bits are set): codes would make equal what is not"
# Kinds that a runtime may do in float between dequantize and quantize without changing a value: codes go in, the same
# codes come out. They keep an island whole where its kernels lack them (a padded shortcut under ONNX Runtime).
BRIDGES = frozenset(("pad", "slice", "select", "reshape", "transpose", "split", "expand", "cat", "max_pool"))
# Kinds of which somebody might wonder why they stayed float.
NOTABLE = (
    "conv",
    "conv_transpose",
    "linear",
    "matmul",
    "attention",
    "add",
    "mul",
    "avg_pool",
    "mean",
    "max_pool",
)


@dataclass
class Sites:
    """`group_of`: tensor (node name) -> group sharing one scale and zero point. `readers`: which nodes read its codes
    (None: every reader). `layers`: nodes that compute on codes -> layer name. `left`: layer -> why it stays float."""

    group_of: dict[str, int] = field(default_factory=dict)
    readers: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    fixed: dict[int, tuple[float, int]] = field(default_factory=dict)


def place(graph: GraphModule, plan: Plan) -> Sites:
    """Decide from the float graph's structure which tensors carry Q/DQ under `plan`."""
    return _Placer(graph, plan).run()


class _Placer:
    def __init__(self, graph: GraphModule, plan: Plan) -> None:
        self.nodes = list(graph.graph.nodes)
        self.plan = plan
        self.wants: dict[Node, tuple[Node, ...]] = {}  # node -> the tensors it reads as codes
        self.available: set[Node] = set()  # nodes whose value an integer kernel can write as codes
        self.left: dict[str, str] = {}
        self.fixed = constant_made(self.nodes)
        self.moving = plan.shared_scale | (BRIDGES if plan.quantize_outputs else frozenset())

    def run(self) -> Sites:
        for node in self.nodes:
            self._forward(node)
        demanded = self._demanded()
        forced = {tail(n) for n in self.wants if kind(n) in self.plan.quantize_outputs}
        return self._sites(demanded, forced)

    def _forward(self, node: Node) -> None:
        what = kind(node)
        if chooses_tokens(node):
            self.left[str(node.meta[CHOOSES_TOKENS])] = CHOICE
            return
        if node.op != "call_function" or not _is_float(node):
            return
        if what == "getitem":
            parent = node.args[0]
            if isinstance(parent, Node) and parent in self.available:
                self.available.add(node)
            return
        if what in FUSED and isinstance(node.args[0], Node) and tail(node.args[0]) is not node.args[0]:
            if node.args[0] in self.available:
                self.available.add(node)
            return
        reason = self._refusal(node, what)
        if reason is None:
            self.available.add(node)
            if what in self.plan.quantize_inputs:
                self.wants[node] = (node.args[0],) if is_weighted(node) else tuple(_tensors(node))
        elif what in NOTABLE:
            self.left[layer_name(node)] = reason
        if what == "add" and self.plan.residual_add == "skip":
            skip = _skip_branch(node)
            if skip is not None and kept_float(node, self.plan.keep_float) is None:
                self.wants[node] = (skip,)
                self.left.pop(layer_name(node), None)

    def _refusal(self, node: Node, what: str) -> str | None:
        """Why this node can't run on codes, or None."""
        plan = self.plan
        kept = kept_float(node, plan.keep_float)
        if kept is not None:
            return kept
        if what == "upsample" and "nearest" not in str(node.target):
            return "interpolation makes values between the codes it reads"
        if what in self.moving and what not in plan.quantize_inputs:
            inputs = _tensors(node)
            if inputs and all(i in self.available for i in inputs) and not self._has_constant(node):
                return None
            return f"{what} moves values that are not codes"
        if what not in plan.quantize_inputs:
            return f"the runtime's fast path has no int8 {what}"
        if what in ("conv", "linear"):
            return None if is_weighted(node) else f"the weight of this {what} is computed, not constant"
        if what == "add" and plan.residual_add != "both":
            return "residual adds stay float under this plan"
        inputs = _tensors(node)
        if self._has_constant(node) or len(inputs) < (2 if what in ("add", "mul", "sub") else 1):
            return f"{what} with a constant operand stays float"
        if not all(i in self.available for i in inputs):
            return f"{what} reads a float tensor, so codes would cost a conversion"
        return None

    def _has_constant(self, node: Node) -> bool:
        return _has_constant(node) or any(o in self.fixed for o in _operands(node))

    def _moves(self, node: Node) -> bool:
        return kind(node) in self.moving - self.plan.quantize_inputs and node in self.available

    def _demanded(self) -> set[Node]:
        """Tensors that somebody reads as codes, through moves of codes too."""
        demanded: set[Node] = set()
        for node in reversed(self.nodes):
            for user in node.users if kind(node) != "shape" else ():
                through = (self._moves(user) or (kind(user) == "getitem" and self._moves(node))) and user in demanded
                if node in self.wants.get(user, ()) or through:
                    demanded.add(node)
        return demanded

    def _sites(self, demanded: set[Node], forced: set[Node]) -> Sites:
        sites = Sites(left=self.left)
        union: dict[Node, Node] = {}

        def root(n: Node) -> Node:
            while union.get(n, n) is not n:
                n = union[n]
            return n

        chosen = [n for n in self.nodes if (n in demanded or n in forced) and not _gives_several(n) and _is_read(n)]
        for node in self.nodes:
            if self._moves(node) and (node in demanded or any(u in demanded for u in _outputs(node))):
                members = [*_tensors(node), *(o for o in _outputs(node) if o in demanded)]
                for other in members[1:]:
                    union[root(other)] = root(members[0])
        numbers: dict[Node, int] = {}
        for node in chosen:
            group = numbers.setdefault(root(node), len(numbers))
            sites.group_of[node.name] = group
            # A kernel that moves codes writes codes: every reader gets them, else the move itself would stay float.
            everyone = node in forced or self._moves(node)
            users = tuple(
                u.name
                for u in node.users
                if not chooses_tokens(u)
                and (everyone or node in self.wants.get(u, ()) or (self._moves(u) and _used(u, demanded)))
            )
            sites.readers[node.name] = None if everyone and len(users) == len(node.users) else users
            if kind(node) in self.plan.fixed_output:
                sites.fixed[group] = self.plan.fixed_output[kind(node)]
        sites.layers = {n.name: layer_name(n) for n in self.wants}
        return sites


def tail(node: Node) -> Node:
    """The node after which this layer's kernel writes: past a fused relu or clamp that alone reads it."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if kind(user) not in FUSED or user.args[0] is not node:
            break
        node = user
    return node


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        value = value[0]
    return not isinstance(value, torch.Tensor) or value.is_floating_point()


def _tensors(node: Node) -> list[Node]:
    """The non-constant tensor operands, lists (cat) flattened."""
    return [a for a in _operands(node) if not is_constant(a) and kind(a) != "shape"]


def _operands(node: Node) -> Iterator[Node]:
    first = node.args[0] if node.args else None
    if isinstance(first, list | tuple):
        yield from (a for a in first if isinstance(a, Node))
        return
    limit = 2 if kind(node) in ("add", "sub", "mul", "div", "matmul") else 1
    yield from (a for a in node.args[:limit] if isinstance(a, Node))


def _has_constant(node: Node) -> bool:
    if any(is_constant(a) for a in _operands(node)):
        return True
    return kind(node) in ("add", "sub", "mul", "div") and any(not isinstance(a, Node) for a in node.args[:2])


def _is_read(node: Node) -> bool:
    """Whether anybody would read the codes of this tensor."""
    return not all(chooses_tokens(u) for u in node.users)


def _outputs(node: Node) -> list[Node]:
    return [u for u in node.users if kind(u) == "getitem"] if _gives_several(node) else [node]


def _gives_several(node: Node) -> bool:
    """True for split and the like: the tensors are the getitems behind it."""
    return any(kind(u) == "getitem" for u in node.users)


def _used(node: Node, demanded: set[Node]) -> bool:
    return any(o in demanded for o in _outputs(node))


def _skip_branch(add: Node) -> Node | None:
    """Of a residual add's two operands, the one that is not the last convolution's output; None when no conv feeds it.

    TensorRT fuses the add into the convolution that produces the other operand, and wants only the skip quantized
    (NVIDIA pytorch-quantization, tutorials/quant_resnet50: "the residual add").
    """
    operands = _tensors(add)
    if len(operands) != 2 or _has_constant(add):
        return None
    convs = [o for o in operands if kind(o) == "conv" and is_weighted(o) and len(o.users) == 1]
    if len(convs) == 1:
        return operands[1] if operands[0] is convs[0] else operands[0]
    if len(convs) == 2:  # a down-sampling block: its skip is the smaller convolution
        return min(convs, key=lambda c: _weight_size(c))
    return None


def _weight_size(node: Node) -> int:
    weight, _ = weight_nodes(node)
    value = weight.meta.get("val") if weight is not None else None
    return int(value.numel()) if isinstance(value, torch.Tensor) else 0
