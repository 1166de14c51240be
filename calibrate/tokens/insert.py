"""Cut tokens behind chosen blocks, and make everything behind a cut fit: shapes, masks, tables of positions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from .. import registry
from ..errors import CalibrationError
from ..graph import finish, layer_name, operator_name
from . import methods, restoring, sizes
from .attention import REDUCED, Site, sites
from .axes import holds_tokens, layout_of_tokens
from .axis import Trail, follow, refuse
from .builder import Builder, refreshed
from .selection import FORMS, Reduction
from .written_out import written_out


@dataclass(frozen=True)
class Cut:
    """Keep `keep` tokens, protected ones among them, between attention and MLP of block `block` (from 0).

    `method` is one of `methods.names()`, or a method itself.
    """

    block: int
    keep: int
    method: str | methods.Method
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """What a cut did: tokens before and after it, at which layer, and the node [B, after, C] that holds what stays.

    `origin` [B, after, N], where it was asked for: how much of each of the model's N tokens is in each that stays.
    """

    cut: Cut
    layer: str
    before: int
    after: int
    kept: Node
    origin: Node | None = None


def reduce(
    graph: GraphModule,
    cuts: Sequence[Cut],
    protected: int = 1,
    form: str = "topk",
    seed: int = 0,
    traced: bool = False,
) -> list[Done]:
    """Apply the cuts in place, first block first, and return what each did.

    The first `protected` tokens (class token, distillation token) always stay, in front. `form` is one of
    `selection.FORMS`. A cut that keeps all tokens is inserted as well: it changes no value beyond their order. With
    `traced` the graph has one more output per cut, behind its own: the `origin` of the tokens that stay.
    Where the model needs every token, methods that can put tokens back do so behind the last block (see `restoring`).
    Raises CalibrationError where a model or a cut does not allow it; the graph may be half edited then: give a clone.
    """
    if form not in FORMS:
        raise CalibrationError(f"there is no form '{form}' of token selection; there are {', '.join(FORMS)}")
    blocks = [c.block for c in cuts]
    if len(set(blocks)) < len(blocks):
        raise CalibrationError("two token cuts are behind the same block; give each block one")
    planes: dict[str, Node] = {}
    done: list[Done] = []
    attended: list[tuple[int, Node | None]] = []
    cuts = sorted(cuts, key=lambda c: c.block)
    until = _until(graph, cuts, protected)
    last = until[1] if until else None
    for cut in cuts:
        done.append(_cut(graph, cut, protected, form, seed, planes, done[-1].origin if done else None, traced, last))
        attended.append((cut.block, planes.get(sizes.ATTENDED)))
    if until:
        attended.append((until[0], None))
    if sizes.SIZE in planes:
        inside = restoring.stretch(graph, done[-1].kept, last) if last else None
        sizes.weighted(graph, follow(graph, done[-1].kept, protected, inside), planes[sizes.SIZE])
    sizes.attended(graph, sites(graph), attended)
    if traced:
        _show(graph, [d.origin for d in done])
    finish(graph)
    return done


def _method(cut: Cut) -> methods.Method:
    return methods.find(cut.method) if isinstance(cut.method, str) else cut.method


def _until(graph: GraphModule, cuts: Sequence[Cut], protected: int) -> tuple[int, Node] | None:
    """The block, and its last sum, behind which tokens are put back; None where they are not."""
    able = [c for c in cuts if getattr(_method(c), "reconstructs", False)]
    until = [(c.block, _options(c, _method(c)).get("until")) for c in able]
    return restoring.end(graph, until, len(able) < len(cuts), protected)


def _show(graph: GraphModule, nodes: Sequence[Node | None]) -> None:
    """Make `nodes` outputs behind the graph's own."""
    output = next(n for n in graph.graph.nodes if n.op == "output")
    made = output.args[0]
    own = tuple(made) if isinstance(made, tuple | list) else (made,)
    output.args = ((*own, *nodes),)


