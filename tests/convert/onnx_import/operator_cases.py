"""One node per form of every operator, with inputs; `test_operators.py` runs them."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

F = np.float32
I = np.int64  # noqa: E741
RNG = np.random.default_rng(0)


def f(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return RNG.uniform(low, high, shape).astype(F)


def i(*values: Any) -> np.ndarray:
    return np.array(values if len(values) != 1 or isinstance(values[0], int) else values[0], I)


class Case(NamedTuple):
    """One node: `inputs` run-time arrays, `fixed` initializers behind them (None: absent)."""

    op: str
    inputs: list[np.ndarray]
    fixed: Sequence[np.ndarray | None] = ()
    attributes: Mapping[str, Any] = MappingProxyType({})
    opset: int = 18
    outputs: int = 1

    def __str__(self) -> str:
        attributes = ",".join(f"{k}={v}" for k, v in self.attributes.items() if not isinstance(v, onnx.TensorProto))
        return f"{self.op}-{self.opset}-{attributes}-{len(self.fixed)}"


X = f(2, 3, 8, 8)
UNARY = re.findall(
    r"\w+",
    "Abs Neg Sign Ceil Floor Round Exp Sin Cos Tan Sinh Cosh Tanh Asinh Atan Erf Sigmoid Relu HardSwish Softplus "
    "Softsign Mish Identity LeakyRelu Elu Celu Selu HardSigmoid ThresholdedRelu Shrink IsNaN Reciprocal Softmax "
    "LogSoftmax Hardmax GlobalAveragePool GlobalMaxPool MeanVarianceNormalization Dropout Flatten Transpose Size Shape",
)
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp")
ALIGNED = {"coordinate_transformation_mode": "align_corners"}
HEADS = {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1}
CODES = RNG.integers(0, 255, (2, 3)).astype(np.uint8)
SIGNED = RNG.integers(-99, 99, (3, 4)).astype(np.int8)


def cases() -> list[Case]:
    yes = RNG.random((2, 3)) > 0.5
    ids = i([[0, 2], [1, 0]])
    return [
        *(Case(op, [X]) for op in UNARY),
        *(Case(op, [f(2, 3, low=0.1)]) for op in ("Sqrt", "Log")),
        Case("Acosh", [f(2, 3, low=1.1, high=3)]),
        *(Case(op, [f(2, 3, low=-0.9, high=0.9)]) for op in ("Asin", "Acos", "Atanh")),
        *(Case(op, [f(2, 3, 4), f(3, 1)]) for op in ("Add", "Sub", "Mul", "Div")),
        *(Case(op, [f(2, 3), f(2, 3)]) for op in (*COMPARISONS, "Min", "Max", "Sum", "Mean")),
        *(Case(op, [yes, ~yes]) for op in ("And", "Or", "Xor")),
        *(Case(op, [i(6, 5), i(3, 1)]) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
        Case("BitwiseNot", [i(6, 5)]),
        Case("Not", [yes]),
        Case("Div", [i(-7, 7, 7), i(2, -2, 2)]),
        Case("Pow", [f(2, 3, low=0.1)], [np.array(2.5, F)]),
        Case("Mod", [i(-7, 7, 7), i(2, -2, 2)]),
        Case("Mod", [f(2, 3), f(2, 3, low=0.5)], attributes={"fmod": 1}),
        Case("BitShift", [np.array([8, 3], np.uint8), np.array([1, 1], np.uint8)], attributes={"direction": "RIGHT"}),
        Case("Where", [yes, f(2, 3), f(2, 3)]),
        Case("IsInf", [np.array([1, np.inf, -np.inf], F)], attributes={"detect_negative": 0}),
        Case("Clip", [X], [np.array(-1, F), np.array(1, F)]),
        Case("Clip", [X], [None, np.array(1, F)]),
        Case("Clip", [X], attributes={"min": -1.0, "max": 0.5}, opset=9),
        Case("Cast", [X], attributes={"to": TensorProto.INT32}),
        Case("CastLike", [X], [i(1)]),
        Case("PRelu", [X], [f(3, 1, 1)]),
        Case("PRelu", [X], [f(8)]),
        Case("HardSigmoid", [X], attributes={"alpha": 1 / 6}),
        Case("Gelu", [X], opset=20),
        Case("Gelu", [X], attributes={"approximate": "tanh"}, opset=20),
        Case("Softmax", [X], opset=11),
        Case("Softmax", [X], attributes={"axis": 3}, opset=11),
        Case("LogSoftmax", [X], attributes={"axis": 1}),
        Case("Hardmax", [X], attributes={"axis": 1}),
        Case("Conv", [X], [f(4, 3, 3, 3), f(4)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        Case("Conv", [X], [f(4, 3, 3, 3)], {"pads": [0, 1, 1, 0]}),
        Case("Conv", [X], [f(3, 1, 3, 3)], {"group": 3, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        Case("Conv", [X], [f(3, 1, 2, 2)], {"group": 3, "auto_pad": "SAME_LOWER"}),
        Case("Conv", [f(2, 3, 9)], [f(4, 3, 3)], {"dilations": [2]}),
        Case("ConvTranspose", [X], [f(3, 4, 3, 3), f(4)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        Case(
            "ConvTranspose", [X], [f(3, 2, 3, 3)], {"strides": [2, 2], "pads": [0, 0, 1, 1], "output_padding": [1, 1]}
        ),
        Case("ConvTranspose", [X], [f(3, 2, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        Case("MaxPool", [X], attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        Case("MaxPool", [X], attributes={"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
        Case("MaxPool", [X], attributes={"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
        Case("AveragePool", [X], attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        Case("AveragePool", [X], attributes={"kernel_shape": [3, 3], "pads": [0, 1, 1, 1], "count_include_pad": 1}),
        Case("AveragePool", [X], attributes={"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
        Case("DepthToSpace", [f(2, 8, 3, 3)], attributes={"blocksize": 2}),
        Case("DepthToSpace", [f(2, 8, 3, 3)], attributes={"blocksize": 2, "mode": "CRD"}),
        Case("SpaceToDepth", [X], attributes={"blocksize": 2}),
        Case("Upsample", [X], [np.array([1, 1, 2, 2], F)], opset=9),
        Case("Resize", [X], [None, np.array([1, 1, 2, 2], F)], {"mode": "nearest"}),
        Case("Resize", [X], [None, np.array([1, 1, 1.5, 0.5], F)], {"mode": "nearest", "nearest_mode": "floor"}),
        Case("Resize", [X], [None, None, i(2, 3, 11, 5)], {"mode": "nearest"}),
        Case("Resize", [X], [None, None, i(2, 3, 11, 5)], {"mode": "nearest", **ALIGNED}),
        Case("Resize", [X], [None, np.array([1, 1, 2, 2], F)], {"mode": "linear"}),
        Case("Resize", [X], [None, None, i(2, 3, 5, 16)], {"mode": "linear", **ALIGNED}),
        Case("Resize", [X], [None, None, i(2, 3, 16, 16)], {"mode": "cubic"}),
        Case("BatchNormalization", [X], [f(3), f(3), f(3), f(3, low=0.1)]),
        Case("InstanceNormalization", [X], [f(3), f(3)]),
        Case("LayerNormalization", [X], [f(8), f(8)]),
        Case("LayerNormalization", [X], [f(8, 8)], {"axis": 2, "epsilon": 1e-3}),
        Case("GroupNormalization", [f(2, 4, 5, 5)], [f(4), f(4)], {"num_groups": 2}, 21),
        Case("RMSNormalization", [X], [f(8)], opset=23),
        Case("LpNormalization", [X], attributes={"axis": 1}),
        Case("LRN", [X], attributes={"size": 3}),
        Case("MatMul", [f(2, 3, 4), f(2, 4, 5)]),
        Case("Gemm", [f(2, 3)], [f(4, 3), f(4)], {"transB": 1}),
        Case("Gemm", [f(3, 2)], [f(3, 4), f(1, 4)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
        Case("Einsum", [f(2, 3, 4), f(2, 4, 5)], attributes={"equation": "bij,bjk->bik"}),
        Case("Attention", [f(2, 3, 5, 4), f(2, 3, 5, 4), f(2, 3, 5, 4)], opset=23),
        Case("Attention", [f(2, 5, 6), f(2, 5, 6), f(2, 5, 6)], attributes=HEADS, opset=23),
        Case("Reshape", [X], [i(0, -1, 4)]),
        Case("Flatten", [X], attributes={"axis": 2}),
        Case("Transpose", [X], attributes={"perm": [0, 2, 3, 1]}),
        Case("Squeeze", [f(2, 1, 3, 1)], [i([1, 3])]),
        Case("Squeeze", [f(2, 1, 3, 1)], attributes={"axes": [1]}, opset=11),
        Case("Unsqueeze", [f(2, 3)], [i([0, -1])]),
        Case("Concat", [f(2, 3), f(2, 4)], attributes={"axis": 1}),
        Case("Split", [X], [i(3, 5)], {"axis": 2}, outputs=2),
        Case("Split", [X], attributes={"axis": 2, "num_outputs": 3}, outputs=3),
        Case("Slice", [X], [i([1]), i([7]), i([2]), i([2])]),
        Case("Slice", [X], [i([-1]), i([-9]), i([3]), i([-2])]),
        Case("Slice", [X], attributes={"starts": [1, 0], "ends": [3, 100], "axes": [1, 2]}, opset=9),
        Case("Expand", [f(3, 1)], [i(2, 1, 4)]),
        Case("Tile", [f(2, 3)], [i(2, 2)]),
        Case("Pad", [X], [i(0, 0, 1, 2, 0, 0, 3, 4), np.array(0.5, F)]),
        Case("Pad", [X], [i(0, 0, -1, 2, 0, 0, 1, -2)]),
        Case("Pad", [X], [i(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "reflect"}),
        Case("Pad", [X], [i(0, 0, 1, 0, 0, 0, 3, 0)], {"mode": "edge"}),
        Case("Pad", [X], [i(1, 2), None, i([2])]),
        Case("Pad", [X], attributes={"pads": [0, 0, 1, 2, 0, 0, 3, 4], "value": 1.0}, opset=9),
        Case("Trilu", [f(4, 4)], [np.array(1, I)]),
        Case("Trilu", [f(4, 4)], attributes={"upper": 0}),
        Case("EyeLike", [f(3, 4)], attributes={"k": 1}),
        Case("Gather", [X], [i([2, 0])], {"axis": 1}),
        Case("Gather", [X], [np.array(-1, I)], {"axis": 2}),
        Case("Gather", [X, ids], attributes={"axis": 1}),
        Case("GatherElements", [f(2, 2), i([[0, -1], [1, 0]])], attributes={"axis": 1}),
        Case("GatherND", [f(3, 4, 5), i([[0, 1], [2, 3]])]),
        Case("ScatterElements", [f(3, 3), i([[1, 0, 2]]), f(1, 3)], attributes={"axis": 0}),
        Case("ScatterElements", [f(3, 3), i([[1, 0, 2]]), f(1, 3)], attributes={"axis": 0, "reduction": "add"}),
        Case("ScatterND", [f(4, 3), i([[1], [3]]), f(2, 3)]),
        Case("OneHot", [i(0, 2, 1)], [np.array([3], I), np.array([0, 1], F)]),
        Case("TopK", [f(3, 7)], [i([3])], outputs=2),
        Case("TopK", [f(3, 7)], [i([2])], {"largest": 0, "axis": 0}, outputs=2),
        Case("ArgMax", [X], attributes={"axis": 1, "keepdims": 0}),
        Case("ArgMin", [X], attributes={"axis": 2, "select_last_index": 1}),
        Case("CumSum", [X], [np.array(1, I)]),
        Case("CumSum", [X], [np.array(2, I)], {"exclusive": 1, "reverse": 1}),
        Case("ReverseSequence", [f(4, 3, 2), i(2, 4, 3)]),
        *(Case(f"Reduce{op}", [f(2, 3, 4, low=0.2)], [i([1, 2])]) for op in REDUCTIONS),
        Case("ReduceLogSum", [f(2, 3, low=0.2)], [i([1])]),
        Case("ReduceMean", [X], attributes={"axes": [2, 3], "keepdims": 0}, opset=13),
        Case("ReduceSum", [X], attributes={"noop_with_empty_axes": 1}),
        Case("QuantizeLinear", [X], [np.array(0.05, F), np.array(3, np.uint8)]),
        Case("QuantizeLinear", [X], [f(3, low=0.01, high=0.05), np.array([0, 0, 0], np.int8)], {"axis": 1}),
        Case("DequantizeLinear", [SIGNED], [f(4, low=0.1), np.zeros(4, np.int8)], {"axis": 1}),
        Case("DynamicQuantizeLinear", [f(3, 4)], outputs=3),
        Case("MatMulInteger", [CODES], [SIGNED, np.array(7, np.uint8)]),
    ]
