"""Weights as codes: exact where they can be, never overflowing, the same when done twice."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import ISLANDS, capture, images, only
from torch import Tensor, nn

from calibrate import qdq
from calibrate.graph import constant, finish, run
from calibrate.plan import WeightFormat
from calibrate.weights import fitted_scales, quantize_weight, spread, weight_codes, weight_scales

MAXIMA = st.sampled_from([127, 63])


def weights(seed: int, shape: tuple[int, ...] = (4, 3, 3, 3)) -> Tensor:
    """Normal weights whose channels differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-6, 4, (shape[0], *[1] * (len(shape) - 1)), generator=generator)
    return torch.randn(shape, generator=generator) * size


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * scales.view(-1, *[1] * (codes.dim() - 1))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), largest=MAXIMA, per_channel=st.booleans(), half=st.booleans())
def test_the_codes_of_dequantized_codes_are_the_codes(seed: int, largest: int, per_channel: bool, half: bool) -> None:
    weight = weights(seed)
    scales = weight_scales(weight, largest, per_channel, half_scales=half)
    codes = weight_codes(weight, scales, -largest, largest)
    again = dequantized(codes, scales)
    assert torch.equal(weight_codes(again, scales, -largest, largest), codes)
    if not half:  # the scales of the dequantized weight are the same but for float32 rounding
        assert torch.equal(weight_codes(again, weight_scales(again, largest, per_channel), -largest, largest), codes)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), largest=MAXIMA, per_channel=st.booleans(), half=st.booleans())
def test_every_weight_comes_back_within_half_a_step(seed: int, largest: int, per_channel: bool, half: bool) -> None:
    weight = weights(seed)
    scales = weight_scales(weight, largest, per_channel, half_scales=half)
    codes = weight_codes(weight, scales, -largest, largest)
    error = (dequantized(codes, scales) - weight).abs() / scales.view(-1, 1, 1, 1)
    assert int(codes.abs().max()) <= largest
    assert float(error.max()) <= 0.5 + 1e-4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), power=st.integers(-3, 3))
def test_weights_twice_as_large_have_scales_twice_as_large_and_the_same_codes(seed: int, power: int) -> None:
    weight, factor = weights(seed), 2.0**power
    once, scaled = weight_scales(weight, 127, True), weight_scales(factor * weight, 127, True)
    assert torch.equal(scaled, factor * once)
    assert torch.equal(weight_codes(weight, once, -127, 127), weight_codes(factor * weight, scaled, -127, 127))


def test_scales_that_must_be_float16_numbers_are() -> None:
    scales = weight_scales(weights(3), 127, True, half_scales=True)
    assert torch.equal(scales.half().float(), scales)


def test_one_scale_for_all_is_that_of_the_largest_weight() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    assert weight_scales(weight, 127, False).tolist() == pytest.approx([2 / 127] * 2)


def test_a_channel_of_zeros_takes_the_largest_scale_and_zero_codes() -> None:
    weight = torch.tensor([[0.0, 0.0], [0.5, -1.0]])
    scales = weight_scales(weight, 127, True)
    assert scales[0] == scales[1]
    assert weight_codes(weight, scales, -127, 127)[0].tolist() == [0, 0]


def test_a_weight_of_zeros_alone_has_a_positive_scale() -> None:
    scales = weight_scales(torch.zeros(3, 4), 127, True)
    assert bool((scales > 0).all())
    assert int(weight_codes(torch.zeros(3, 4), scales, -127, 127).abs().max()) == 0


def test_weights_too_small_for_float32_scales_become_zeros_not_garbage() -> None:
    weight = torch.tensor([[1e-42, -1e-44], [1.0, 2.0]])
    scales = weight_scales(weight, 127, True)
    assert bool((scales > 0).all())
    assert weight_codes(weight, scales, -127, 127)[0].tolist() == [0, 0]


