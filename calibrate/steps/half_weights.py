"""Half-precision weights: every float32 constant that a layer multiplies with is stored as float16."""

import torch
from torch.fx import GraphModule

from calibrate.errors import CalibrationError
from calibrate.graph import constant, layer_name
from calibrate.plan import Entry
from calibrate.steps import Context
from calibrate.weights import BEYOND_HALF, fits_half, store_half


class HalfWeights:
    """Each float32 constant w becomes float16(w) followed by a cast back, so the torch graph shows the rounding."""

    exact = False

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        ledger = []
        for node in list(graph.graph.nodes):
            if node.op != "get_attr" or constant(graph, node).dtype != torch.float32:
                continue
            if all("quantize_per" in str(u.target) or "tightfit" in str(u.target) for u in node.users):
                continue  # scales stay exact
            if not fits_half(constant(graph, node)):
                ledger.append(Entry("half_weights", str(node.target), "left float32", BEYOND_HALF))
                continue
            node.replace_all_uses_with(store_half(graph, node))
            ledger.append(Entry("half_weights", layer_name(node), "float16"))
        if not ledger:
            raise CalibrationError("the model has no float32 weights to store as float16")
        return ledger

    def ensures(self, graph: GraphModule) -> str | None:
        return None


STEP = HalfWeights()
