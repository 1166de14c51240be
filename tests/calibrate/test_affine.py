"""Scales and shifts moved into layers: the same numbers as applying them outside, in every kind of layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import Builder
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.affine import (
    input_reach,
    layer_of,
    output_reach,
    pads,
    per_channel,
    scale_inputs,
    scale_outputs,
)
from calibrate.clamps import clamp_bounds
from calibrate.graph import clone, constant, run

aten = torch.ops.aten
KINDS = ("linear", "conv", "grouped", "depthwise", "transposed", "transposed in groups", "general")


def single(kind: str, bias: bool = True, padding: int = 0) -> tuple[GraphModule, Node]:
    """A graph of one layer on [2, 4, 6, 6] (linear: on the last axis, 6)."""
    b = Builder(torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)), 0)
    offset = b.normal(4) if bias else None
    if kind == "linear":
        node = b.call(aten.linear.default, b.x, b.normal(5, 6), b.normal(5) if bias else None)
    elif kind.startswith("transposed"):
        groups = 2 if "groups" in kind else 1
        weight = b.normal(4, 4 // groups, 3, 3)
        node = b.call(aten.conv_transpose2d.input, b.x, weight, offset, [2, 2], [padding, padding], [0, 0], groups)
    elif kind == "general":
        args = ([1, 1], [padding, padding], [1, 1], False, [0, 0], 2)
        node = b.call(aten.convolution.default, b.x, b.normal(4, 2, 3, 3), offset, *args)
    else:
        groups = {"conv": 1, "grouped": 2, "depthwise": 4}[kind]
        weight = b.normal(4, 4 // groups, 3, 3)
        node = b.call(aten.conv2d.default, b.x, weight, offset, [1, 1], [padding, padding], [1, 1], groups)
    return b.finish(node), node


def layer(graph: GraphModule) -> object:
    found = [layer_of(graph, n) for n in graph.graph.nodes]
    return next(f for f in found if f is not None)


def along(vector: Tensor, axis: int) -> Tensor:
    return vector.float().view(-1, *[1] * (-axis - 1))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS), st.booleans(), st.integers(0, 1), st.integers(0, 2**16))
def test_outputs_are_scaled_and_shifted_as_if_behind_the_layer(kind: str, bias: bool, padding: int, seed: int) -> None:
    graph, _ = single(kind, bias, padding)
    generator = torch.Generator().manual_seed(seed)
    result = clone(graph)
    target = layer(result)
    factor, shift = (torch.randn(target.outputs, generator=generator).double() for _ in range(2))
    scale_outputs(result, target, factor, shift)
    result.recompile()
    x = torch.randn(3, 4, 6, 6, generator=generator)
    wanted = run(graph, [x])[0] * along(factor, target.axis) + along(shift, target.axis)
    torch.testing.assert_close(run(result, [x])[0], wanted, rtol=1e-5, atol=1e-4)  # float32 sums of up to 36 products


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS), st.booleans(), st.integers(0, 1), st.integers(0, 2**16))
def test_inputs_are_scaled_and_shifted_as_if_before_the_layer(kind: str, bias: bool, padding: int, seed: int) -> None:
    graph, _ = single(kind, bias, padding)
    generator = torch.Generator().manual_seed(seed)
    result = clone(graph)
    target = layer(result)
    factor, shift = (torch.randn(target.inputs, generator=generator).double() for _ in range(2))
    exact = not pads(target)
    scale_inputs(result, target, factor, shift if exact else None)
    result.recompile()
    x = torch.randn(3, 4, 6, 6, generator=generator)
    moved = x * along(factor, target.axis) + (along(shift, target.axis) if exact else 0)
    torch.testing.assert_close(run(result, [x])[0], run(graph, [moved])[0], rtol=1e-5, atol=1e-4)


def test_a_shift_before_a_padded_convolution_would_not_be_exact() -> None:
    graph, _ = single("conv", padding=1)
    result = clone(graph)
    target = layer(result)
    scale_inputs(result, target, torch.ones(4), torch.ones(4))
    result.recompile()
    x = torch.randn(3, 4, 6, 6)
    assert pads(target)
    assert not torch.allclose(run(result, [x])[0], run(graph, [x + 1])[0], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_reaches_are_the_largest_weight_at_each_channel(kind: str) -> None:
    graph, _ = single(kind)
    target = layer(graph)
    weight = constant(graph, target.weight)
    for channel in range(target.inputs):
        muted = torch.ones(target.inputs)
        muted[channel] = 0
        other = clone(graph)
        changed = scale_inputs(other, layer(other), muted)
        rest = (weight - constant(other, changed.weight)).abs()
        assert float(rest.max()) == pytest.approx(float(input_reach(graph, target)[channel]))
    assert float(output_reach(graph, target).max()) == pytest.approx(float(weight.abs().max()))


def test_only_constants_along_the_channel_axis_are_per_channel() -> None:
    assert per_channel(torch.tensor(2.0), -3, 4, 4).tolist() == [2.0] * 4
    assert per_channel(torch.arange(4.0).view(1, 4, 1, 1), -3, 4, 4).tolist() == [0, 1, 2, 3]
    assert per_channel(torch.arange(4.0), -3, 4, 4) is None
    assert per_channel(torch.ones(4, 6, 1), -3, 4, 4) is None
    assert per_channel(torch.ones(1, 1, 4, 1, 1), -3, 4, 4) is None


def test_computed_weights_and_biases_make_no_layer() -> None:
    b = Builder(torch.randn(2, 4, 6, 6), 0)
    computed = b.call(aten.mul.Tensor, b.normal(5, 6), 2.0)
    node = b.call(aten.linear.default, b.x, computed)
    graph = b.finish(node)
    assert all(layer_of(graph, n) is None for n in graph.graph.nodes)


def test_bounds_of_every_spelling_of_a_clamp() -> None:
    infinite = float("inf")
    cases = [
        ((aten.relu.default,), {}, (0, infinite)),
        ((aten.relu6.default,), {}, (0, 6)),
        ((aten.hardtanh.default,), {}, (-1, 1)),
        ((aten.hardtanh.default, -2.0), {}, (-2, 1)),
        ((aten.clamp.default, None, 3), {}, (-infinite, 3)),
        ((aten.clamp.default,), {"min": 1}, (1, infinite)),
        ((aten.clamp.default, 1), {"max": 2}, (1, 2)),
        ((aten.clamp_max.default, 3.0), {}, (-infinite, 3)),
        ((aten.clamp_min.default, 3.0), {}, (3, infinite)),
        ((aten.sigmoid.default,), {}, None),
    ]
    for (target, *args), kwargs, wanted in cases:
        b = Builder(torch.randn(2, 3), 0)
        node = b.graph.call_function(target, (b.x, *args), kwargs)
        assert clamp_bounds(node) == wanted
