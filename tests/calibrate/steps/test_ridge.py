"""The ridge update as a step: how near the float layer it comes, flips, groups, and what it leaves alone."""

from dataclasses import replace

import torch
from refined_nets import STATIC, WEIGHTS, batches, cnn, drift, refined, with_computed_bias
from torch import nn

from calibrate import steps
from calibrate.coded import coded_layers
from calibrate.graph import constant
from calibrate.plan import WeightFormat
from calibrate.steps import ridge


def test_ridge_comes_nearer_to_the_float_layer_and_flips_nearer_still() -> None:
    graph = cnn()
    plan = replace(STATIC, weight=WeightFormat(3))
    before, after, ledger = refined(plan, graph, "ridge", {})
    _, flipped, _ = refined(plan, graph, "ridge", {"flips": 4})
    assert all(e.action.startswith(("3-bit codes", "left as it was")) for e in ledger)
    assert drift(graph, after) < 0.8 * drift(graph, before)
    assert drift(graph, flipped) < drift(graph, after)


def test_the_bias_takes_the_mean_error_that_is_left() -> None:
    graph = cnn()
    before, after, ledger = refined(replace(WEIGHTS, weight=WeightFormat(3)), graph, "ridge", {})
    left = []
    for made in (before, after):
        first = next(coded_layers(made))
        x = torch.cat([part for (part,) in batches()])
        bias = constant(made, first.bias) if first.bias is not None else None
        got = nn.functional.conv2d(x, first.weight(made), bias, 2, 1)
        wanted = nn.functional.conv2d(x, dict(graph.named_parameters())["0.weight"], None, 2, 1)
        left.append(float((got - wanted).mean((0, 2, 3)).square().mean().sqrt()))
    assert ledger[0].action.startswith("3-bit codes")
    assert left[1] < 0.1 * left[0]  # not nothing: a quarter of the samples is kept aside


def test_a_layer_whose_bias_is_computed_is_left_alone() -> None:
    graph, setting = with_computed_bias()
    (entry,) = steps.apply("ridge", graph, setting)
    assert (entry.action, entry.reason) == ("left alone", "its bias is computed, not constant")


def test_a_code_beyond_its_bits_is_noticed() -> None:
    _, graph, _ = refined(replace(WEIGHTS, weight=WeightFormat(4)), cnn(), "ridge", {})
    assert ridge.STEP.ensures(graph) is None
    layer = next(coded_layers(graph))
    layer.set_codes(graph, torch.full_like(constant(graph, layer.codes), 8))
    assert "outside -8..7" in (ridge.STEP.ensures(graph) or "")
