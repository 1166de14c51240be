"""Equalizing moves scales between layers: no output changes, channel ranges come together, int8 gets better."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import Builder, conv, inputs, network
from small_graphs import ISLANDS, Made, capture, context, images, nodes_of
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.affine import input_reach, layer_of, output_reach
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, kind, operator_name, run
from calibrate.plan import Entry
from calibrate.simulation import simulate

aten = torch.ops.aten
# float32 rounding of a few layers, relative to the output's range.
TOLERANCE = 1e-5
CHAINS = ("affine", "clamp", "conv", "depthwise", "gate", "leaky", "pool", "residual", "transposed")


def equalized(graph: GraphModule, *batches: list[Tensor], **parameters: object) -> tuple[GraphModule, list[Entry]]:
    result = clone(graph)
    plan = replace(ISLANDS, parameters={"equalize": parameters})
    return result, steps.apply("equalize", result, context(plan, *batches))


def difference(graph: GraphModule, other: GraphModule, x: Tensor) -> float:
    pairs = zip(run(graph, [x]), run(other, [x]), strict=True)
    return max(float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30) for a, b in pairs)


def uneven(*layers: nn.Conv2d) -> None:
    """Make the channels between these layers differ up to 50 times, each undone by the layer that reads it."""
    generator = torch.Generator().manual_seed(0)
    for first, second in pairwise(layers):
        factor = torch.exp(torch.rand(len(first.weight), generator=generator) * 4)
        first.weight.data *= factor.view(-1, 1, 1, 1)
        first.bias.data *= factor
        second.weight.data /= factor.view((1, -1, 1, 1) if second.groups == 1 else (-1, 1, 1, 1))


@cache
def mobile() -> GraphModule:
    """conv, relu, depthwise, relu, conv: the triple of the paper."""
    torch.manual_seed(0)
    first, middle, last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
    uneven(first, middle, last)
    return capture(nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last), images())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(CHAINS), min_size=2, max_size=7),
    st.integers(0, 2**16),
    st.sampled_from(["activations", "weights"]),
    st.booleans(),
)
def test_no_random_graph_changes_its_outputs(pieces: list[str], seed: int, ranges: str, rewrites: bool) -> None:
    graph = network(["conv", *pieces], seed)
    steps.apply("fuse_activations", graph, context(ISLANDS))
    more = {"silu": rewrites, "relu6": "channels" if rewrites else "leave"}
    result, ledger = equalized(graph, [inputs(seed + 5, 8)], ranges=ranges, **more)
    assert ledger
    assert difference(graph, result, inputs(seed)) <= TOLERANCE


def test_the_property_notices_a_layer_that_was_not_scaled_back() -> None:
    graph = mobile()
    result, _ = equalized(graph, ranges="weights")
    before = nodes_of(graph, "conv")
    wrong = clone(result)
    last = nodes_of(wrong, "conv")[2]
    wrong.register_buffer("old", graph.get_parameter(str(before[2].args[1].target)).detach())
    last.args[1].target = "old"
    wrong.recompile()
    assert difference(graph, result, images(5, seed=3)) <= TOLERANCE < difference(graph, wrong, images(5, seed=3))


def test_weights_of_a_depthwise_triple_end_at_the_closed_form_of_the_paper() -> None:
    graph = mobile()
    result, ledger = equalized(graph, ranges="weights")
    assert [e.action.split()[0] for e in ledger if e.layer in ("0", "2")] == ["equalized", "equalized"]

    def reaches(g: GraphModule) -> list[Tensor]:
        first, middle, last = (layer_of(g, n) for n in nodes_of(g, "conv"))
        return [output_reach(g, first), output_reach(g, middle), input_reach(g, last)]

    wanted = torch.stack(reaches(graph)).prod(0) ** (1 / 3)
    for found in reaches(result):
        # Sweeps end when no scale moves by more than 1e-3; float32 weights.
        torch.testing.assert_close(found, wanted, rtol=5e-3, atol=0)
    assert not torch.allclose(reaches(graph)[0], wanted, rtol=5e-3)


def test_ranges_of_activations_come_together_and_int8_comes_nearer_to_float() -> None:
    graph = mobile()
    batch = [images(16, seed=1)]
    result, ledger = equalized(graph, batch)
    assert all(e.action.startswith("equalized") for e in ledger if e.layer in ("0", "2"))

    def spread(g: GraphModule) -> list[float]:
        seen = []
        for node in nodes_of(g, "relu"):
            probe = clone(g)
            out = next(n for n in probe.graph.nodes if n.op == "output")
            out.args = ((next(n for n in probe.graph.nodes if n.name == node.name),),)
            probe.recompile()
            reach = run(probe, batch)[0].amax((0, 2, 3))
            seen.append(float(reach.max() / reach[reach > 0].min()))
        return seen

    assert all(after < before / 4 for before, after in zip(spread(graph), spread(result), strict=True))

    def sqnr(g: GraphModule) -> float:
        quantized = clone(g)
        steps.apply("quantize_static", quantized, context(ISLANDS, batch))
        x = images(16, seed=2)
        wanted, got = run(graph, [x])[0], simulate(quantized)([x])[0]
        return float(10 * torch.log10(wanted.square().mean() / (wanted - got).square().mean()))

    assert sqnr(result) > sqnr(graph) + 3


def test_dead_channels_keep_their_weights() -> None:
    graph = mobile.__wrapped__()  # its weights are changed below
    first = nodes_of(graph, "conv")[0]
    weight, bias = (graph.get_parameter(str(a.target)) for a in first.args[1:3])
    weight.data[2], bias.data[2] = 0.0, 0.0
    for ranges in ("weights", "activations"):
        result, _ = equalized(graph, [images(8)], ranges=ranges)
        assert difference(graph, result, images(3, seed=4)) <= TOLERANCE
        found = layer_of(result, nodes_of(result, "conv")[0])
        assert float(output_reach(result, found)[2]) == 0


def reasons(model: nn.Module, **parameters: object) -> dict[str, str]:
    graph = capture(model, images())
    result, ledger = equalized(graph, [images(8)], **parameters)
    assert difference(graph, result, images(3, seed=5)) <= TOLERANCE
    return {e.layer: e.reason for e in ledger if e.action == "left alone"}


def test_adds_gates_and_clamps_stop_a_scale_and_the_ledger_says_which() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.b(nn.functional.silu(y))
        return m.d(m.c(nn.functional.relu6(z)) + z)

    children = {n: nn.Conv2d(3, 3, 1) for n in "abcd"}
    found = reasons(Made(forward, **children))
    assert "silu is not positively homogeneous" in found["a"]
    assert "relu6 would need a bound per channel" in found["b"]
    assert "(add) mixes or joins its channels" in found["c"]
    assert found["d"] == "its output leaves the model"


def test_silu_and_relu6_are_rewritten_where_asked_for() -> None:
    torch.manual_seed(0)
    a, b, c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
    uneven(a, b, c)
    graph = capture(nn.Sequential(a, nn.SiLU(), b, nn.ReLU6(), c), images())
    steps.apply("fuse_activations", graph, context(ISLANDS))
    result, ledger = equalized(graph, [images(8)], ranges="weights", silu=True, relu6="channels")
    assert [e.action for e in ledger][:2] != ["left alone", "left alone"]
    names = [operator_name(n) for n in result.graph.nodes if n.op == "call_function"]
    assert names == ["conv2d", "mul", "sigmoid", "mul", "conv2d", "relu", "minimum", "conv2d"]
    assert difference(graph, result, images(9, seed=7) * 5) <= TOLERANCE


def test_channels_between_layers_without_an_activation_are_centred() -> None:
    torch.manual_seed(0)
    a, b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)
    a.bias.data += torch.linspace(-20, 20, 8)
    graph = capture(nn.Sequential(a, b), images())
    result, ledger = equalized(graph, [images(8)])
    assert "shifted" in ledger[-1].reason
    assert difference(graph, result, images(9, seed=7)) <= TOLERANCE
    assert float(constant(result, nodes_of(result, "conv")[0].args[2]).abs().max()) < 5
    kept, _ = equalized(graph, [images(8)], absorb_bias="never")
    assert float(constant(kept, nodes_of(kept, "conv")[0].args[2]).abs().max()) > 5


def biased(padding: int) -> GraphModule:
    torch.manual_seed(0)
    a, b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=padding)
    a.bias.data[:4] += 30  # far above what the weights can take off
    return capture(nn.Sequential(a, nn.ReLU(), b), images())


def test_high_biases_behind_a_relu_are_absorbed_only_when_asked_for_and_only_without_padding() -> None:
    x, batch = images(9, seed=7), [images(64)]
    _, ledger = equalized(biased(0), batch)
    assert all("absorbed" not in e.reason for e in ledger)
    absorbed, ledger = equalized(biased(0), batch, absorb_bias="calibrated")
    assert "4 biases absorbed" in ledger[-1].reason
    assert difference(biased(0), absorbed, x) <= TOLERANCE  # no sample goes below the calibrated least by a bias of 30
    _, ledger = equalized(biased(1), batch, absorb_bias="calibrated")
    assert all("absorbed" not in e.reason for e in ledger)


def test_statistics_of_a_folded_batch_norm_give_the_biases_to_absorb_without_data() -> None:
    torch.manual_seed(0)
    a, norm, b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    norm.bias.data[:3] = 50.0
    graph = capture(nn.Sequential(a, norm, nn.ReLU(), b).eval(), images())
    steps.apply("fold_batchnorm", graph, context(ISLANDS))
    result, ledger = equalized(graph, ranges="weights", absorb_bias="calibrated")
    assert "3 biases absorbed at three deviations" in ledger[-1].reason
    assert difference(graph, result, images(9, seed=7)) <= TOLERANCE


def test_a_flatten_between_convolution_and_linear_layer_repeats_the_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5))
    graph = capture(model, images())
    result, ledger = equalized(graph, [images(16)], ranges="weights")
    assert any(e.layer == "0" and e.action == "equalized with 4" for e in ledger)
    assert difference(graph, result, images(9, seed=7)) <= TOLERANCE


def test_two_layers_that_read_the_same_channels_are_scaled_alike() -> None:
    b = Builder(torch.randn(2, 4, 6, 6), 0)
    hidden = b.call(aten.leaky_relu.default, conv(b, b.x, padding=0, kernel=1), 0.2)
    graph = b.finish(conv(b, hidden, padding=1, kernel=3), conv(b, hidden, padding=0, kernel=1))
    result, ledger = equalized(graph, ranges="weights")
    assert any(", " in e.action for e in ledger)
    assert difference(graph, result, inputs(3)) <= TOLERANCE


def test_a_wrong_word_is_refused_with_those_there_are() -> None:
    with pytest.raises(CalibrationError, match="no ranges = 'both'; there are activations, weights"):
        equalized(mobile(), ranges="both")


def test_empty_calibration_data_is_refused_unless_weights_are_enough() -> None:
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        equalized(mobile())
    equalized(mobile(), ranges="weights")


def test_a_model_without_layers_says_so() -> None:
    graph = capture(Made(lambda m, x: x.relu()), torch.randn(2, 4))
    _, ledger = equalized(graph)
    assert [(e.layer, e.action) for e in ledger] == [("model", "left alone")]
    assert kind(next(n for n in graph.graph.nodes if n.op == "call_function")) == "relu"
