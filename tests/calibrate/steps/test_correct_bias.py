"""Bias correction, measured and analytic: what mean error is left, which layers it touches, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refined_nets import with_computed_bias
from small_graphs import ISLANDS, Made, capture, context, images, nodes_of
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.coded import coded_layers
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, run
from calibrate.lockstep import Visit, walk
from calibrate.plan import Entry, Plan, WeightFormat
from calibrate.steps import correct_bias
from calibrate.steps.correct_bias import clipped_mean

WEIGHTS = Plan(steps=("quantize_weights",), weight=WeightFormat(3))
DYNAMIC = Plan(steps=("quantize_dynamic",), weight=WeightFormat(3))
STATIC = replace(ISLANDS, weight=WeightFormat(3))


def positive(count: int = 48, seed: int = 0) -> list[Tensor]:
    """Inputs with a mean: what turns rounding errors of weights into a bias."""
    return [images(count, 4, seed=seed).abs() + 0.5]


def cnn() -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 32, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 8),
    )
    return capture(model, images(4, 4))


def quantized(plan: Plan, graph: GraphModule, parameters: dict[str, object]) -> tuple[GraphModule, list[Entry]]:
    """`graph` after the plan's step and after bias correction on `positive()`; the ledger of the correction."""
    made = clone(graph)
    setting = context(replace(plan, parameters={"correct_bias": parameters}), positive())
    steps.apply(plan.steps[0], made, setting)
    return made, steps.apply("correct_bias", made, setting)


def bias_errors(float_graph: GraphModule, graph: GraphModule, seed: int = 0) -> dict[str, float]:
    """Layer -> root mean square over channels of its mean output error, relative to the output's deviation."""
    found: dict[str, float] = {}

    def visit(v: Visit) -> None:
        mean = correct_bias.mean_errors(v.layer, v.compute(), v.targets).mean(0)
        found[v.layer.name] = float(mean.square().mean().sqrt() / torch.cat(v.targets).std())

    walk(float_graph, graph, [positive(seed=seed)], visit)
    return found


@pytest.mark.parametrize("plan", [WEIGHTS, DYNAMIC, STATIC], ids=["weights", "dynamic", "static"])
def test_the_mean_error_of_every_layer_vanishes_and_was_there_before(plan: Plan) -> None:
    graph = cnn()
    before = clone(graph)
    steps.apply(plan.steps[0], before, context(plan, positive()))
    after, ledger = quantized(plan, graph, {})
    uncorrected, corrected = bias_errors(graph, before), bias_errors(graph, after)
    assert set(corrected) == {e.layer for e in ledger}
    assert min(uncorrected.values()) > 0.02  # the negative control: 3 bits bias these layers
    assert max(corrected.values()) < 1e-3  # half an int32 step of the bias, and float32's rounding
    assert all(e.action.startswith("corrected") for e in ledger)


def test_samples_it_never_saw_gain_too() -> None:
    graph = cnn()
    before, (after, _) = clone(graph), quantized(STATIC, graph, {})
    steps.apply("quantize_static", before, context(STATIC, positive()))
    plain, corrected = bias_errors(graph, before, seed=9), bias_errors(graph, after, seed=9)
    assert all(corrected[name] < 0.3 * plain[name] for name in plain)


def test_a_layer_without_a_bias_gets_one_and_int32_kernels_get_whole_steps() -> None:
    graph, _ = quantized(STATIC, cnn(), {})
    for layer in coded_layers(graph):
        assert layer.bias is not None
        scale = layer.input_scale()
        assert scale is not None
        unit = (torch.tensor(scale, dtype=torch.float32) * constant(graph, layer.scales)).double()
        whole = constant(graph, layer.bias).double() / unit
        # A float32 bias is off its step by float32's rounding alone.
        assert float(((whole - whole.round()).abs() / whole.abs().clamp(min=1)).max()) < 1e-6


def test_an_error_that_is_mere_chance_is_left_alone() -> None:
    torch.manual_seed(0)
    graph = capture(nn.Linear(8, 4), torch.randn(4, 8))
    made, setting = clone(graph), context(WEIGHTS, [torch.randn(6, 8, generator=torch.Generator().manual_seed(3))])
    plan = replace(WEIGHTS, weight=WeightFormat(8))
    setting.plan = plan
    setting.float_graph = graph
    quantize = steps.find("quantize_static")
    setting.plan = replace(STATIC, weight=WeightFormat(8))
    quantize.apply(made, setting)
    (entry,) = steps.apply("correct_bias", made, setting)
    assert entry.action == "left alone"
    assert "no mean error clear of chance over 6 samples" in entry.reason


def test_one_sample_is_not_enough() -> None:
    graph = cnn()
    setting = context(STATIC, positive(1))
    steps.apply("quantize_static", graph, setting)
    assert {e.reason for e in steps.apply("correct_bias", graph, setting)} == {
        "one sample cannot tell an error from chance"
    }


