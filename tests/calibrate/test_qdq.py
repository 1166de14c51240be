"""Quantization at run time: closed cases, and the rules of the runtimes it copies."""

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from calibrate import qdq
from calibrate.qdq import DYNAMIC_CONV2D, DYNAMIC_LINEAR, dynamic_codes

SCHEMES = st.sampled_from(qdq.SCHEMES)


def restored(x: Tensor, scheme: str) -> Tensor:
    codes, scale = dynamic_codes(x, scheme, (-1,))
    return codes * scale


@pytest.mark.parametrize("scheme", qdq.SCHEMES)
def test_zeros_are_zero_codes_of_scale_one(scheme: str) -> None:
    codes, scale = dynamic_codes(torch.zeros(2, 5), scheme, (-1,))
    assert torch.equal(codes, torch.zeros(2, 5))
    assert bool((scale == 1).all())


@pytest.mark.parametrize("scheme", qdq.SCHEMES)
@pytest.mark.parametrize("value", [3.5, -3.5])
def test_a_constant_is_the_end_of_its_range(scheme: str, value: float) -> None:
    codes, scale = dynamic_codes(torch.full((2, 5), value), scheme, (-1,))
    assert bool((codes == (255 if value > 0 else -255)).all())
    assert float((codes * scale - value).abs().max()) <= 1e-6 * abs(value)


@pytest.mark.parametrize("scheme", qdq.SCHEMES)
def test_negative_values_alone_use_the_whole_range_with_zero_at_its_top(scheme: str) -> None:
    x = -torch.linspace(0.1, 2.55, 30)[None]
    codes, scale = dynamic_codes(x, scheme, (-1,))
    assert (float(codes.min()), float(codes.max()) <= 0) == (-255.0, True)
    assert float(scale.max()) == pytest.approx(0.01)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**16), shift=st.floats(-5, 5), scheme=SCHEMES)
def test_codes_fit_eight_bits_and_come_back_within_a_step(seed: int, shift: float, scheme: str) -> None:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(seed)) + shift
    codes, scale = dynamic_codes(x, scheme, (-1,))
    assert torch.equal(codes, codes.round())
    span = codes.amax((-1,) if scheme == "row_int8" else None) - codes.amin((-1,) if scheme == "row_int8" else None)
    assert float(span.max()) <= 255
    # Half a step of rounding, half a step of the rounded zero point where the range is clipped.
    assert bool(((codes * scale - x).abs() <= scale * 1.001).all())


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), scheme=SCHEMES)
def test_zero_always_comes_back_as_zero(seed: int, scheme: str) -> None:
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) + 2
    x[:, 7] = 0.0
    assert bool((restored(x, scheme)[:, 7] == 0).all())


def test_rows_have_their_own_scales_and_a_tensor_has_one() -> None:
    x = torch.stack([torch.linspace(-1, 1, 9), torch.linspace(-100, 100, 9)])
    assert dynamic_codes(x, "row_int8", (-1,))[1].shape == (2, 1)
    assert dynamic_codes(x, "tensor_uint8", (-1,))[1].shape == ()
    small = restored(x, "row_int8")[0] - x[0]
    assert float(small.abs().max()) < 0.01
    assert float((restored(x, "tensor_uint8")[0] - x[0]).abs().max()) > 0.1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16), shift=st.sampled_from([-3.0, 0.0, 0.4, 3.0]), size=st.sampled_from([1e-3, 1.0, 50.0])
)
def test_a_whole_tensors_codes_are_those_of_onnx_runtime(seed: int, shift: float, size: float) -> None:
    x = (torch.randn(5, 31, generator=torch.Generator().manual_seed(seed)) + shift) * size
    y, scale, zero = SESSION.run(None, {"x": x.numpy()})
    codes, ours = dynamic_codes(x, "tensor_uint8", (-1,))
    assert float(ours) == float(scale)
    assert np.array_equal(codes.numpy(), y.astype(np.float32) - float(zero))


def session() -> onnxruntime.InferenceSession:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    kinds = {"y": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 31])]
    outputs = [helper.make_tensor_value_info(n, t, None) for n, t in kinds.items()]
    graph = helper.make_graph([node], "one", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


SESSION = session()


@pytest.mark.parametrize("scheme", qdq.SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_dynamic_linear_layer_is_an_exact_product_of_codes(scheme: str, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 20), torch.randint(-127, 128, (5, 20), dtype=torch.int8)
    scales, shift = torch.rand(5) / 100, torch.randn(5) if bias else None
    codes, scale = dynamic_codes(x, scheme, (-1,))
    total = codes.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    expected = total.astype(np.float32) * (scale * scales).numpy()
    expected = expected + shift.numpy() if shift is not None else expected
    assert np.array_equal(DYNAMIC_LINEAR(x, weight, scales, shift, scheme).numpy(), expected)


@pytest.mark.parametrize("scheme", qdq.SCHEMES)
def test_a_dynamic_convolution_is_an_exact_product_of_codes(scheme: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 6, 6), torch.randint(-127, 128, (6, 2, 3, 3), dtype=torch.int8)
    scales, shift = torch.rand(6) / 100, torch.randn(6)
    codes, scale = dynamic_codes(x, scheme, (1, 2, 3))
    total = torch.nn.functional.conv2d(codes.long(), weight.long(), None, 2, 1, 1, 2)
    expected = total.float() * (scale * scales.view(1, -1, 1, 1)) + shift.view(1, -1, 1, 1)
    assert torch.equal(DYNAMIC_CONV2D(x, weight, scales, shift, [2, 2], [1, 1], [1, 1], 2, scheme), expected)


def test_dynamic_operators_pass_torchs_own_checks_of_custom_operators() -> None:
    x, weight, scales = torch.randn(3, 8), torch.randint(-127, 128, (4, 8), dtype=torch.int8), torch.rand(4)
    torch.library.opcheck(DYNAMIC_LINEAR, (x, weight, scales, None, "row_int8"), test_utils="test_faketensor")
    image, kernel = torch.randn(2, 3, 5, 5), torch.randint(-127, 128, (4, 3, 3, 3), dtype=torch.int8)
    given = (image, kernel, scales, None, [1, 1], [0, 0], [1, 1], 1, "row_int8")
    torch.library.opcheck(DYNAMIC_CONV2D, given, test_utils="test_faketensor")