def _cut(
    graph: GraphModule,
    cut: Cut,
    protected: int,
    form: str,
    seed: int,
    planes: dict[str, Node],
    origin: Node | None,
    traced: bool,
    last: Node | None,
) -> Done:
    found = sites(graph)
    if not 0 <= cut.block < len(found):
        raise CalibrationError(
            f"there is no block {cut.block} to drop tokens behind; the model has {len(found)}, from 0"
        )
    site = found[cut.block]
    _refuse_counts(cut, site, protected)
    method = _method(cut)
    inside = restoring.stretch(graph, site.residual, last) if last else None
    trail = follow(graph, site.residual, protected, inside)
    if method.attention:
        site = written_out(graph, site)
    build = Builder(graph, site.residual.next, f"{site.layer}.tokens", sorts=form == "topk")
    options = _options(cut, method)
    inputs = tuple(n for n in graph.graph.nodes if n.op == "placeholder")
    depth = cut.block / len(found)
    request = methods.Request(cut.keep, protected, form, seed + cut.block, depth, options, planes, inputs)
    reduction = method.reduction(build, site, request)
    kept = reduction.take(build, site.residual, -2, -3)
    if traced:
        origin = origin or build.constant("every_token", torch.eye(site.tokens).unsqueeze(0))
        origin = reduction.take(build, origin, -2, -3)
    planes.update({name: reduction.carry(build, name, plane) for name, plane in planes.items()})
    site.residual.replace_all_uses_with(kept, delete_user_cb=lambda user: user in trail.behind)
    before = site.tokens
    _reduce_operands(graph, trail, reduction, build.layer)
    for node in trail.resized:
        _resize(node, trail, reduction.count)
    refreshed(graph, [n for n in trail.axes if n is not site.residual])
    if inside is not None:
        restoring.put_back(trail, inside, cast(restoring.Restoring, reduction), kept, build.layer)
    return Done(cut, site.layer, before, reduction.count, kept, origin)


def _options(cut: Cut, method: methods.Method) -> dict[str, Any]:
    known = dict(getattr(method, "defaults", {}))
    registry.refuse_unknown(f"the token method {cut.method}", known, cut.options)
    return {**known, **cut.options}


def _refuse_counts(cut: Cut, site: Site, protected: int) -> None:
    if cut.keep <= protected:
        raise CalibrationError(
            f"keeping {cut.keep} of {site.tokens} tokens behind block {cut.block} leaves no token besides the "
            f"{protected} that always stay: keep more."
        )
    if cut.keep > site.tokens:
        raise CalibrationError(
            f"behind block {cut.block} there are {site.tokens} tokens, so {cut.keep} cannot be kept: keep fewer."
        )


def _reduce_operands(graph: GraphModule, trail: Trail, reduction: Reduction, layer: str) -> None:
    """Reduce what was computed before the cut and meets the tokens behind it; once per operand and axes."""
    reduced: dict[tuple[Any, ...], Node] = {}
    for meeting in trail.meetings:
        if meeting.skipped:
            refuse(meeting.node, "a table from before meets the tokens without their class token")
        key = (meeting.operand, meeting.dims, meeting.batch)
        if key not in reduced:
            build = Builder(graph, meeting.node, f"{layer}.{layer_name(meeting.operand)}")
            made = meeting.operand
            for dim in meeting.dims:
                made = reduction.take(build, made, dim, meeting.batch)
            made.meta[REDUCED] = True
            reduced[key] = made
        meeting.node.replace_input_with(meeting.operand, reduced[key])


def _resize(node: Node, trail: Trail, count: int) -> None:
    """Write the new number of tokens into the sizes of a reshape or an expand."""
    sizes = list(node.args[1])
    axes = trail.axes[node]
    for i, axis in enumerate(axes):
        if not holds_tokens(axis) or (isinstance(sizes[i], int) and sizes[i] == -1):
            continue
        before, tokens, after = layout_of_tokens(axis)
        if isinstance(sizes[i], int):
            sizes[i] = before * (count - tokens.skipped) * after
        else:
            _infer(node, sizes, i)
    node.args = (node.args[0], sizes, *node.args[2:])


def _infer(node: Node, sizes: list[Any], position: int) -> None:
    """Let a reshape work out the size at `position`, a product of tokens and batch, by itself."""
    shape = node.meta["val"].shape
    for i, size in enumerate(sizes):
        if isinstance(size, int) and size == -1:
            if not isinstance(shape[i], int):
                refuse(node, "two of its sizes depend on the batch, so the number of tokens cannot be written into it")
            sizes[i] = shape[i]
    if operator_name(node) != "reshape":
        refuse(node, "it repeats an axis in which tokens and batch are folded")
    sizes[position] = -1
