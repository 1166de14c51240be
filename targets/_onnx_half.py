"""Half precision: the float part of a model computes in float16 behind a float32 interface.

What carries codes keeps its numbers: Quantize and Dequantize, and the operator between them that a runtime fuses into
one integer kernel, stay float32 with their float32 scales (a float16 scale would shift every code's value by up to
0.05 %, and opset 18 has no such scale at all). Casts stand on the boundary.
"""

import numpy as np
import onnx_ir as ir

from ._onnx_graph import Array, constant, new_constant, new_node

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)
SATURATED = "saturated"
KEEPS_FLOAT = frozenset(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"))
FLOAT_INPUTS = {"Resize": (1, 2), "Upsample": (1,), "Range": (0, 1, 2)}
"""Operators with inputs that stay float32 whatever the data is: scales and regions."""


def in_float16(model: ir.Model) -> None:
    """Rewrite the model in place. A constant with values beyond float16 (-inf and -3.4e38 of attention masks, mostly)
    takes float16's largest magnitude instead, and says so in its name."""
    _Halves(model.graph).run()


class _Halves:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.halved = {node for node in graph if not _between_codes(node)}

    def run(self) -> None:
        nodes = list(self.graph)
        types = {v: v.dtype for node in nodes for v in node.outputs}
        for node in nodes:
            wanted = HALF if node in self.halved else FLOAT
            for index, value in enumerate(node.inputs):
                if value is None or (types.get(value, value.dtype) not in (FLOAT, HALF)):
                    continue
                fixed = index in FLOAT_INPUTS.get(node.op_type, ())
                self._feed(node, index, value, FLOAT if fixed else wanted)
            if wanted == HALF:
                _retype(node)
        self._restore_outputs()

    def _feed(self, node: ir.Node, index: int, value: ir.Value, wanted: ir.DataType) -> None:
        if node.op_type == "Cast" or value.dtype == wanted:
            return
        key = (value, wanted)
        if key not in self.casts:
            self.casts[key] = self._converted(node, value, wanted)
        node.replace_input_with(index, self.casts[key])

    def _converted(self, node: ir.Node, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        array = constant(value)
        if array is not None:
            return self._converted_constant(f"{value.name}_{wanted.name.lower()}", array, wanted)
        cast = new_node(node, "Cast", [value], to=wanted)
        cast.outputs[0].dtype, cast.outputs[0].shape = wanted, value.shape
        self.graph.insert_before(node, cast)
        return cast.outputs[0]

    def _converted_constant(self, name: str, array: Array, wanted: ir.DataType) -> ir.Value:
        if wanted == FLOAT:
            return new_constant(self.graph, name, array.astype(np.float32))
        beyond = bool(np.any(np.abs(array) > LARGEST))
        half = np.clip(array, -LARGEST, LARGEST).astype(np.float16)
        return new_constant(self.graph, f"{name}_{SATURATED}" if beyond else name, half)

    def _restore_outputs(self) -> None:
        for index, output in enumerate(self.graph.outputs):
            if output.dtype != HALF:
                continue
            name, output.name = output.name, f"{output.name}_half"
            cast = ir.node("Cast", [output], attributes={"to": FLOAT})
            cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].dtype = name, output.shape, FLOAT
            self.graph.append(cast)
            self.graph.outputs[index] = cast.outputs[0]


def _between_codes(node: ir.Node) -> bool:
    """True for Q/DQ themselves and for an operator, with its relu, that reads dequantized codes."""
    if node.op_type in KEEPS_FLOAT:
        return True
    first = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if first is None:
        return False
    if first.op_type == "DequantizeLinear":
        return True
    fused = node.op_type in ("Relu", "Clip", "Gemm", "Reshape") or first.op_type in ("Relu", "Clip")
    return fused and first.op_type not in KEEPS_FLOAT and _between_codes(first)


def _retype(node: ir.Node) -> None:
    """The node's float outputs are float16 now, whatever attribute says so."""
    to = node.attributes.get("to")
    if node.op_type == "Cast" and to is not None and to.as_int() == FLOAT:
        node.attributes.add(ir.AttrInt64("to", HALF))
    fill = node.attributes.get("value")
    if node.op_type == "ConstantOfShape" and (fill is None or fill.as_tensor().dtype == FLOAT):
        array = np.zeros(1, np.float16) if fill is None else fill.as_tensor().numpy().astype(np.float16)
        node.attributes.add(ir.AttrTensor("value", ir.tensor(array)))
    for output in node.outputs:
        if output.dtype == FLOAT:
            output.dtype = HALF
