"""Reparameterized LayerNorms give the codes that each channel would have had alone, and the same float function."""

from dataclasses import replace

import pytest
import torch
from encoders import LAYOUTS, difference, encoder, operators, sqnr, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import ISLANDS, capture, context, nodes_of
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from calibrate import qdq, steps
from calibrate.errors import CalibrationError
from calibrate.graph import clone, run
from calibrate.layer_trial import watch
from calibrate.plan import Entry, Plan, QParams
from calibrate.steps import Context
from calibrate.steps.reparameterize_layernorm import channel_codes

# float32 rounding through two blocks, relative to the output's reach.
TOLERANCE = 1e-5
NAME = "reparameterize_layernorm"
STATIC = replace(ISLANDS, steps=(NAME, "quantize_static"))
UNSIGNED = replace(STATIC, activation="uint8")
SYMMETRIC = replace(STATIC, symmetric=True)
ALWAYS = {"least_gain": -9.0}


def changed(graph: GraphModule, plan: Plan = STATIC, **parameters: float) -> tuple[GraphModule, list[Entry], Context]:
    result = clone(graph)
    made = context(replace(plan, parameters={NAME: parameters or ALWAYS}), [tokens(16, 5)])
    return result, steps.apply(NAME, result, made), made


def outputs(graph: GraphModule) -> list[Tensor]:
    """What every LayerNorm computes on the calibration samples."""
    found: list[Tensor] = []

    class Run(Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n in nodes_of(graph, "layer_norm"):
                found.append(value)
            return value

    with torch.no_grad():
        Run(graph).run(tokens(16, 5))
    return found


def codes(x: Tensor, scale: Tensor | float, zero: Tensor | int, q: QParams) -> Tensor:
    return torch.clamp(torch.round(x.double() / scale) + zero, q.qmin, q.qmax)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_float_function_of_every_layout_is_kept(layout: str) -> None:
    graph = LAYOUTS[layout](True)
    result, ledger, _ = changed(graph)
    assert [e.action for e in ledger] == ["reparameterized"] * 5
    assert difference(graph, result) <= TOLERANCE
    assert operators(result) == operators(graph)


@pytest.mark.parametrize("plan", [STATIC, UNSIGNED, SYMMETRIC])
def test_codes_of_the_whole_tensor_are_those_of_every_channel_bit_for_bit(plan: Plan) -> None:
    graph = encoder()
    seen = watch(graph, nodes_of(graph, "layer_norm"), [[tokens(16, 5)]])
    for norm, x in zip(nodes_of(graph, "layer_norm"), outputs(graph), strict=True):
        own = channel_codes(seen[norm], plan)
        alone = codes(x, own.scales, own.zeros, own.shared)
        after = (x.double() + own.shift) / own.factor
        assert torch.equal(codes(after, own.shared.scale, own.shared.zero_point, own.shared), alone)
        # One scale for the LayerNorm as it was gives other codes.
        assert not torch.equal(codes(x, own.shared.scale, own.shared.zero_point, own.shared), alone)


@pytest.mark.parametrize("plan", [STATIC, UNSIGNED, SYMMETRIC])
def test_the_graph_computes_these_codes_but_where_float32_rounds_across_a_tie(plan: Plan) -> None:
    graph = encoder()
    result, _, _ = changed(graph, plan)
    seen = watch(graph, nodes_of(graph, "layer_norm"), [[tokens(16, 5)]])
    for norm, before, after in zip(nodes_of(graph, "layer_norm"), outputs(graph), outputs(result), strict=True):
        own = channel_codes(seen[norm], plan)
        exact = before.double() / own.scales
        moved = codes(after, own.shared.scale, own.shared.zero_point, own.shared) != codes(
            before, own.scales, own.zeros, own.shared
        )
        # float32 noise of the blocks before is some 1e-6 of a code's 128 steps: only a value that near a tie may move.
        assert bool(((exact - exact.floor() - 0.5).abs()[moved] < 1e-3).all())
        assert float(moved.double().mean()) < 1e-3


def test_a_zero_point_that_is_not_rounded_would_give_other_codes() -> None:
    graph = encoder()
    norm = nodes_of(graph, "layer_norm")[0]
    own = channel_codes(watch(graph, [norm], [[tokens(16, 5)]])[norm], STATIC)
    x = outputs(graph)[0].double()
    zero = float(own.zeros.mean())
    assert abs(zero - round(zero)) > 0.05
    mean = own.shared.scale
    after = (x + own.scales * (own.zeros - zero)) * mean / own.scales
    wrong = torch.clamp(torch.round(after / mean) + round(zero), own.shared.qmin, own.shared.qmax)
    assert not torch.equal(wrong, codes(x, own.scales, own.zeros, own.shared))


def test_static_quantization_uses_the_range_that_the_step_recorded() -> None:
    graph = encoder()
    result, _, made = changed(graph)
    steps.apply("quantize_static", result, made)
    for norm in nodes_of(result, "layer_norm")[:4]:
        quantize = next(u for u in norm.users if u.target is qdq.QUANTIZE)
        recorded = made.chosen[frozenset({norm.name})]
        assert quantize.args[1:3] == (recorded.scale, recorded.zero_point)
        assert recorded.observer == "reparameterized"


@pytest.mark.parametrize("plan", [STATIC, replace(STATIC, steps=(NAME, "quantize_dynamic"))])
def test_an_encoder_with_outlier_channels_gains(plan: Plan) -> None:
    graph = encoder()
    result, ledger, made = changed(graph, plan, least_gain=0.02)
    assert "reparameterized" in {e.action for e in ledger}
    steps.apply(plan.steps[-1], result, made)
    plainly = clone(graph)
    steps.apply(plan.steps[-1], plainly, context(plan, [tokens(16, 5)]))
    x = tokens(32, 7)
    assert sqnr(graph, result, x) > sqnr(graph, plainly, x) + 1.0  # dB


def test_a_layer_norm_that_a_residual_reads_is_left_alone_with_the_reader_named() -> None:
    graph = encoder("fused", False)
    result, ledger, made = changed(graph)
    assert {e.action for e in ledger[:3]} == {"left alone"}
    assert all("add" in e.reason for e in ledger[:3])
    assert difference(graph, result) <= TOLERANCE
    assert len(made.chosen) <= 1  # the last one, which only the head reads


def test_a_quantized_reader_that_would_not_gain_is_left_alone_bit_by_bit() -> None:
    graph = encoder()
    result, ledger, made = changed(graph, least_gain=1.0)
    assert {e.action for e in ledger} == {"left alone"}
    assert not made.chosen
    assert torch.equal(run(graph, [tokens()])[0], run(result, [tokens()])[0])


@pytest.mark.parametrize("plan", [Plan(steps=(NAME, "quantize_weights")), replace(STATIC, activation="int16")])
def test_plans_without_8_bit_activations_need_none_of_it(plan: Plan) -> None:
    _, (entry,), _ = changed(encoder(), plan)
    assert entry.action == "left alone"
    assert "no 8-bit activations" in entry.reason


def test_a_percentile_narrows_ranges_and_a_wrong_one_is_an_error() -> None:
    graph = encoder()
    norm = nodes_of(graph, "layer_norm")[0]
    seen = watch(graph, [norm], [[tokens(16, 5)]])[norm]
    assert float(channel_codes(seen, STATIC, 99.0).scales.sum()) < float(channel_codes(seen, STATIC).scales.sum())
    assert difference(graph, changed(graph, percentile=99.0, **ALWAYS)[0]) <= TOLERANCE
    with pytest.raises(CalibrationError, match=r"percentile is 40; give one in \(50, 100\]"):
        changed(graph, percentile=40.0)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16), dead=st.booleans())
def test_any_affine_is_reparameterized_exactly(seed: int, dead: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4, bias=bool(seed % 2)))
    model[0].weight.data = torch.randn(8) * torch.logspace(-2, 2, 8)
    model[0].bias.data = torch.randn(8)
    if dead:
        model[0].weight.data[3] = model[0].bias.data[3] = 0.0
    graph = capture(model, tokens())
    result, _, _ = changed(graph)
    assert difference(graph, result) <= TOLERANCE
