"""A coded residual beside a coded layer: the weight error shrinks by 2^(bits - 1) - 1 an order, on every target."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_graphs import ISLANDS, SKIPS, Made, capture, context, images, nodes_of
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.coded import coded_layers
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, layer_name, run, weight_nodes
from calibrate.plan import Entry, Plan, WeightFormat
from calibrate.samples import InputSpec
from calibrate.simulation import simulate
from device_profiles import load
from targets import Job, find

ALL = {"layers": "worst", "worst": 1.0, "share": 1.0}


@cache
def model() -> GraphModule:
    """A convolution with relu, a depthwise one without, a linear head."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten()]
    return capture(nn.Sequential(*layers, nn.Linear(16 * 36, 8)), images())


def expanded(step: str, plan: Plan = ISLANDS, **parameters: object) -> tuple[GraphModule, GraphModule, list[Entry]]:
    """(quantized, quantized and expanded, ledger)."""
    graph, work = (
        clone(model()),
        context(replace(plan, parameters={"expand_residual": parameters}), [images(16, seed=1)]),
    )
    steps.apply(step, graph, work)
    result = clone(graph)
    return graph, result, steps.apply("expand_residual", result, work)


def weight_error(graph: GraphModule, name: str) -> float:
    """The largest error of a layer's weight, its residuals added up."""
    total = sum(layer.weight(graph) for layer in coded_layers(graph) if layer.name.split(".res")[0] == name)
    wanted = constant(model(), weight_nodes(next(n for n in model().graph.nodes if layer_name(n) == name))[0])
    return float((wanted - total).abs().max())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("step", ["quantize_weights", "quantize_static", "quantize_dynamic"])
def test_each_order_divides_the_largest_weight_error_by_the_largest_code(step: str, bits: int) -> None:
    plan = replace(ISLANDS, weight=WeightFormat(bits), dynamic_kinds=frozenset({"linear", "conv"}))
    errors = []
    for orders in (1, 2):
        _, result, ledger = expanded(step, plan, orders=orders, **ALL)
        assert [e.action for e in ledger] == [f"expanded by {orders} coded residual(s)"] * len(ledger)
        errors.append(weight_error(result, "4"))
    before, _, _ = expanded(step, plan, **ALL)
    errors.insert(0, weight_error(before, "4"))
    largest = 127 if bits == 8 else 2 ** (bits - 1) - 1
    for coarse, fine in pairwise(errors):
        # Half a step of a scale that is the largest residual over the largest code; float32 scales, residuals of 1e-6.
        assert fine <= coarse / (2 * largest) * 1.01 + 1e-8


def sqnr(graph: GraphModule) -> float:
    x = images(16, seed=2)
    (wanted,), (got,) = run(model(), [x]), simulate(graph)([x])
    return float(10 * torch.log10(wanted.square().mean() / (wanted - got).square().mean()))


@pytest.mark.parametrize("step", ["quantize_weights", "quantize_static", "quantize_dynamic"])
def test_outputs_of_four_bit_layers_come_much_nearer_to_float(step: str) -> None:
    plan = replace(ISLANDS, weight=WeightFormat(4), dynamic_kinds=frozenset({"linear", "conv"}))
    before, after, _ = expanded(step, plan, **ALL)
    _, half, _ = expanded(step, plan, **{**ALL, "share": 0.5})
    assert sqnr(after) > sqnr(half) > sqnr(before)
    assert sqnr(after) > sqnr(before) + 8


def test_only_the_neurons_with_the_largest_residual_are_served() -> None:
    before, after, ledger = expanded(
        "quantize_weights", replace(ISLANDS, weight=WeightFormat(4)), share=0.25, layers=["4"]
    )
    assert "2 of 8 neurons" in ledger[0].reason
    (extra,) = [layer for layer in coded_layers(after) if layer.name == "4.residual"]
    rows = constant(after, extra.codes).abs().amax(1) > 0
    wanted = next(n for n in model().graph.nodes if layer_name(n) == "4")
    rest = constant(model(), wanted.args[1]) - next(
        layer for layer in coded_layers(before) if layer.name == "4"
    ).weight(before)
    assert set(torch.nonzero(rows).flatten().tolist()) == set(rest.norm(dim=1).topk(2).indices.tolist())
    assert len(list(coded_layers(after))) == len(list(coded_layers(before))) + 1


