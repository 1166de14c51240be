"""Weights only, int8 or fewer bits: smaller files and less memory traffic, float arithmetic."""

from torch.fx import GraphModule, Node

from calibrate.graph import constant_made, is_table, is_weighted, kept_float, kind, layer_name
from calibrate.plan import Entry
from calibrate.steps import Context
from calibrate.weights import halve_layers, quantize_weight

# A weight below this many values saves less than its scales and the dequantize node cost.
SMALLEST = 256


class QuantizeWeights:
    """Convolutions, linear layers and embedding tables as codes, one scale per output channel or row, or per group."""

    exact = False

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        ledger = halve_layers(graph, context.plan, "quantize_weights")
        fixed = constant_made(graph.graph.nodes)
        for node in list(graph.graph.nodes):
            if not (is_weighted(node) or is_table(node, fixed)):
                continue
            reason = kept_float(node, context.plan.keep_float) or _too_small(node)
            action = "left float"
            if reason is None:
                action = f"{quantize_weight(graph, node, context.plan).label} weights"
            ledger.append(Entry("quantize_weights", layer_name(node), action, reason or kind(node)))
        return ledger

    def ensures(self, graph: GraphModule) -> str | None:
        return None


def _too_small(node: Node) -> str | None:
    source = node.args[0 if kind(node) == "embedding" else 1]
    size = source.meta["val"].numel() if isinstance(source, Node) and "val" in source.meta else SMALLEST
    return f"only {size} weights" if size < SMALLEST else None


STEP = QuantizeWeights()
