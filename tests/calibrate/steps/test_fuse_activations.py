"""Activations take the forms that kernels fuse, constants move into layers, and no output changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import PIECES, Builder, conv, inputs, network
from small_graphs import ISLANDS, context
from torch.fx import GraphModule, Node

from calibrate import steps
from calibrate.graph import clone, kind, operator_name, run
from calibrate.plan import Entry

aten = torch.ops.aten
# float32 rounding of a few layers, relative to the output's range.
TOLERANCE = 1e-5


def fused(graph: GraphModule) -> tuple[GraphModule, list[Entry]]:
    result = clone(graph)
    return result, steps.apply("fuse_activations", result, context(ISLANDS))


def difference(graph: GraphModule, other: GraphModule, seed: int) -> float:
    """The largest difference of any output on inputs not seen before, relative to that output's range."""
    x = inputs(seed)
    pairs = zip(run(graph, [x]), run(other, [x]), strict=True)
    return max(float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30) for a, b in pairs)


def operators(graph: GraphModule) -> list[str]:
    return [operator_name(n) for n in graph.graph.nodes if n.op == "call_function"]


def chain(*calls: tuple[object, ...], padding: int = 1) -> GraphModule:
    """A convolution of the input [2, 4, 6, 6], then these operators one after another; the last one goes out."""
    b = Builder(torch.randn(2, 4, 6, 6), 0)
    at = conv(b, b.x, padding=padding, kernel=3)
    for target, *rest in calls:
        at = b.call(target, at, *[b.constant(r) if isinstance(r, torch.Tensor) else r for r in rest])  # type: ignore[arg-type]
    return b.finish(at)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=8), st.integers(0, 2**16))
def test_no_random_graph_changes_its_outputs(pieces: list[str], seed: int) -> None:
    graph = network(pieces, seed)
    result, ledger = fused(graph)
    assert ledger
    assert difference(graph, result, seed) <= TOLERANCE


def test_the_property_notices_a_constant_that_went_missing() -> None:
    graph = chain((aten.mul.Tensor, torch.tensor(1.001)))
    wrong = clone(graph)
    product = next(n for n in wrong.graph.nodes if kind(n) == "mul")
    product.replace_all_uses_with(product.args[0])
    wrong.recompile()
    assert difference(graph, wrong, 0) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("call", "name", "bounds"),
    [
        ((aten.clamp.default, 0), "relu", ()),
        ((aten.clamp_min.default, 0.0), "relu", ()),
        ((aten.clamp.default, 0, 6), "hardtanh", (0.0, 6.0)),
        ((aten.relu6.default,), "hardtanh", (0.0, 6.0)),
        ((aten.clamp_max.default, 1.0), "clamp", (None, 1.0)),
        ((aten.clamp.default, 2.0, 1.0), "hardtanh", (1.0, 1.0)),
    ],
)
def test_each_clamp_takes_the_one_form_that_kernels_know(call: tuple, name: str, bounds: tuple) -> None:
    graph = chain(call)
    result, _ = fused(graph)
    last = next(n for n in reversed(result.graph.nodes) if n.op == "call_function")
    assert (operator_name(last), tuple(last.args[1:])) == (name, bounds)
    assert difference(graph, result, 0) == 0


def test_clamps_in_a_row_become_one_even_where_their_bounds_do_not_meet() -> None:
    for first, second in (((0.0, 6.0), (1.0, 2.0)), ((0.0, 1.0), (2.0, 3.0)), ((-1.0, 5.0), (0.0, 9.0))):
        graph = chain((aten.hardtanh.default, *first), (aten.hardtanh.default, *second))
        result, ledger = fused(graph)
        assert operators(result) == ["conv2d", "hardtanh"]
        assert "merged" in ledger[0].action
        assert difference(graph, result, 0) == 0


def test_a_relu_on_integers_is_left() -> None:
    b = Builder(torch.arange(96).view(2, 4, 3, 4), 0)
    graph = b.finish(b.call(aten.clamp.default, b.x, 0, 6))
    result, ledger = fused(graph)
    assert operators(result) == ["clamp"]
    assert ledger[0].action == "left alone"


