"""GPTQ as a step: every kind of layer and quantization, what is kept, what is refused, what is left alone."""

from dataclasses import replace

import pytest
import torch
from refined_nets import DYNAMIC, STATIC, WEIGHTS, Parameters, batches, cnn, drift, pairs, pictures, refined
from small_graphs import Made, capture, context
from torch import Tensor, nn

from calibrate import steps
from calibrate.coded import coded_layers
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant
from calibrate.plan import Plan, WeightFormat
from calibrate.steps import gptq


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("plan", [STATIC, WEIGHTS, DYNAMIC], ids=lambda p: p.steps[0])
def test_the_network_comes_nearer_to_float_in_every_form_and_width(plan: Plan, bits: int) -> None:
    graph = cnn()
    plan = replace(plan, weight=WeightFormat(bits))
    before, after, ledger = refined(plan, graph, "gptq", {})
    assert [e.layer for e in ledger] == [layer.name for layer in coded_layers(after)]
    if bits < 8:
        assert any(e.action.startswith(f"{bits}-bit codes") for e in ledger)
        assert drift(graph, after) < 0.8 * drift(graph, before)
    else:  # little is left to gain beside 8-bit activations
        assert drift(graph, after) < 1.2 * drift(graph, before)
    assert {layer.bits for layer in coded_layers(after)} == {bits}


@pytest.mark.parametrize("step", ["gptq", "ridge"])
@pytest.mark.parametrize("parameters", [{"scales": "keep"}, {"scales": "refit"}], ids=["keep", "refit"])
def test_groups_stay_groups_and_gain(step: str, parameters: Parameters) -> None:
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 8)), pictures(4))
    plan = replace(WEIGHTS, weight=WeightFormat(3, group=32))
    before, after, ledger = refined(plan, graph, step, parameters)
    shapes = [constant(after, layer.scales).shape for layer in coded_layers(after)]
    assert shapes[0] == (32, 8)
    same = [torch.equal(constant(before, b.scales), constant(after, a.scales)) for b, a in pairs(before, after)]
    assert same[0] == (parameters["scales"] == "keep")
    assert ledger[0].action.startswith("3-bit codes")
    assert drift(graph, after) < drift(graph, before)


def test_a_convolution_gets_the_codes_of_the_linear_layer_it_equals() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 16, 4)
    linear = nn.Linear(64, 16)
    linear.load_state_dict({"weight": conv.weight.detach().flatten(1), "bias": conv.bias.detach()})

    def patches(self: Made, x: Tensor) -> Tensor:
        parts = x.unfold(2, 4, 1).unfold(3, 4, 1)  # [n, c, h, w, 4, 4]
        return self.fc(parts.permute(0, 2, 3, 1, 4, 5).flatten(3))

    codes = []
    for module in (conv, Made(patches, fc=linear)):
        _, after, _ = refined(replace(WEIGHTS, weight=WeightFormat(4)), capture(module, pictures(4)), "gptq", {})
        (layer,) = coded_layers(after)
        codes.append(constant(after, layer.codes).flatten(1))
    # Sums over rows in another order: a code may fall on the other side of a tie.
    assert float((codes[0] != codes[1]).double().mean()) < 0.01


def test_the_float_target_makes_up_for_what_came_before() -> None:
    graph = cnn()
    plan = replace(STATIC, weight=WeightFormat(3))
    results = {t: refined(plan, graph, "gptq", {"target": t})[1] for t in ("layer", "float")}
    assert drift(graph, results["float"]) < drift(graph, results["layer"])


def test_whole_steps_of_the_int32_bias_survive_new_scales() -> None:
    _, after, _ = refined(replace(STATIC, weight=WeightFormat(4)), cnn(), "gptq", {"target": "float"})
    for layer in coded_layers(after):
        scale = layer.input_scale()
        assert layer.bias is not None
        assert scale is not None
        whole = constant(after, layer.bias).double() / (torch.tensor(scale) * constant(after, layer.scales)).double()
        assert float(((whole - whole.round()).abs() / whole.abs().clamp(min=1)).max()) < 1e-6  # float32's rounding


