"""Dynamic int8: weights become codes now, activations at run time from each input's own range."""

from typing import Any

from torch.fx import GraphModule, Node

from calibrate import qdq
from calibrate.graph import (
    add_constant,
    chooses_tokens,
    constant,
    constant_made,
    is_table,
    is_weighted,
    kept_float,
    kind,
    layer_name,
    weight_nodes,
)
from calibrate.plan import Entry
from calibrate.steps import Context
from calibrate.weights import fitted_scales, halve_layers, quantize_weight, weight_codes


class QuantizeDynamic:
    """Linear (and, where the runtime has it, 2-D convolution) on codes; embeddings keep int8 tables.

    No activation range is fixed, so no calibration can clip it: the choice for transformers on CPUs.
    """

    exact = False

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        plan = context.plan
        ledger = halve_layers(graph, plan, "quantize_dynamic")
        halved = {e.layer for e in ledger}
        fixed = constant_made(graph.graph.nodes)
        for node in list(graph.graph.nodes):
            what = kind(node)
            if layer_name(node) in halved or chooses_tokens(node):  # products that take tokens have no weights
                continue
            if is_table(node, fixed):
                reason = kept_float(node, plan.keep_float)
                action = "left float"
                if reason is None:
                    action = f"{quantize_weight(graph, node, plan).label} table"
                ledger.append(Entry("quantize_dynamic", layer_name(node), action, reason or ""))
            elif what in ("conv", "linear", "conv_transpose", "matmul", "attention"):
                reason = kept_float(node, plan.keep_float) or _refusal(node, plan.dynamic_kinds)
                action = "left float"
                if reason is None:
                    action = f"{_replace(graph, node, context)}, dynamic"
                ledger.append(Entry("quantize_dynamic", layer_name(node), action, reason or what))
        return ledger

    def ensures(self, graph: GraphModule) -> str | None:
        return None if all(n.target is not qdq.QUANTIZE for n in graph.graph.nodes) else "static Q/DQ appeared"


def _refusal(node: Node, kinds: frozenset[str]) -> str | None:
    what = kind(node)
    if what not in kinds:
        return f"the runtime has no fast dynamic int8 {what}"
    if not is_weighted(node):
        return f"the weight of this {what} is computed, not constant"
    if what == "conv" and "conv2d" not in str(node.target):
        return "only 2-D convolutions run dynamically"
    if what == "conv" and isinstance(_argument(node, 4, [0, 0]), str):
        return "padding given as a word"
    return None


def _argument(node: Node, index: int, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else default


def _replace(graph: GraphModule, node: Node, context: Context) -> str:
    """Put the dynamic layer in the place of `node`; return the label of its weight's format."""
    plan = context.plan
    weight_node, _ = weight_nodes(node)
    assert weight_node is not None
    weight = constant(graph, weight_node)
    form = plan.format_of(layer_name(node))
    scales = fitted_scales(weight, plan, form)
    stem = f"{layer_name(node)}_weight"
    codes = add_constant(graph, f"{stem}_codes", weight_codes(weight, scales, *plan.code_range(form.bits)), node)
    scale_node = add_constant(graph, f"{stem}_scales", scales, node)
    bias = _argument(node, 2, None)
    head = (node.args[0], codes, scale_node, bias)
    with graph.graph.inserting_before(node):
        if kind(node) == "linear":
            made = graph.graph.call_function(qdq.DYNAMIC_LINEAR, (*head, plan.dynamic_scheme, form.bits))
        else:
            pairs = [_pair(_argument(node, i, d)) for i, d in ((3, 1), (4, 0), (5, 1))]
            groups = _argument(node, 6, 1)
            tail = (*pairs, groups, plan.dynamic_scheme, form.bits)
            made = graph.graph.call_function(qdq.DYNAMIC_CONV2D, (*head, *tail))
    made.meta.update(node.meta)
    made.meta["layer"] = layer_name(node)
    node.replace_all_uses_with(made)
    graph.graph.erase_node(node)
    return form.label


def _pair(value: Any) -> list[int]:
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    return [int(n) for n in (numbers * 2 if len(numbers) == 1 else numbers)]


STEP = QuantizeDynamic()