def test_a_bias_too_large_for_int32_widens_its_channels_scale() -> None:
    weight, bias, step = torch.tensor([[1e-7, 1e-7], [1.0, -1.0]]), torch.tensor([5.0, 5.0]), 1e-3
    plain, widened = weight_scales(weight, 127, True), weight_scales(weight, 127, True, bias, step)
    assert float(bias[0] / (step * plain[0])) > 2**31  # would overflow
    assert float(bias[0] / (step * widened[0])) <= 2**30 * (1 + 1e-6)
    assert widened[1] == plain[1]


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Conv2d(3, 4, 3), images()),
        (nn.Linear(6, 5), torch.randn(3, 6)),
        (nn.Embedding(10, 6), torch.arange(4)[:, None]),
    ],
    ids=["conv", "linear", "embedding"],
)
def test_a_graph_computes_with_the_weight_that_its_codes_stand_for(module: nn.Module, inputs: Tensor) -> None:
    graph = capture(nn.Sequential(module), inputs)
    what = {"Conv2d": "conv", "Linear": "linear", "Embedding": "embedding"}[type(module).__name__]
    quantize_weight(graph, only(graph, what), ISLANDS)
    finish(graph)
    dequantize = only(graph, "qdq")
    assert dequantize.target is qdq.DEQUANTIZE_CHANNEL
    codes, scales, zeros = (constant(graph, n) for n in dequantize.args[:3])
    assert (codes.dtype, scales.dtype, zeros.dtype) == (torch.int8, torch.float32, torch.int64)
    assert not bool(zeros.any())
    module.weight.data = dequantized(codes, scales)
    assert torch.equal(run(graph, [inputs])[0], module(inputs))
    assert "0_weight" not in dict(graph.named_parameters())  # the float weight is gone


FORMATS = st.builds(
    WeightFormat,
    bits=st.sampled_from([8, 4, 3, 2]),
    group=st.sampled_from([None, 8, 16]),
    power_of_two=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), form=FORMATS)
def test_codes_of_every_format_stay_in_its_range_and_are_their_own_codes(seed: int, form: WeightFormat) -> None:
    weight = weights(seed, (6, 32))
    low, high = ISLANDS.code_range(form.bits)
    scales = fitted_scales(weight, ISLANDS, form)
    codes = weight_codes(weight, scales, low, high)
    assert int(codes.min()) >= low
    assert int(codes.max()) <= high
    assert scales.shape == ((6,) if form.group is None else (6, 32 // form.group))
    again = (codes.double() * spread(scales.double(), weight.shape)).float()
    assert torch.equal(weight_codes(again, scales, low, high), codes)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.sampled_from([4, 3, 2]))
def test_scales_of_few_bits_leave_less_error_than_the_largest_weight_would(seed: int, bits: int) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    low, high = ISLANDS.code_range(bits)

    def error(scales: Tensor) -> float:
        codes = weight_codes(weight, scales, low, high)
        return float((codes * spread(scales, weight.shape) - weight).square().sum())

    widest = weight_scales(weight, high, True)
    assert error(fitted_scales(weight, ISLANDS, WeightFormat(bits))) <= error(widest) * (1 + 1e-6)
    groups = error(fitted_scales(weight, ISLANDS, WeightFormat(bits, group=16)))
    assert groups < error(widest)


def test_scales_that_are_to_be_powers_of_two_are() -> None:
    scales = fitted_scales(weights(5, (4, 64)), ISLANDS, WeightFormat(4, group=32, power_of_two=True))
    assert torch.equal(scales, torch.exp2(torch.round(torch.log2(scales))))
    plain = fitted_scales(weights(5, (4, 64)), ISLANDS, WeightFormat(4, group=32))
    assert not torch.equal(plain, torch.exp2(torch.round(torch.log2(plain))))


@pytest.mark.parametrize("group", [48, 64])
def test_rows_that_no_group_divides_or_one_fills_keep_a_scale_per_channel(group: int) -> None:
    assert fitted_scales(weights(1, (4, 64)), ISLANDS, WeightFormat(4, group=group)).shape == (4,)


def test_the_range_of_codes_says_how_many_bits_a_file_gives_them() -> None:
    assert [qdq.bits_of(*ISLANDS.code_range(bits)) for bits in (8, 4, 3, 2, 1)] == [8, 4, 3, 2, 1]
    assert qdq.bits_of(-63, 63) == 8


@pytest.mark.parametrize("form", [WeightFormat(4), WeightFormat(4, group=8), WeightFormat(2)])
def test_a_stored_weight_computes_what_its_codes_say(form: WeightFormat) -> None:
    layer = nn.Linear(16, 5)
    graph = capture(nn.Sequential(layer), torch.randn(3, 16))
    node = only(graph, "linear")
    quantize_weight(graph, node, replace(ISLANDS, weight=form))
    finish(graph)
    low, high = ISLANDS.code_range(form.bits)
    scales = fitted_scales(layer.weight, ISLANDS, form)
    wanted = weight_codes(layer.weight, scales, low, high).float() * spread(scales, layer.weight.shape)
    x = torch.randn(2, 16)
    assert torch.equal(run(graph, [x])[0], nn.functional.linear(x, wanted, layer.bias))
