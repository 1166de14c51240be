"""Follow the token axis forward through a graph, with one rule per kind of operator.

Where it cannot be followed, the operator and its layer are named with the reason in a user's words: a graph is edited
only when everything behind the cut is understood.
"""

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import CalibrationError
from ..graph import kind, layer_name, operator_name
from .axes import (
    BATCH,
    TOKENS,
    Axes,
    Factor,
    Sizes,
    batch_axis,
    combined,
    holds_tokens,
    plain,
    token_axes,
    tokens_alone,
)


@dataclass(frozen=True)
class Meeting:
    """`node` reads `operand` from before the cut, whose axes `dims` lie along the tokens.

    Axes count from the last; `batch` is where the batch lies in what `node` computes with (None: nowhere by itself),
    `skipped` how many tokens are cut off at the front of the operand.
    """

    node: Node
    operand: Node
    dims: tuple[int, ...]
    batch: int | None
    skipped: int


@dataclass
class Trail:
    """Where the tokens go behind a cut.

    `axes`: every value that holds tokens (a tuple of axes per part, where an operator makes several). `behind`: every
    node that the cut reaches, in order. `meetings`: operands from before the cut to reduce alike. `resized`: reshapes
    and expands whose written sizes hold the number of tokens. `pooled`: means, sums and maxima over tokens.
    """

    axes: dict[Node, Any] = field(default_factory=dict)
    behind: dict[Node, None] = field(default_factory=dict)
    meetings: list[Meeting] = field(default_factory=list)
    resized: list[Node] = field(default_factory=list)
    pooled: list[Node] = field(default_factory=list)
    sizes: Sizes = field(default_factory=Sizes)
    protected: int = 1

    def shape(self, node: Node) -> tuple[int, ...]:
        return self.sizes.of(node.meta["val"])

    def meet(self, node: Node, operand: object, axes: Axes) -> None:
        """Note that `node` reads `operand`, broadcast against `axes`, if it holds anything along the tokens."""
        if not isinstance(operand, Node) or not isinstance(operand.meta.get("val"), Tensor):
            return
        shape = self.shape(operand)
        long = [i for i in token_axes(axes) if -i <= len(shape) and shape[i] != 1]
        if not long:
            return
        if operand in self.behind:
            refuse(node, "it combines the tokens with a value of the same length that no longer holds them")
        if not all(tokens_alone(axes[i]) for i in long):
            refuse(node, "the tokens are folded into one axis with others, and a table from before meets them there")
        skipped = {axes[i][0].skipped for i in long}
        if len(skipped) > 1 or any(shape[i] != axes[i][0].size for i in long):
            refuse(node, "a table from before has another number of tokens")
        self.meetings.append(Meeting(node, operand, tuple(long), batch_axis(axes), skipped.pop()))


def refuse(node: Node, why: str) -> NoReturn:
    """Say which operator of which layer stops the tokens, and why."""
    name = operator_name(node) or node.op
    raise CalibrationError(
        f"tokens cannot be removed before '{layer_name(node)}' (operator {name}): {why}. Cut behind it, or leave "
        "token pruning out of the recipe."
    )


def follow(graph: GraphModule, start: Node, protected: int = 1, within: Container[Node] | None = None) -> Trail:
    """Follow the tokens of `start` [B, N, C] to the graph's output, or through the nodes `within` alone.

    The first `protected` tokens are never removed, so that they may be read by their place. Raises CalibrationError
    where the tokens are mixed by place (convolutions, windows), or the output needs every one of them.
    """
    from .rules import RULES  # the rules are written in terms of a Trail

    trail = Trail(protected=protected)
    batch, tokens, width = trail.shape(start)
    trail.axes[start] = ((Factor(batch, BATCH),), (Factor(tokens, TOKENS),), plain(width))
    trail.behind[start] = None
    for node in _after(graph, start):
        if not any(a in trail.behind for a in node.all_input_nodes) or (within is not None and node not in within):
            continue
        trail.behind[node] = None
        if not any(a in trail.axes for a in node.all_input_nodes) or kind(node) == "shape":
            continue
        if node.op == "output":
            _refuse_output(node, trail)
        rule = RULES.get(operator_name(node)) or RULES.get(kind(node))
        if rule is None:
            refuse(node, "there is no rule for how this operator treats tokens")
        made = rule(node, trail)
        if _any_tokens(made):
            trail.axes[node] = made
    return trail


def _after(graph: GraphModule, start: Node) -> Iterator[Node]:
    nodes: Iterable[Node] = iter(graph.graph.nodes)
    for node in nodes:
        if node is start:
            break
    return iter(nodes)


def _any_tokens(made: Any) -> bool:
    """Whether any axis of a value, or of any part of it, holds tokens."""
    if isinstance(made, list):
        return any(_any_tokens(part) for part in made)
    return any(holds_tokens(axis) for axis in made)


def _refuse_output(node: Node, trail: Trail) -> NoReturn:
    last = next(a for a in node.all_input_nodes if a in trail.axes)
    raise CalibrationError(
        f"the model's output '{layer_name(last)}' has a value for every token, so its head needs every token: "
        "a reconstruction of the removed ones would be needed. Use cluster (recipe cluster-tokens), which puts them "
        "back, or prune a model that pools its tokens or reads a class token."
    )


def joined(node: Node, trail: Trail, operands: Iterable[object], rank: int) -> Axes:
    """The axes of a broadcast of `operands` to `rank` axes; operands from before the cut are noted."""
    operands = list(operands)
    result: list[Any] = [()] * rank
    for operand in operands:
        axes: Axes = trail.axes.get(operand, ()) if isinstance(operand, Node) else ()
        for i in range(1, len(axes) + 1):
            both = combined(result[-i], axes[-i])
            if both is None:
                refuse(node, "it combines tokens with a value that holds them along another axis")
            result[-i] = both
    for operand in operands:
        if operand not in trail.axes:
            trail.meet(node, operand, tuple(result))
    shape = trail.shape(node)[-rank:] if rank else ()
    return tuple(a or plain(s) for a, s in zip(result, shape, strict=True))
