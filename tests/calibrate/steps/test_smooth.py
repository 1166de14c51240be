"""Smoothing keeps the float function, lowers the error of quantized layers, and leaves alone what it cannot scale."""

from dataclasses import replace

import pytest
import torch
from encoders import LAYOUTS, difference, encoder, sqnr, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import ISLANDS, context, nodes_of
from torch.fx import GraphModule

from calibrate import steps
from calibrate.errors import CalibrationError
from calibrate.graph import clone, run
from calibrate.layer_trial import Activations, Seen, output_error
from calibrate.plan import Entry, Plan, WeightFormat
from calibrate.smoothing import refined, scales

# float32 rounding through two blocks, relative to the output's reach.
TOLERANCE = 1e-5
DYNAMIC = Plan(steps=("smooth", "quantize_dynamic"))
WEIGHTS = Plan(steps=("smooth", "quantize_weights"), weight=WeightFormat(4))


def smoothed(graph: GraphModule, plan: Plan = DYNAMIC, **parameters: object) -> tuple[GraphModule, list[Entry]]:
    result = clone(graph)
    ledger = steps.apply("smooth", result, context(replace(plan, parameters={"smooth": parameters}), [tokens(16, 5)]))
    return result, ledger


def quantized(graph: GraphModule, plan: Plan) -> GraphModule:
    result = clone(graph)
    steps.apply(plan.steps[-1], result, context(plan, [tokens(16, 5)]))
    return result


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_smoothing_keeps_the_float_function_of_every_layout(layout: str, before: bool) -> None:
    graph = LAYOUTS[layout](before)
    result, ledger = smoothed(graph, explicit="all", alphas=[0.5], refine=False, least_gain=-9.0)  # scaled, gain or not
    assert all(e.action.startswith("smoothed") for e in ledger)
    assert len(ledger) >= 6
    assert difference(graph, result) <= TOLERANCE


@pytest.mark.parametrize("plan", [DYNAMIC, replace(DYNAMIC, dynamic_scheme="row_int8"), replace(ISLANDS), WEIGHTS])
def test_a_quantized_encoder_with_outlier_channels_gains(plan: Plan) -> None:
    graph = encoder("fused", True)
    result, _ = smoothed(graph, plan)
    x = tokens(32, 7)
    gain = sqnr(graph, quantized(result, plan), x) - sqnr(graph, quantized(graph, plan), x)
    assert gain > 1.0  # dB; the planted channels reach 25 times as far as the others


def test_pre_norm_smoothing_adds_no_operator() -> None:
    graph = encoder("fused", True)
    result, ledger = smoothed(graph)
    assert len(result.graph.nodes) == len(graph.graph.nodes)
    assert any("folded" in e.action for e in ledger)


def test_after_a_post_norm_one_multiplication_serves_all_readers() -> None:
    graph = encoder("separate", False)
    result, ledger = smoothed(graph)
    assert [e.layer for e in ledger if "multiplication" in e.action] == ["layer_norm", "layer_norm_1", "layer_norm_2"]
    assert len(nodes_of(result, "mul")) == 3  # query, key and value of the second block share one
    assert "add" in next(e.reason for e in ledger if "multiplication" in e.action)
    refused, _ = smoothed(graph, explicit="never", refine=False)
    assert not nodes_of(refused, "mul")


def test_what_gains_nothing_is_left_alone_bit_by_bit() -> None:
    graph = encoder("fused", True)
    result, ledger = smoothed(graph, least_gain=1.0, refine=False)
    assert {e.action for e in ledger} == {"left alone"}
    assert all("no alpha lowers" in e.reason for e in ledger)
    assert torch.equal(run(graph, [tokens()])[0], run(result, [tokens()])[0])


def test_a_plan_without_quantized_linears_is_no_reason_to_smooth() -> None:
    _, (entry,) = smoothed(encoder(), Plan(steps=("smooth", "half_weights")))
    assert entry.action == "left alone"
    assert "quantizes no linear" in entry.reason


def test_a_wrong_word_for_explicit_is_an_error_that_names_the_right_ones() -> None:
    with pytest.raises(CalibrationError, match="'some'; it may be never, norm, all"):
        smoothed(encoder(), explicit="some")


@settings(max_examples=20, deadline=None)
@given(alpha=st.sampled_from([0.25, 0.5, 0.9]), seed=st.integers(0, 2**16))
def test_scales_follow_the_formula_up_to_a_common_factor(alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reach, load = (torch.rand(9, generator=generator) + 0.01 for _ in range(2))
    reach[4] = 0.0  # a dead channel keeps its scale
    s = scales(reach, load, alpha)
    assert float(s[4]) == 1.0
    alive = [i for i in range(9) if i != 4]
    ratio = s[alive] / (reach[alive] ** alpha / load[alive] ** (1 - alpha))
    assert float(ratio.max() / ratio.min()) < 1 + 1e-4  # float32
    assert abs(float(s[alive].log().mean())) < 1e-4


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), how=st.sampled_from(["tensor_uint8", "row_int8", "static"]))
def test_refining_lowers_the_noise_that_a_layer_will_have(seed: int, how: Activations) -> None:
    generator = torch.Generator().manual_seed(seed)
    seen = Seen()
    spread = torch.logspace(-1, 1, 24)
    seen.add(torch.randn(200, 24, generator=generator) * spread)
    weight = torch.randn(16, 24, generator=generator)
    node = torch.fx.Graph().placeholder("layer")

    def error(scale: torch.Tensor) -> float:
        return output_error(DYNAMIC, how, seen.mapped(1 / scale), [node], [weight * scale])

    plain = scales(seen.reach, weight.abs().amax(0), 0.25)
    better = refined(plain, [(seen, weight, torch.arange(24), 8)], DYNAMIC, how)
    # What is descended is the noise expected of rounding; one draw of roundings scatters by some percent around it.
    assert error(better) < 1.05 * error(plain)
