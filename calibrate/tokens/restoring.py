"""Put all tokens back behind a later block, for models whose output needs every one of them (dense prediction).

A method that can put tokens back (`reconstructs`) reduces them from its cut to the end of a stretch, the sum after the
MLP of a later block. Whatever leaves the stretch is read with all tokens in their old places, so that everything behind
keeps its shapes: the norm and the head, or layers that read an earlier block as well.
"""

from collections.abc import Container, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import CalibrationError
from ..graph import is_constant, kind, layer_name
from .attention import Site, sites
from .axes import batch_axis, tokens_alone
from .axis import Trail, follow, refuse
from .builder import Builder
from .selection import Reduction


class Restoring(Reduction, Protocol):
    """A reduction that can be undone."""

    def restored(self, build: Builder, operand: Node, kept: Node | None) -> Node:
        """All tokens [B, N, C] of what became of the reduced ones, `operand` [B, count, C].

        `kept` [B, count, C] is what the cut passed on, where `operand` is that and sums added to it; else None.
        """
        ...


def end(graph: GraphModule, able: Sequence[tuple[int, Any]], others: bool, protected: int) -> tuple[int, Node] | None:
    """(block, the sum behind its MLP) to put tokens back behind; None where the model needs none of them back.

    `able` are the cuts that can be undone: (block, option `until`: a block, or None for the last, where tokens are put
    back only if the model needs it). `others` tells that there are cuts that can't be. Raises CalibrationError where
    the cuts do not go together.
    """
    found = sites(graph)
    blocks = [block for block, _ in able]
    if not able or not all(0 <= block < len(found) for block in blocks):
        return None
    until = {block for _, block in able}
    if len(until) > 1:
        raise CalibrationError("tokens are put back once for all cuts: give every cut the same option 'until'")
    last = until.pop()
    if last is None and _followed(graph, found[blocks[0]], protected):
        return None
    last = len(found) - 1 if last is None else int(last)
    if not max(blocks) <= last < len(found):
        raise CalibrationError(
            f"tokens cannot be put back behind block {last}: choose one from {max(blocks)} (the last cut) to "
            f"{len(found) - 1} (the last block)."
        )
    if others:
        raise CalibrationError(
            "this model needs its tokens back, and one of the methods cannot put back what it removed: use cluster for "
            "every cut."
        )
    return last, _sum_behind(graph, found[last])


def _followed(graph: GraphModule, site: Site, protected: int) -> bool:
    """Whether everything behind a cut works with fewer tokens."""
    try:
        follow(graph, site.residual, protected)
    except CalibrationError:
        return False  # where tokens stop inside the stretch too, following that says so
    return True


def _sum_behind(graph: GraphModule, site: Site) -> Node:
    """The first sum of two values [B, N, C] behind the attention's own: that after the MLP."""
    shape = _shape(site.residual)
    for node in behind(graph, site.residual):
        tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
        whole = [a for a in tensors if not is_constant(a) and _shape(a) == shape]
        if kind(node) == "add" and len(whole) == 2:
            return node
    raise CalibrationError(
        f"no sum follows the MLP behind '{site.layer}', so there is no place to put tokens back: only encoders with a "
        "residual stream can be reduced."
    )


def _shape(node: Node) -> list[str]:
    return [str(d) for d in node.meta["val"].shape]


def behind(graph: GraphModule, start: Node) -> dict[Node, None]:
    """Every node that is computed from `start`, in order."""
    reached = {start: None}
    for node in graph.graph.nodes:
        if node not in reached and any(a in reached for a in node.all_input_nodes):
            reached[node] = None
    del reached[start]
    return reached


def stretch(graph: GraphModule, start: Node, last: Node) -> set[Node]:
    """Every node that is computed from `start` and that `last` is computed from, `last` among them."""
    needed, stack = {last}, [last]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                stack.append(node)
    return needed & set(behind(graph, start))


def put_back(trail: Trail, inside: Container[Node], reduction: Restoring, kept: Node, layer: str) -> None:
    """Let everything outside the stretch read all tokens; `trail` is that of the cut within the stretch."""
    later = list(trail.axes)[1:]
    stream = _stream(later, kept)
    for node in later:
        readers = [u for u in node.users if u not in inside and kind(u) != "shape"]
        if not readers:
            continue
        axes = trail.axes[node]
        one = not isinstance(axes, list) and len(axes) == 3 and batch_axis(axes) == -3 and tokens_alone(axes[1])
        if not one or axes[1][0].skipped:
            refuse(node, "it is read where all tokens are needed, and is no value [batch, tokens, channels] of them")
        build = Builder(node.graph.owning_module, node.next, f"{layer}.{layer_name(node)}")
        whole = reduction.restored(build, node, kept if node in stream else None)
        for reader in readers:
            reader.replace_input_with(node, whole)


def _stream(nodes: Iterable[Node], kept: Node) -> set[Node]:
    """`kept`, and every sum that adds something of the same shape to it."""
    stream = {kept}
    for node in nodes:
        if kind(node) == "add" and any(a in stream and _shape(a) == _shape(node) for a in node.all_input_nodes):
            stream.add(node)
    return stream