def test_a_graph_without_coded_weights_says_so() -> None:
    graph = capture(nn.ReLU(), images())
    setting = context(STATIC, [images(8)])
    setting.float_graph = clone(graph)
    (entry,) = steps.apply("correct_bias", graph, setting)
    assert (entry.layer, entry.action) == ("model", "left alone")


def test_a_float_graph_and_a_method_there_is_not_are_refused() -> None:
    with pytest.raises(CalibrationError, match="improves a quantized graph"):
        steps.apply("correct_bias", cnn(), context(STATIC, positive()))
    with pytest.raises(CalibrationError, match="no method 'guess'"):
        quantized(STATIC, cnn(), {"method": "guess"})


def test_a_promise_about_finite_biases_is_checked() -> None:
    graph, _ = quantized(STATIC, cnn(), {})
    assert correct_bias.STEP.ensures(graph) is None
    next(coded_layers(graph)).set_bias(graph, torch.full((32,), math.nan), int32=False)
    assert "not finite" in (correct_bias.STEP.ensures(graph) or "")


def test_a_computed_bias_is_left_alone() -> None:
    graph, setting = with_computed_bias()
    (entry,) = steps.apply("correct_bias", graph, setting)
    assert (entry.action, entry.reason) == ("left alone", "its bias is computed, not constant")


@settings(max_examples=25, deadline=None)
@given(st.floats(-3, 3), st.floats(0, 4), st.floats(-2, 1), st.floats(0, 8))
def test_the_clipped_mean_is_the_integral(mean: float, deviation: float, low: float, width: float) -> None:
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2)
    values = (mean + deviation * grid).clamp(low, low + width)
    integral = float((values * density).sum() / density.sum())
    got = clipped_mean(torch.tensor([mean]).double(), torch.tensor([deviation]).double(), low, low + width)
    assert abs(float(got) - integral) < 1e-4  # the grid's step, where the clip has a corner


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Identity()], ids=["relu", "relu6", "identity"])
def test_without_samples_the_batch_norm_says_what_the_next_layer_reads(activation: nn.Module) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(32)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    torch.nn.init.uniform_(norm.bias, 0, 2)
    model = nn.Sequential(nn.Conv2d(4, 32, 3), norm, activation, nn.Conv2d(32, 32, 1, groups=2))
    model.train()
    samples = [images(512, 4)]
    with torch.no_grad():
        for _ in range(60):  # statistics of the very samples
            model(samples[0])
    graph = capture(model, images(4, 4))
    setting = context(replace(WEIGHTS, parameters={"correct_bias": {"method": "analytic"}}))
    steps.apply("fold_batchnorm", graph, setting)
    made = clone(graph)
    steps.apply("quantize_weights", made, setting)
    # The first layer reads what nobody knows; the second must lose most of its own mean error, float input given.
    names = [layer.name for layer in coded_layers(made)]
    before = clone(made)
    ledger = steps.apply("correct_bias", made, setting)
    assert [(e.layer, e.action[:9]) for e in ledger] == [(names[0], "left alon"), (names[1], "corrected")]
    own = [_own_error(graph, g, names[1], samples) for g in (before, made)]
    assert own[1] < 0.25 * own[0]


def _own_error(float_graph: GraphModule, graph: GraphModule, name: str, samples: list[Tensor]) -> float:
    """The mean error that a layer's own weights and bias bring, on the float graph's activations."""
    made: list[float] = []

    def visit(v: Visit) -> None:
        if v.layer.name == name:
            bias = constant(graph, v.layer.bias) if v.layer.bias is not None else None
            y = nn.functional.conv2d(v.wanted[0], v.layer.weight(graph), bias, groups=v.layer.groups)
            made.append(float((y - v.targets[0]).mean((0, 2, 3)).square().mean().sqrt()))

    walk(float_graph, graph, [samples], visit)
    return made[0]


def test_a_tensor_that_several_layers_made_has_no_known_mean() -> None:
    def call(self: Made, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x)) + x))

    torch.manual_seed(0)
    model = Made(call, first=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4), last=nn.Conv2d(4, 32, 3))
    graph = capture(model, images(4, 4))
    steps.apply("fold_batchnorm", graph, context(WEIGHTS))
    assert all(correct_bias.expected_input(n) is None for n in nodes_of(graph, "conv"))


def test_the_correction_brings_the_output_nearer() -> None:
    graph = cnn()
    plain, (corrected, _) = clone(graph), quantized(STATIC, graph, {})
    steps.apply("quantize_static", plain, context(STATIC, positive()))
    wanted = run(graph, positive(seed=5))[0]
    errors = [float((run(g, positive(seed=5))[0] - wanted).square().mean()) for g in (plain, corrected)]
    assert errors[1] < 0.8 * errors[0]
