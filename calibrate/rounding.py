"""What steps that round weights anew share: scales by importance, judgement on samples kept aside, and storing."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from .coded import CodedLayer, coded, coded_layers
from .graph import constant
from .hessian import Refit
from .layer_problem import LayerProblem, own_bias, problem, refusal
from .lockstep import Visit, walk
from .plan import Entry, Plan, WeightFormat
from .steps import Context
from .weights import fitted_scales

# Below this share of the mean no column's importance falls: a column that the samples hardly used may be used in life.
LEAST_IMPORTANCE = 0.01
COMPUTED = "its bias is computed, not constant"


@dataclass(frozen=True)
class Rounded:
    """A proposal for one layer: codes, step [g, o, k]; scales as stored; what to add to the bias [g, o], or None."""

    codes: Tensor
    step: Tensor
    scales: Tensor
    bias: Tensor | None = None


def group_of(graph: GraphModule, made: LayerProblem) -> int | None:
    """How many neighbouring inputs share a scale; None where a whole output channel does."""
    scales = constant(graph, made.layer.scales)
    return made.shape[1] // scales.shape[1] if scales.dim() == 2 else None


def code_bounds(layer: CodedLayer, plan: Plan) -> tuple[int, int]:
    """The least and largest code: what the graph allows, and for 8 bits no more than the plan's `weight_max`."""
    low, high = plan.code_range(layer.bits)
    return max(layer.low, low), min(layer.high, high)


def scale_fitter(graph: GraphModule, made: LayerProblem, h: Tensor, plan: Plan) -> Refit:
    """Fits scales [out] for weights [out, ...] in the given columns: as quantization did, but each column's error
    counts as its inputs do (the diagonal of `h` [g, k, k])."""
    layer = made.layer
    form = WeightFormat(layer.bits, None, "int", plan.format_of(layer.name).power_of_two)
    whole = plan.int32_bias and layer.bias is not None and layer.input_scale() is not None
    bias = constant(graph, layer.bias) if layer.bias is not None and whole else None
    diagonal = h.diagonal(dim1=1, dim2=2)
    importance = torch.maximum(diagonal, LEAST_IMPORTANCE * diagonal.mean(1, keepdim=True))
    rows = made.shape[0] // len(h)

    def fit(weight: Tensor, columns: Tensor) -> Tensor:
        counts = importance[:, columns].repeat_interleave(rows, 0)
        # A group has scales of its own even where whole channels share one.
        shared = plan if weight[0].numel() == made.weight.shape[2] else replace(plan, per_channel=True)
        return fitted_scales(weight, shared, form, bias, layer.input_scale(), counts)

    return fit


def settle(graph: GraphModule, made: LayerProblem, proposal: Rounded, goal: Tensor, plan: Plan, step: str) -> Entry:
    """Store the proposal where it comes nearer to `goal` [g, n, o] on the samples kept aside; say what was done."""
    layer = made.layer
    before = made.error(made.current(graph), goal)
    after = made.error(proposal.codes * proposal.step, goal, proposal.bias)
    if not after < before:
        reason = f"output error {after:.3g} on samples kept aside, not below {before:.3g}"
        return Entry(step, layer.name, "left as it was rounded", reason)
    layer.set_codes(graph, made.restored(proposal.codes))
    layer.set_scales(graph, proposal.scales)
    bias = constant(graph, layer.bias).double() if layer.bias is not None else torch.zeros(made.shape[0]).double()
    if proposal.bias is not None:
        layer.set_bias(graph, bias + proposal.bias.flatten(), plan.int32_bias)
    elif layer.bias is not None and plan.int32_bias:  # another scale makes another step of the kernel's bias
        layer.set_bias(graph, bias, True)
    return Entry(step, layer.name, f"{layer.bits}-bit codes, output error {before:.3g} to {after:.3g}")


def round_layers(
    step: str, graph: GraphModule, context: Context, choose: Callable[[LayerProblem], Entry], own_biases: bool = False
) -> list[Entry]:
    """Walk beside the float graph and let `choose` round each layer anew; what makes no problem is left alone.

    `own_biases`: layers whose bias is computed are left alone too.
    """
    reference = context.float_graph
    assert reference is not None
    ledger: list[Entry] = []
    count = len(list(coded_layers(graph)))

    def visit(found: Visit) -> None:
        reason = refusal(graph, reference, found)
        if reason is None and found.layer.levels(graph) is not None:
            reason = "its rows have two to four levels, which the step binarize chose as this one would"
        if reason is None and own_biases and not own_bias(found.layer):
            reason = COMPUTED
        if reason is None:
            ledger.append(choose(problem(graph, reference, found, context.seed + len(ledger))))
        else:
            ledger.append(Entry(step, found.layer.name, "left alone", reason))
        context.progress(step, len(ledger), count)

    walk(reference, graph, context.few_batches(), visit)
    return ledger or [Entry(step, "model", "left alone", "no layer of it has coded weights")]


def codes_out_of_range(graph: GraphModule) -> str | None:
    """Which layer holds codes that its bits cannot, or None."""
    for node in graph.graph.nodes:
        layer = coded(node)
        if layer is not None:
            codes = constant(graph, layer.codes)
            if int(codes.min()) < layer.low or int(codes.max()) > layer.high:
                return f"a code of {layer.name} is outside {layer.low}..{layer.high}"
    return None