def test_the_worst_share_of_layers_is_chosen_by_relative_weight_error() -> None:
    _, after, ledger = expanded("quantize_weights", replace(ISLANDS, weight=WeightFormat(4)), worst=0.3)
    layers = [layer for layer in coded_layers(after) if "residual" not in layer.name]
    errors = {e.layer for e in ledger}
    assert len(ledger) == len(errors) == 1
    assert len(layers) == 2 or len(layers) == 3  # a layer with few weights stays float


def test_groups_of_weights_have_residuals_in_groups() -> None:
    plan = replace(ISLANDS, weight=WeightFormat(4, group=32))
    _, after, _ = expanded("quantize_weights", plan, layers=["4"], share=1.0)
    both = [constant(after, layer.scales) for layer in coded_layers(after) if layer.name.startswith("4")]
    assert [tuple(s.shape) for s in both] == [(8, 18), (8, 18)]
    assert weight_error(after, "4") < 1e-2


def test_a_static_layer_whose_kernel_writes_codes_adds_on_codes() -> None:
    _, after, _ = expanded("quantize_static", **ALL)
    for add in nodes_of(after, "add"):
        if layer_name(add) != "4.sum":  # the head writes the model's output, in float
            assert all("dequantize_per_tensor" in str(a.target) for a in add.args)


def test_without_an_int8_add_such_a_layer_is_left_and_under_tensorrt_the_add_is_float() -> None:
    plan = replace(ISLANDS, residual_add="none")
    _, _, ledger = expanded("quantize_static", plan, **ALL)
    assert {e.layer for e in ledger if e.action == "left alone" and "no int8 add" in e.reason} == {"0", "2", "4"}
    _, after, ledger = expanded("quantize_static", SKIPS, **ALL)
    assert all(e.action.startswith("expanded") for e in ledger)
    assert all(a.target is add.args[0].target for add in nodes_of(after, "add") for a in add.args)


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no layer 'head' has coded weights; there are 0, 2, 4"):
        expanded("quantize_static", layers=["head"])
    with pytest.raises(CalibrationError, match="share above 0"):
        expanded("quantize_static", share=0.0)
    with pytest.raises(CalibrationError, match="1 to 4 orders"):
        expanded("quantize_static", orders=9)
    with pytest.raises(CalibrationError, match="put a quantizing step before it"):
        steps.apply("expand_residual", model(), context(ISLANDS))


def test_a_graph_whose_weights_are_all_float_says_so() -> None:
    graph = capture(Made(lambda m, x: m.a(x), a=nn.Linear(4, 4)), torch.randn(2, 4))
    work = context(Plan(("quantize_weights",)))
    steps.apply("quantize_weights", graph, work)  # 16 weights are too few
    assert [(e.layer, e.action) for e in steps.apply("expand_residual", graph, work)] == [("model", "left alone")]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["quantize_weights", "quantize_static", "quantize_dynamic"])
@pytest.mark.parametrize(("target", "library"), [("onnx", "onnxruntime"), ("tflite", "ai_edge_litert")])
def test_expanded_layers_lower_and_run_as_simulated(step: str, target: str, library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    rules = load("raspberry-pi-4b").rules(target)
    plan = replace(
        ISLANDS,
        weight_max=63,  # products of unsigned codes and larger weights saturate on x86 processors without VNNI
        activation=rules.activation_dtype,
        quantize_inputs=frozenset(rules.quantize_inputs),
        quantize_outputs=frozenset(rules.quantize_outputs),
        shared_scale=frozenset(rules.shared_scale),
        dynamic_scheme=rules.dynamic_scheme,
        dynamic_kinds=frozenset(rules.dynamic_ops),
    )
    _, graph, ledger = expanded(step, plan, **ALL)
    assert any(e.action.startswith("expanded") for e in ledger)
    spec = InputSpec("x", (1, 3, 8, 8), "float32", dynamic_batch=False)
    path = tmp_path / f"m.{target}"
    find(target).lower(Job("m", graph, (spec,), ("y",), rules), path)
    session = find(target).open(path)
    adder = "fixed_point" if target == "tflite" else "float"
    wanted, got = [], []
    for seed in range(8):
        x: Tensor = images(1, seed=seed)
        wanted.append(simulate(graph, adder=adder)([x])[0].numpy())
        got.append(session.run({"x": x.numpy()})["y"])
    # Float sums in another order; on codes, a tie may round to the neighbouring code of a tensor before the head.
    limit = 1e-5 if step == "quantize_weights" else 2e-2
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(wanted), rtol=0, atol=limit)
