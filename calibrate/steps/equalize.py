"""Equalize channels between layers that follow each other, so that one scale per tensor serves all of them."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate import balance
from calibrate.affine import layer_of, output_reach, scale_inputs, scale_outputs
from calibrate.balance import Candidate
from calibrate.clamps import clamp_bounds
from calibrate.errors import CalibrationError
from calibrate.graph import add_constant, constant, finish, kind, layer_name
from calibrate.links import Link, find
from calibrate.plan import Entry
from calibrate.steps import Context

aten = torch.ops.aten
NAME = "equalize"
SWEEPS = 100
CONVERGED = 1e-3
# What is measured on a few samples must be this much better than leaving the channels alone.
MARGIN = 0.95
CHOICES = {
    "ranges": ("activations", "weights"),
    "relu6": ("leave", "channels"),
    "absorb_bias": ("exact", "calibrated", "never"),
}


class Equalize:
    """Cross-layer equalization and bias absorption (DFQ, Nagel et al. 2019, arXiv 1906.04721, section 4.1).

    A layer's output channels are divided by s, what reads them is multiplied by s; relu in between lets s pass. The
    function is unchanged. `ranges` "weights": s makes the largest weights on both sides alike, until it does so
    everywhere; "activations": since kernels have one scale per weight channel but one per activation tensor, s is
    chosen by the error that both roundings cause in the layers behind, measured on a few calibration batches.
    `silu`: silu and hardswish, which do not scale, are rewritten as x * gate(s * x): one more multiplication.
    `relu6` "channels": the bound of a relu6 becomes one number per channel, an operator that kernels do not fuse.
    `absorb_bias` "exact": channels are shifted where no activation and no padding is in the way; "calibrated": also
    behind a relu that never cut the channel on calibration samples (the paper's high biases: beta - 3 gamma where only
    weights are looked at), which holds as long as other samples do not either; "never".
    """

    exact = True
    defaults: ClassVar[dict[str, Any]] = {
        "ranges": "activations",
        "silu": False,
        "relu6": "leave",
        "absorb_bias": "exact",
    }

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        wanted = {**self.defaults, **context.parameters}
        for name, choices in CHOICES.items():
            if wanted[name] not in choices:
                raise CalibrationError(f"{NAME} has no {name} = {wanted[name]!r}; there are {', '.join(choices)}")
        links, refused = find(graph, bool(wanted["silu"]), wanted["relu6"] == "channels")
        ledger = [Entry(NAME, layer, "left alone", reason) for layer, reason in refused.items()]
        if links and wanted["ranges"] == "weights":
            ledger += _by_weights(graph, links, wanted["absorb_bias"] == "calibrated")
        elif links:
            ledger += _by_activations(graph, links, context, str(wanted["absorb_bias"]))
        return ledger or [Entry(NAME, "model", "left alone", "it has no layers that could be equalized")]

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            layer = layer_of(graph, node)
            if layer is not None and not bool(constant(graph, layer.weight).isfinite().all()):
                return f"{layer_name(node)} has weights that are no numbers"
        return None


def _by_weights(graph: GraphModule, links: list[Link], absorbs: bool) -> list[Entry]:
    """Sweep over all links until every s is near 1 (section 4.1.2); then absorb high biases (section 4.1.3)."""
    total: dict[Node, Tensor] = {}
    before = {link.source: _ratio(_reaches(graph, link)) for link in links}
    for _ in range(SWEEPS):
        furthest = 0.0
        for link in links:
            made, read = _reaches(graph, link)
            alive = (made > balance.DEAD) & (read > balance.DEAD)
            # Then r1 / s = r2 * s (equation 11).
            scale = torch.where(alive, (made / read.clamp(min=balance.DEAD)).sqrt(), torch.ones_like(made))
            scale = scale.clamp(1 / balance.LIMIT**2, balance.LIMIT**2)
            furthest = max(furthest, float((scale - 1).abs().max()))
            _move(graph, link, Candidate("", scale, torch.zeros_like(scale)))
            total[link.source] = total.get(link.source, torch.ones_like(scale)) * scale
        finish(graph)
        if furthest < CONVERGED:
            break
    ledger = []
    for link in links:
        _rewrite_activations(graph, link, total[link.source])
        absorbed = _absorb_high_bias(graph, link) if absorbs else ""
        ratio = _ratio(_reaches(graph, link))
        reason = (
            f"weights before and behind a channel differed {before[link.source]:.3g} times, now {ratio:.3g}{absorbed}"
        )
        ledger.append(Entry(NAME, layer_name(link.source), f"equalized with {link.name}", reason))
    return ledger


def _reaches(graph: GraphModule, link: Link) -> tuple[Tensor, Tensor]:
    layer = layer_of(graph, link.source)
    assert layer is not None
    return output_reach(graph, layer), balance.reach(graph, link)


def _ratio(reaches: tuple[Tensor, Tensor]) -> float:
    """How far apart the two sides' ranges are across channels: 1 where r1 = r2 in each."""
    made, read = reaches
    alive = (made > balance.DEAD) & (read > balance.DEAD)
    if not bool(alive.any()):
        return 1.0
    logs = (made[alive] / read[alive]).log()
    return float(logs.abs().max().exp())