@pytest.mark.parametrize("name", ["gptq", "ridge"])
def test_codes_that_do_not_gain_on_samples_kept_aside_are_not_taken(name: str) -> None:
    graph = cnn()
    before, after, ledger = refined(replace(WEIGHTS, weight=WeightFormat(4)), graph, name, {"damping": 1e9})
    # So damped, GPTQ is rounding to nearest, and ridge changes nothing but the bias.
    changed = [e for e in ledger if e.action.startswith("4-bit")]
    for entry, (was, now) in zip(ledger, pairs(before, after), strict=True):
        if entry not in changed:
            assert torch.equal(constant(before, was.codes), constant(after, now.codes))
            assert "on samples kept aside, not below" in entry.reason


@pytest.mark.parametrize("name", ["gptq", "ridge"])
def test_what_it_cannot_do_is_refused_or_left_alone_with_the_reason(name: str) -> None:
    with pytest.raises(CalibrationError, match=f"{name} has no scales 'best': use keep or refit"):
        refined(WEIGHTS, cnn(), name, {"scales": "best"})
    graph = capture(nn.ReLU(), pictures(4))
    setting = context(STATIC, *batches())
    setting.float_graph = clone(graph)
    (entry,) = steps.apply(name, graph, setting)
    assert (entry.layer, entry.action) == ("model", "left alone")


def test_a_padding_given_as_a_word_is_left_alone() -> None:
    graph = capture(nn.Conv2d(4, 16, 3, padding=1), pictures(4))
    setting = context(replace(WEIGHTS, weight=WeightFormat(4)), *batches())
    steps.apply("quantize_weights", graph, setting)
    (layer,) = coded_layers(graph)
    layer.node.args = (*layer.node.args[:4], "same", *layer.node.args[5:])
    layer.node.target = torch.ops.aten.conv2d.padding
    (entry,) = steps.apply("gptq", graph, setting)
    assert (entry.action, entry.reason) == ("left alone", "padding given as 'same'")


def test_a_code_beyond_its_bits_is_noticed() -> None:
    promise = gptq.STEP.ensures
    _, graph, _ = refined(replace(WEIGHTS, weight=WeightFormat(4)), cnn(), "gptq", {})
    assert promise(graph) is None
    layer = next(coded_layers(graph))
    layer.set_codes(graph, torch.full_like(constant(graph, layer.codes), 8))
    assert "outside -8..7" in (promise(graph) or "")


def test_the_same_seed_makes_the_same_codes() -> None:
    graph = cnn()
    plan = replace(STATIC, weight=WeightFormat(4))
    made = [refined(plan, graph, "gptq", {})[1] for _ in range(2)]
    for a, b in pairs(*made):
        assert torch.equal(constant(made[0], a.codes), constant(made[1], b.codes))


@pytest.mark.parametrize("most", [63, 127])
def test_no_code_goes_beyond_what_the_plan_lets_a_kernel_sum(most: int) -> None:
    plan = replace(DYNAMIC, weight=WeightFormat(8), weight_max=most)
    _, graph, _ = refined(plan, cnn(), "gptq", {"scales": "keep", "target": "float"})
    assert max(int(constant(graph, layer.codes).abs().max()) for layer in coded_layers(graph)) == most


def test_a_bias_that_was_made_for_other_weights_does_not_stay() -> None:
    graph = cnn()
    setting = context(replace(STATIC, weight=WeightFormat(3)), *batches())
    steps.apply("quantize_static", graph, setting)
    alone = clone(graph)
    steps.apply("ridge", graph, setting)
    for made in (graph, alone):
        steps.apply("gptq", made, setting)
    assert setting.float_graph is not None
    # Ridge left biases for weights that GPTQ chose anew: without care the error is many times that of GPTQ alone.
    assert drift(setting.float_graph, graph) < 1.3 * drift(setting.float_graph, alone)
