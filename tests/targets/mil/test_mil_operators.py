"""Operators one by one against coremltools' own NumPy inference, NumPy, and torch's layers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("coremltools")

from mil_oracle import executed, inferred

from targets.errors import TargetError
from targets.mil import OPERATORS, gather_scatter, pool, quantization, recurrent, reduction, resize, shape, tensor

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
Y = RNG.standard_normal((2, 3, 4)).astype(np.float32) + 2.5
INTS = RNG.integers(-9, 9, (2, 3, 4)).astype(np.int32)
DIVISORS = np.array([3, -2, 5, -7], np.int32)
IMAGE = RNG.standard_normal((1, 4, 4, 6)).astype(np.float32)
CODES = RNG.integers(-128, 127, (3, 4)).astype(np.int8)

# float32 arithmetic in another order, or another library's exp: a few units in the last place of values below 10
CLOSE = {"rtol": 2e-6, "atol": 2e-6}

CASES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"x": X}) for name in ("abs", "atan", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor", "round")],
    *[(name, {"x": X}) for name in ("sign", "sin", "sinh", "square", "tan", "tanh", "relu", "sigmoid", "softplus")],
    *[(name, {"x": X * 0.2}) for name in ("acos", "asin", "atanh")],
    *[(name, {"x": np.abs(X)}) for name in ("sqrt", "log", "rsqrt", "inverse")],
    *[(name, {"x": X, "y": Y}) for name in ("add", "sub", "mul", "real_div", "maximum", "minimum", "floor_div", "mod")],
    *[(name, {"x": X, "y": Y[:1, :, :1]}) for name in ("add", "greater", "greater_equal", "less", "less_equal")],
    *[(name, {"x": INTS, "y": INTS[::-1].copy()}) for name in ("equal", "not_equal", "add", "mul", "maximum")],
    *[(name, {"x": INTS, "y": DIVISORS}) for name in ("floor_div", "mod")],
    *[(name, {"x": X > 0, "y": Y > 3}) for name in ("logical_and", "logical_or", "logical_xor")],
    ("logical_not", {"x": X > 0}),
    ("pow", {"x": np.abs(X), "y": np.float32(1.5)}),
    ("clip", {"x": X, "alpha": -0.5, "beta": 0.7}),
    ("threshold", {"x": X, "alpha": 0.1}),
    ("select", {"cond": X > 0, "a": X, "b": Y}),
    ("cast", {"x": X * 10, "dtype": "int32"}),
    ("cast", {"x": INTS, "dtype": "fp32"}),
    ("cast", {"x": INTS, "dtype": "bool"}),
    ("leaky_relu", {"x": X, "alpha": 0.1}),
    ("elu", {"x": X, "alpha": 1.3}),
    ("prelu", {"x": IMAGE, "alpha": np.array([0.1, 0.2, 0.3, 0.4], np.float32)}),
    ("softsign", {"x": X}),
    ("linear_activation", {"x": X, "alpha": 2.0, "beta": -1.0}),
    ("scaled_tanh", {"x": X, "alpha": 2.0, "beta": 0.5}),
    ("sigmoid_hard", {"x": X, "alpha": 0.2, "beta": 0.5}),
    ("thresholded_relu", {"x": X, "alpha": 0.4}),
    ("softplus_parametric", {"x": X, "alpha": X[0, :, 0].copy(), "beta": X[0, :, 1].copy()}),
    ("softmax", {"x": X, "axis": 1}),
    *[(f"reduce_{k}", {"x": X, "axes": [0, -1], "keep_dims": True}) for k in ("max", "min", "mean", "sum", "prod")],
    *[(f"reduce_{k}", {"x": X, "axes": [1], "keep_dims": False}) for k in ("l1_norm", "l2_norm", "sum_square")],
    ("reduce_log_sum", {"x": np.abs(X), "axes": [2], "keep_dims": False}),
    ("reduce_log_sum_exp", {"x": X, "axes": [2], "keep_dims": True}),
    ("reduce_argmax", {"x": X, "axis": 1, "keep_dims": False}),
    ("reduce_argmin", {"x": X, "axis": 2, "keep_dims": True}),
    ("cumsum", {"x": X, "axis": 1, "exclusive": False, "reverse": False}),
    ("cumsum", {"x": X, "axis": 1, "exclusive": False, "reverse": True}),
    ("argsort", {"x": X, "axis": 1, "ascending": True}),
    ("topk", {"x": X, "k": 2, "axis": -1, "ascending": False}),
    ("topk", {"x": X, "k": 2, "axis": 1, "ascending": True}),
    ("matmul", {"x": X, "y": Y, "transpose_x": False, "transpose_y": True}),
    ("linear", {"x": X, "weight": Y[0], "bias": np.ones(3, np.float32)}),
    ("einsum", {"values": (IMAGE, IMAGE.swapaxes(1, 3).copy()), "equation": "nchw,nwhu->nchu"}),
    ("gather", {"x": X, "indices": np.array([[2, 0], [1, -1]], np.int32), "axis": 1}),
    ("gather_along_axis", {"x": X, "indices": np.abs(INTS) % 3, "axis": 1}),
    ("concat", {"values": (X, Y), "axis": 1}),
    ("stack", {"values": (X, Y), "axis": 1}),
    ("split", {"x": X, "split_sizes": [1, 3], "axis": 2}),
    ("split", {"x": X, "num_splits": 2, "axis": 2}),
    ("tile", {"x": X, "reps": [1, 2, 3]}),
    ("fill", {"shape": [2, 3], "value": 1.5}),
    ("fill", {"shape": [2], "value": True}),
    ("shape", {"x": X}),
    ("range_1d", {"end": np.int32(11), "start": np.int32(2), "step": np.int32(3)}),
    ("band_part", {"x": X[0], "lower": 0, "upper": -1}),
    ("band_part", {"x": X[0], "lower": 1, "upper": 1}),
    ("pad", {"x": X, "pad": [1, 2, 0, 1], "mode": "constant", "constant_val": 3.0}),
    ("pad", {"x": X, "pad": [1, 1, 2, 1], "mode": "reflect"}),
    ("pad", {"x": X, "pad": [3, 0, 2, 5], "mode": "replicate"}),
    ("reshape", {"x": X, "shape": [4, -1]}),
    ("reshape", {"x": X[0], "shape": [1, 0, -1, 0]}),
    ("expand_dims", {"x": X, "axes": [0, -1]}),
    ("squeeze", {"x": X[:1, :, :1].copy(), "axes": [0, -1]}),
    ("squeeze", {"x": X[:1, :, :1].copy()}),
    ("transpose", {"x": X, "perm": [2, 0, 1]}),
    ("reverse", {"x": X, "axes": [0, 2]}),
    ("slice_by_index", {"x": X, "begin": [0, 1, -3], "end": [2, 3, -1]}),
    ("slice_by_index", {"x": X, "begin": [1, 2, 3], "end": [0, 0, 0], "stride": [1, -1, -2],
                        "end_mask": [True, False, True]}),
    ("slice_by_index", {"x": X, "begin": [1, 0, 1], "end": [0, 0, 3], "squeeze_mask": [True, False, False],
                        "begin_mask": [False, True, False], "end_mask": [False, True, False]}),
    ("slice_by_size", {"x": X, "begin": [0, 1, 2], "size": [1, -1, 2]}),
    ("identity", {"x": X}),
]  # fmt: skip


def label(case: tuple[str, dict[str, Any]]) -> str:
    return case[0]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_an_operator_agrees_with_what_coremltools_infers(case: tuple[str, dict[str, Any]]) -> None:
    operator, arguments = case
    expected = inferred(operator, **arguments)
    for ours, theirs in zip(executed(operator, **arguments), expected, strict=True):
        assert ours.shape == theirs.shape
        if theirs.dtype.kind == "f":
            np.testing.assert_allclose(ours, theirs, **CLOSE)
        else:
            np.testing.assert_array_equal(ours, theirs)


def test_what_coremltools_infers_wrongly_follows_the_documentation() -> None:
    assert tensor.concat([torch.tensor([1, 2]), torch.tensor([3, 4])], 0, interleave=True).tolist() == [1, 3, 2, 4]
    x = torch.tensor([1, 2, 3])
    assert reduction.cumsum(x, 0, exclusive=True).tolist() == [0, 1, 3]
    assert reduction.cumsum(x, 0, exclusive=True, reverse=True).tolist() == [5, 3, 0]


def test_float16_results_are_rounded_once_at_the_output() -> None:
    x = np.array([1.0, 2048.0, 60000.0], np.float16)
    y = np.array([0.0004, 1.0, 60000.0], np.float16)
    (ours,) = executed("add", x=x, y=y)
    np.testing.assert_array_equal(ours, np.array([1.0, 2048.0, np.inf], np.float32))


def test_the_executor_is_not_fooled_by_a_wrong_operator() -> None:
    (ours,) = executed("mul", x=X, y=Y)
    (theirs,) = inferred("add", x=X, y=Y)
    assert not np.allclose(ours, theirs, **CLOSE)


@given(st.floats(0.0078125, 3.0, width=32), st.integers(-128, 127), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_quantize_is_torchs_fake_quantize(scale: float, zero: int, seed: int) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 50
    codes = quantization.quantize(x, scale, "int8", zero)
    expected = torch.clamp(torch.round(x * (1.0 / scale)) + zero, -128, 127)
    assert torch.equal(codes.float(), expected)
    assert torch.equal(quantization.dequantize(codes, scale, zero), (expected - zero) * scale)


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 1e9, -1e9])
    assert quantization.quantize(x, 1.0, "int8").tolist() == [0, 2, 2, 0, 127, -128]
    assert quantization.quantize(x, 1.0, "uint8", 128).tolist() == [128, 130, 130, 128, 255, 0]


def test_codes_are_dequantized_per_channel_and_per_block() -> None:
    scale, zero = np.array([0.1, 0.2, 0.3], np.float32), np.array([1, -2, 3], np.int8)
    expected = (CODES.astype(np.float32) - zero[:, None]) * scale[:, None]
    for operator, data in (("dequantize", "input"), ("constexpr_affine_dequantize", "quantized_data")):
        (ours,) = executed(operator, **{data: CODES, "scale": scale, "zero_point": zero, "axis": np.int32(0)})
        np.testing.assert_array_equal(ours, expected)
    blocks = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)
    (ours,) = executed("constexpr_blockwise_shift_scale", data=CODES, scale=blocks)
    np.testing.assert_array_equal(ours, CODES * np.repeat(blocks, 2, axis=1))


def test_one_hot_and_gather_nd_are_numpys() -> None:
    (ours,) = executed("one_hot", indices=np.array([0, 2], np.int32), one_hot_vector_size=3, axis=0)
    np.testing.assert_array_equal(ours, np.eye(3)[[0, 2]].T)
    (ours,) = executed("gather_nd", x=X, indices=np.array([[0, 2], [1, 1]], np.int32))
    np.testing.assert_array_equal(ours, X[[0, 1], [2, 1]])


def test_packed_weights_unpack_least_significant_bit_first() -> None:
    lut = torch.tensor([1.0, 5.0, 9.0, 13.0])
    packed = torch.tensor([0b01101100, 0b00000011], dtype=torch.uint8)  # indices 0, 3, 2, 1, 3
    dense = quantization.constexpr_lut_to_dense(packed, lut, shape=[5])
    assert dense.tolist() == [1.0, 13.0, 9.0, 5.0, 13.0]
    sparse = quantization.constexpr_sparse_to_dense(
        torch.tensor([7.0, 8.0]), torch.tensor([0b00001100], dtype=torch.uint8), shape=[5]
    )
    assert sparse.tolist() == [0.0, 0.0, 7.0, 8.0, 0.0]


def test_a_lookup_table_per_group_is_that_of_the_documentation() -> None:
    indices = torch.tensor([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3], dtype=torch.uint8).view(6, 2)
    lut = torch.tensor([1.0, 5.0, 9.0, 13.0, 2.0, 10.0, 18.0, 26.0]).view(2, 1, 4, 1)
    expected = [[9.0, 13.0], [13.0, 1.0], [5.0, 1.0], [26.0, 2.0], [18.0, 10.0], [2.0, 26.0]]
    assert quantization.constexpr_lut_to_dense(indices, lut).tolist() == expected


def test_a_lookup_table_of_vectors_fills_its_axis() -> None:
    indices = torch.tensor([[[0, 0], [1, 0]], [[1, 1], [0, 0]]], dtype=torch.uint8)
    lut = torch.tensor([[1, 2, 3], [7, 8, 9]], dtype=torch.int8).view(1, 1, 1, 2, 3)
    dense = quantization.constexpr_lut_to_dense(indices, lut, vector_axis=1)
    assert dense[0].tolist() == [[1, 1], [2, 2], [3, 3], [7, 1], [8, 2], [9, 3]]
    last = quantization.constexpr_lut_to_dense(indices, lut, vector_axis=2)
    assert last[0].tolist() == [[1, 2, 3, 1, 2, 3], [7, 8, 9, 1, 2, 3]]


@pytest.mark.parametrize(("mode", "combine"), [("add", np.add), ("mul", np.multiply), ("max", np.maximum),
                                               ("sub", np.subtract), ("min", np.minimum)])  # fmt: skip
def test_scatter_combines_row_after_row(mode: str, combine: np.ufunc) -> None:
    data, updates = X[0].copy(), Y[0].copy()
    rows = np.array([2, 0, 2])
    ours = gather_scatter.scatter(torch.tensor(data), torch.tensor(rows), torch.tensor(updates), 0, mode)
    combine.at(data, rows, updates)
    np.testing.assert_allclose(ours.numpy(), data, **CLOSE)


def test_scatters_write_where_the_gathers_read() -> None:
    x, indices = torch.tensor(X), torch.tensor(np.abs(INTS) % 4)
    zeros = torch.zeros_like(x)
    written = gather_scatter.scatter_along_axis(zeros, indices[:, :, :1], x[:, :, :1], 2, "update")
    assert torch.equal(gather_scatter.gather_along_axis(written, indices[:, :, :1], 2), x[:, :, :1])
    places = torch.tensor([[0, 2], [1, 0]])
    written = gather_scatter.scatter_nd(zeros, places, x[0, :2], "update")
    assert torch.equal(gather_scatter.gather_nd(written, places), x[0, :2])
    along = gather_scatter.scatter(zeros, torch.tensor([2, 0]), x[:, :2], 1, "update")
    assert torch.equal(along[:, [2, 0]], x[:, :2])


def test_blocks_of_space_and_depth_come_back() -> None:
    x = torch.tensor(IMAGE)
    assert torch.equal(shape.depth_to_space(shape.space_to_depth(x, 2), 2), x)
    assert torch.equal(shape.pixel_shuffle(shape.pixel_unshuffle(x, 2), 2), x)
    blocks = shape.space_to_batch(x, [2, 3], [[1, 1], [0, 0]])
    assert blocks.shape == (6, 4, 3, 2)
    assert torch.equal(shape.batch_to_space(blocks, [2, 3], [[1, 1], [0, 0]]), x)
    assert torch.equal(shape.sliding_windows(x, 3, 2, 2)[:, :, :, 1], x[:, :, :, 2:4])
    assert torch.equal(shape.crop(x, [1, 1], [0, 2]), x[:, :, 1:3, :4])


def test_rarer_reshapes_follow_their_documentation() -> None:
    x = torch.tensor(X)
    assert shape.flatten2d(x, 2).shape == (6, 4)
    assert shape.reshape_like(x, [torch.zeros(4, 9), torch.zeros(6)], [0, 0], [1, 0], [False, True]).shape == (4, 6)
    turned = shape.reverse_sequence(x, [1, 3], 1, 0)
    assert torch.equal(turned[0], x[0])
    assert torch.equal(turned[1], x[1].flip(0))
    updated = shape.slice_update(x, torch.zeros(1, 3, 2), [0, 0, 1], [1, 3, 3])
    assert torch.equal(updated[0, :, 1:3], torch.zeros(3, 2))
    assert torch.equal(updated[1], x[1])
    assert torch.equal(tensor.fill_like(x, 2.0), torch.full((2, 3, 4), 2.0))


@pytest.mark.parametrize(("mode", "places"), [
    ("STRICT_ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]), ("DEFAULT", [0.0, 0.4, 0.8, 1.0, 1.0]),
    ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]), ("UNALIGN_CORNERS", [0.0, 0.1, 0.5, 0.9, 1.0]),
])  # fmt: skip
def test_resizing_samples_where_the_documentation_says(mode: str, places: list[float]) -> None:
    x = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    y = resize.resize_bilinear(x, 2, 5, mode)
    np.testing.assert_allclose(y[0, 0, 0].numpy(), places, atol=1e-6)
    np.testing.assert_allclose(resize.resize(x, [5], 1, "LINEAR", mode)[0, 0, 0].numpy(), places, atol=1e-6)


def test_resampling_is_grid_sample() -> None:
    x, grid = torch.tensor(IMAGE), torch.tensor(RNG.uniform(-1.2, 1.2, (1, 3, 5, 2)).astype(np.float32))
    expected = torch.nn.functional.grid_sample(x, grid, "bilinear", "border", True)
    ours = resize.resample(x, (grid + 1) / 2, "bilinear", "border", 0.0, "normalized_zero_to_one", True)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TargetError, match="symmetric"):
        resize.resample(x, grid, "bilinear", "symmetric", 0.0, "normalized_minus_one_to_one", True)


def test_pools_count_or_leave_out_uneven_padding() -> None:
    x = torch.ones(1, 1, 4, 4)
    counted = pool.avg_pool(x, [3, 3], "custom", [1, 1], [0, 2, 0, 2])
    left_out = pool.avg_pool(x, [3, 3], "custom", [1, 1], [0, 2, 0, 2], exclude_padding_from_average=True)
    assert counted[0, 0, -1, -1] == pytest.approx(1 / 9)
    assert torch.allclose(left_out, torch.ones_like(left_out))
    assert pool.max_pool(-x, [2, 2], "same", [3, 3]).max() == -1.0
    assert pool.l2_pool(2 * x, [2, 2], "valid", [2, 2])[0, 0, 0, 0] == pytest.approx(4.0)


def test_a_two_way_lstm_is_torchs() -> None:
    torch.manual_seed(0)
    layer = torch.nn.LSTM(5, 4, bidirectional=True)
    x = torch.randn(7, 2, 5)
    expected, (h, c) = layer(x)

    def ordered(w: torch.Tensor) -> torch.Tensor:
        i, f, g, o = w.chunk(4)  # torch: input, forget, cell, output
        return torch.cat([i, f, o, g])

    w = {k: ordered(v.detach()) for k, v in layer.state_dict().items()}
    y, last_h, last_c = recurrent.lstm(
        x, torch.zeros(2, 8), torch.zeros(2, 8), w["weight_ih_l0"], w["weight_hh_l0"],
        w["bias_ih_l0"] + w["bias_hh_l0"], w["weight_ih_l0_reverse"], w["weight_hh_l0_reverse"],
        w["bias_ih_l0_reverse"] + w["bias_hh_l0_reverse"], "bidirectional", True,
    )  # fmt: skip
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last_h, torch.cat(list(h), -1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last_c, torch.cat(list(c), -1), rtol=1e-5, atol=1e-6)


def test_a_gru_is_torchs() -> None:
    torch.manual_seed(0)
    layer = torch.nn.GRU(5, 4)
    x = torch.randn(7, 2, 5)
    expected, h = layer(x)

    def ordered(w: torch.Tensor) -> torch.Tensor:
        r, z, n = w.chunk(3)  # torch: reset, update, new
        return torch.cat([r, n, z])

    w = {k: ordered(v.detach()) for k, v in layer.state_dict().items()}
    y, last = recurrent.gru(x, torch.zeros(2, 4), w["weight_ih_l0"], w["weight_hh_l0"], w["bias_hh_l0"],
                            output_sequence=True, input_bias=w["bias_ih_l0"])  # fmt: skip
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, h[0], rtol=1e-5, atol=1e-6)


def test_what_mil_leaves_open_is_refused() -> None:
    with pytest.raises(TargetError, match="real_div of integers"):
        OPERATORS["real_div"](torch.tensor([3]), torch.tensor([2]))
    with pytest.raises(TargetError, match="no mode 'middle'"):
        OPERATORS["pad"](torch.ones(2), [1, 1], "middle")
    with pytest.raises(TargetError, match="no mode 'sum'"):
        OPERATORS["scatter"](torch.ones(2), torch.tensor([0]), torch.ones(1), 0, "sum")


def test_a_reduction_over_no_named_axes_takes_all() -> None:
    assert reduction.OPS["reduce_sum"](torch.ones(2, 3)).item() == 6.0