def test_hard_swish_spelled_out_in_either_order_becomes_one_operator() -> None:
    for swapped in (False, True):
        b = Builder(torch.randn(2, 4, 6, 6), 0)
        clipped = b.call(aten.clamp_max.default, b.call(aten.relu.default, b.call(aten.add.Tensor, b.x, 3.0)), 6.0)
        sixth = b.call(aten.mul.Tensor, clipped, 1 / 6)
        graph = b.finish(b.call(aten.mul.Tensor, *((sixth, b.x) if swapped else (b.x, sixth))))
        result, _ = fused(graph)
        assert operators(result) == ["hardswish"]
        assert difference(graph, result, 0) <= 1e-6


def test_a_gate_that_something_else_reads_stays_and_so_does_one_of_another_tensor() -> None:
    b = Builder(torch.randn(2, 4, 6, 6), 0)
    gate = b.call(aten.sigmoid.default, b.x)
    graph = b.finish(
        b.call(aten.mul.Tensor, b.x, gate), gate, b.call(aten.mul.Tensor, b.call(aten.neg.default, gate), gate)
    )
    assert operators(fused(graph)[0]).count("sigmoid") == 1
    assert "silu" not in operators(fused(graph)[0])


def test_a_relu_behind_a_max_pool_and_a_flatten_moves_to_the_convolution() -> None:
    graph = chain((aten.max_pool2d.default, [2, 2]), (aten.flatten.using_ints, 1), (aten.relu.default,))
    result, ledger = fused(graph)
    assert operators(result) == ["conv2d", "relu", "max_pool2d", "flatten"]
    assert "moved to" in ledger[0].action
    assert difference(graph, result, 0) == 0


def test_a_layer_scale_behind_a_linear_layer_disappears_in_it() -> None:
    b = Builder(torch.randn(2, 4, 6, 6), 0)
    linear = b.call(aten.linear.default, b.x, b.normal(6, 6))
    scaled = b.call(aten.mul.Tensor, linear, b.normal(6))
    graph = b.finish(b.call(aten.add.Tensor, scaled, b.x))
    result, ledger = fused(graph)
    assert operators(result) == ["linear", "add"]
    assert ledger[0].action == "folded into linear_default"
    assert difference(graph, result, 0) <= TOLERANCE


def constants_before(padding: int, extra_reader: bool = False) -> tuple[GraphModule, list[Entry], GraphModule]:
    b = Builder(torch.randn(2, 4, 6, 6), 0)
    centred = b.call(aten.sub.Tensor, b.x, b.normal(4, 1, 1))
    scaled = b.call(aten.div.Tensor, centred, b.positive(1, 4, 1, 1))
    outputs: list[Node] = [conv(b, scaled, padding=padding, kernel=3), conv(b, scaled, padding=0, kernel=1)]
    graph = b.finish(*outputs, *([scaled] if extra_reader else []))
    result, ledger = fused(graph)
    assert difference(graph, result, 0) <= TOLERANCE
    return result, ledger, graph


def test_a_normalisation_of_the_input_moves_into_convolutions_without_padding() -> None:
    result, ledger, _ = constants_before(padding=0)
    assert operators(result) == ["conv2d", "conv2d"]
    assert len(ledger) == 2


def test_a_shift_stays_before_a_padded_convolution_and_the_scale_does_not() -> None:
    result, ledger, _ = constants_before(padding=1)
    assert operators(result) == ["sub", "conv2d", "conv2d"]
    assert "pads with zeros" in ledger[-1].reason


def test_constants_that_something_else_reads_stay() -> None:
    result, ledger, _ = constants_before(padding=0, extra_reader=True)
    assert operators(result) == ["sub", "div", "conv2d", "conv2d"]
    assert "not every reader" in ledger[-1].reason


def test_a_graph_with_nothing_to_do_says_so() -> None:
    result, ledger = fused(chain((aten.relu.default,)))
    assert operators(result) == ["conv2d", "relu"]
    assert [e.action for e in ledger] == ["left alone"]
    assert steps.find("fuse_activations").ensures(chain((aten.relu6.default,))) is not None
