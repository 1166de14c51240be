"""8-bit floats: the grid, the scales, what is shared, what is left alone, and that a simulation runs it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import Made, capture, context, images, keeping, nodes_of
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import qdq, steps
from calibrate.graph import clone, constant, run
from calibrate.plan import Plan, WeightFormat
from calibrate.simulation import Simulation, simulate

PLAN = Plan(("quantize_float8",))
# Exponent bias, mantissa bits, largest number: OCP 8-bit floating point specification, table 1.
GRIDS = {"float8_e4m3": (7, 3, 448.0), "float8_e5m2": (15, 2, 57344.0)}


def on_grid(x: Tensor, kind: str) -> Tensor:
    """The nearest 8-bit float by arithmetic alone (ptq.md's formula): step = 2^(exponent - mantissa bits)."""
    bias, mantissa, largest = GRIDS[kind]
    exponent = torch.frexp(x.double().abs())[1].double() - 1  # x = m * 2^exponent, 1 <= m < 2
    step = torch.exp2(exponent.clamp(min=1 - bias) - mantissa)
    return (torch.round(x.double() / step) * step).clamp(-largest, largest).float()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GRIDS)), st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=30))
def test_codes_are_the_nearest_numbers_of_the_format_half_to_even_and_saturated(kind: str, values: list[float]) -> None:
    x = torch.tensor(values)
    codes = qdq.quantize_float8(x, torch.tensor(1.0), kind)
    assert codes.dtype is qdq.FLOAT8[kind]
    assert torch.equal(codes.float(), on_grid(x, kind))
    largest = GRIDS[kind][2]
    assert torch.equal(codes.float(), x.clamp(-largest, largest).to(qdq.FLOAT8[kind]).float())  # torch's own cast


def test_the_two_formats_are_not_the_same_grid() -> None:
    x = torch.tensor([1.125, 1.25, 500.0])
    assert on_grid(x, "float8_e4m3").tolist() == [1.125, 1.25, 448.0]
    assert on_grid(x, "float8_e5m2").tolist() == [1.0, 1.25, 512.0]


def layers() -> GraphModule:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4)), images())


@pytest.mark.parametrize("kind", sorted(GRIDS))
def test_scales_put_the_largest_number_at_the_end_of_the_format(kind: str) -> None:
    graph, x = layers(), images(8)
    ledger = steps.apply("quantize_float8", graph, context(replace(PLAN, weight=WeightFormat(kind=kind)), [x]))  # type: ignore[arg-type]
    largest = GRIDS[kind][2]
    assert [(e.layer, e.action) for e in ledger] == [("0", kind), ("3", kind)]
    conv = nodes_of(graph, "conv")[0]
    quantize = conv.args[0].args[0]
    assert quantize.target is qdq.QUANTIZE_FLOAT8
    assert float(constant(graph, quantize.args[1])) == pytest.approx(float(x.abs().max()) / largest)
    codes, scales = (constant(graph, a) for a in conv.args[1].args)
    assert codes.dtype is qdq.FLOAT8[kind]
    assert scales.shape == (16,)
    assert torch.equal(codes.float().abs().flatten(1).amax(1), torch.full((16,), largest))


def test_the_simulation_computes_what_the_casts_of_torch_compute() -> None:
    graph, x = layers(), images(8)
    float_graph = clone(graph)
    steps.apply("quantize_float8", graph, context(PLAN, [x]))
    (got,), (plain,) = simulate(graph)([x]), run(float_graph, [x])
    weights = {
        n: constant(graph, n.args[1].args[0]).float() for n in (*nodes_of(graph, "conv"), *nodes_of(graph, "linear"))
    }
    y = x
    for node, codes in weights.items():
        scale = constant(graph, node.args[0].args[1])
        steps_ = constant(graph, node.args[1].args[1])
        y = (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        weight = codes * steps_.view(-1, *[1] * (codes.dim() - 1))
        bias = constant(graph, node.args[2])
        y = nn.functional.conv2d(y, weight, bias).relu().flatten(1) if codes.dim() == 4 else y @ weight.mT + bias
    # float32 sums of 576 products in another order
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)
    noise = float((got - plain).square().mean() / plain.square().mean())
    assert 1e-6 < noise < 5e-3  # 3 mantissa bits leave 2^-4 of each number at most


def test_values_on_their_way_to_8_bit_floats_are_jittered_and_make_codes_from_float_arithmetic() -> None:
    graph, x = layers(), images(8)
    steps.apply("quantize_float8", graph, context(PLAN, [x]))
    assert Simulation(graph).rounds_freely
    (calm,), (moved,) = simulate(graph)([x]), simulate(graph, jitter=1e-3)([x])
    assert not torch.equal(calm, moved)
    assert torch.equal(calm, run(graph, [x])[0])


def test_an_input_that_two_layers_read_is_quantized_once() -> None:
    torch.manual_seed(0)
    graph = capture(Made(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(8, 4), b=nn.Linear(8, 4)), torch.randn(3, 8))
    steps.apply("quantize_float8", graph, context(PLAN, [torch.randn(3, 8)]))
    assert sum(n.target is qdq.QUANTIZE_FLOAT8 for n in graph.graph.nodes) == 1


def test_layers_kept_float_and_inputs_with_sentinels_are_left_with_the_reason() -> None:
    x = torch.randn(4, 8)
    x[0, 0] = -1e9
    graph = capture(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), torch.randn(4, 8))
    ledger = steps.apply("quantize_float8", graph, context(keeping(PLAN, **{"1": "asked for"}), [x]))
    assert [e.action for e in ledger] == ["left float", "left float"]
    assert "(a mask?)" in ledger[0].reason
    assert ledger[1].reason == "asked for"
    empty = steps.apply("quantize_float8", capture(nn.ReLU(), torch.randn(2, 3)), context(PLAN, [torch.randn(2, 3)]))
    assert [(e.layer, e.action) for e in empty] == [("model", "left alone")]


def test_the_step_notices_codes_that_something_reads_without_dequantizing() -> None:
    graph = layers()
    steps.apply("quantize_float8", graph, context(PLAN, [images(8)]))
    promise = steps.find("quantize_float8").ensures
    assert promise(graph) is None
    restored = next(n for n in graph.graph.nodes if n.target is qdq.DEQUANTIZE_FLOAT8)
    restored.replace_all_uses_with(restored.args[0])
    assert "read by something other than a dequantize" in (promise(graph) or "")