def _absorb_high_bias(graph: GraphModule, link: Link) -> str:
    known = link.source.meta.get("bn")
    if known is None or not _can_absorb(link):
        return ""
    mean, deviation = (v.double() for v in known)
    shift = (mean - 3 * deviation).clamp(min=0)
    if not bool(shift.any()):
        return ""
    _move(graph, link, Candidate("", torch.ones_like(shift), shift))
    return f"; {int((shift > 0).sum())} biases absorbed at three deviations"


def _can_absorb(link: Link) -> bool:
    return not (link.edges or link.gates or link.bounded)


def _by_activations(graph: GraphModule, links: list[Link], context: Context, absorb: str) -> list[Entry]:
    """Choose for each link the candidate with the least measured error; a layer in two links is scaled on two sides."""
    context.progress("channel ranges", 0)
    seen = balance.look(graph, links, context.few_batches())
    options = {link.source: balance.candidates(graph, link, seen, _shift(link, seen, absorb)) for link in links}
    found = balance.errors(graph, links, options, seen, context.plan, context.few_batches())
    ledger = []
    for count, link in enumerate(links):
        name, errors = layer_name(link.source), found[link.source]
        best = min(range(len(errors)), key=lambda i: errors[i])
        if errors[best] >= MARGIN * errors[0]:
            reason = f"no scaling of its channels lessens the error of {link.name} on calibration samples"
            ledger.append(Entry(NAME, name, "left alone", reason))
            continue
        chosen = options[link.source][best]
        low, high = seen.of(link)
        _move(graph, link, chosen)
        _rewrite_activations(graph, link, chosen.scale)
        old, new = (
            _spread(low, high),
            _spread((low - chosen.shift) / chosen.scale, (high - chosen.shift) / chosen.scale),
        )
        reason = (
            f"exponent {chosen.label}: errors behind it {errors[0] / max(errors[best], 1e-30):.3g} times smaller; "
            f"ranges of its channels {old:.3g}:1, now {new:.3g}:1"
        )
        if chosen.moves and link.bends:
            absorbed = int((chosen.shift > 0).sum())
            reason += f"; {absorbed} biases absorbed, as calibration samples never went below them"
        ledger.append(Entry(NAME, name, f"equalized with {link.name}", reason))
        context.progress("equalize", count + 1, len(links))
    return ledger


def _shift(link: Link, seen: balance.Seen, absorb: str) -> Tensor | None:
    """What may be taken off each channel: its middle where nothing bends it, else what a relu never went below."""
    if absorb == "never" or not _can_absorb(link):
        return None
    if not link.bends:
        low, high = seen.of(link)
        return (low + high) / 2
    return seen.least[link.source].clamp(min=0) if absorb == "calibrated" else None


def _spread(low: Tensor, high: Tensor) -> float:
    """The widest channel's reach over the narrowest living one's."""
    values = torch.maximum(low.abs(), high.abs())
    alive = values[values > balance.DEAD]
    return float(alive.max() / alive.min()) if alive.numel() else 1.0


def _move(graph: GraphModule, link: Link, chosen: Candidate) -> None:
    """Divide and shift the source's channels; let every reader undo it."""
    source = layer_of(graph, link.source)
    assert source is not None
    shifted = chosen.moves
    scale_outputs(graph, source, 1 / chosen.scale, -chosen.shift / chosen.scale if shifted else None)
    for node, repeat in link.readers.items():
        reader = layer_of(graph, node)
        assert reader is not None
        shift = chosen.shift.repeat_interleave(repeat) if shifted else None
        scale_inputs(graph, reader, chosen.scale.repeat_interleave(repeat), shift)


def _rewrite_activations(graph: GraphModule, link: Link, scale: Tensor) -> None:
    """x' = x / s: silu(x) / s is x' * sigmoid(s x'), and min(relu(x), 6) / s is min(relu(x'), 6 / s)."""
    for node in link.gates:
        shape = (-1, *[1] * (-link.axes[node] - 1))
        inner = aten.sigmoid.default if kind(node) == "silu" else aten.hardsigmoid.default
        factor = add_constant(graph, f"{layer_name(node)}_scale", scale.float().view(shape), node)
        with graph.graph.inserting_before(node):
            wide = graph.graph.call_function(aten.mul.Tensor, (node.args[0], factor))
            gate = graph.graph.call_function(inner, (wide,))
            product = graph.graph.call_function(aten.mul.Tensor, (node.args[0], gate))
        _stand_in(graph, node, [wide, gate], product)
    for node in link.bounded:
        bounds = clamp_bounds(node)
        assert bounds is not None
        shape = (-1, *[1] * (-link.axes[node] - 1))
        top = add_constant(graph, f"{layer_name(node)}_bounds", (bounds[1] / scale).float().view(shape), node)
        with graph.graph.inserting_before(node):
            positive = graph.graph.call_function(aten.relu.default, (node.args[0],))
            least = graph.graph.call_function(aten.minimum.default, (positive, top))
        _stand_in(graph, node, [positive], least)


def _stand_in(graph: GraphModule, node: Node, inner: list[Node], last: Node) -> None:
    for part in inner:
        part.meta = {**node.meta, "layer": f"{layer_name(node)}.{part.name}"}
    last.meta = dict(node.meta)
    node.replace_all_uses_with(last)
    graph.graph.erase_node(node)


STEP = Equalize()
