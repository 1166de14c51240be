"""Steps that store weights smaller: int8 codes, and half-precision numbers."""

from dataclasses import replace

import pytest
import torch
from small_graphs import IDS, ISLANDS, Made, TextLayers, capture, context, images, keeping, nodes_of
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, run
from calibrate.plan import HALF, Entry, Plan, WeightFormat

WEIGHTS = Plan(("quantize_weights",))
HALVES = Plan(("half_weights",))


def stored_bytes(graph: GraphModule) -> int:
    names = {str(n.target): n for n in graph.graph.nodes if n.op == "get_attr"}
    return sum(constant(graph, n).nbytes for n in names.values())


def test_int8_weights_take_a_quarter_of_the_room_and_keep_the_outputs() -> None:
    graph = capture(TextLayers(), IDS)
    result = clone(graph)
    ledger = steps.apply("quantize_weights", result, context(WEIGHTS))
    assert [(e.layer, e.action) for e in ledger] == [
        ("table", "int8 weights"),
        ("conv", "int8 weights"),
        ("linear", "int8 weights"),
    ]
    weights, channels = 64 * 16 + 32 * 16 * 3 + 24 * 32, 64 + 32 + 24
    # Codes one byte; a float32 scale and an int64 zero point per channel or row; two float32 biases.
    assert stored_bytes(result) == weights + 12 * channels + 4 * (32 + 24)
    (before,), (after,) = run(graph, [IDS]), run(result, [IDS])
    assert float((before - after).square().mean() / before.square().mean()) < 1e-3
    assert not torch.equal(before, after)


def test_a_layer_with_few_weights_or_kept_float_is_left_with_the_reason() -> None:
    graph = capture(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 64)), torch.randn(2, 16))
    ledger = steps.apply("quantize_weights", graph, context(keeping(WEIGHTS, **{"1": "asked for"})))
    assert ledger == [
        Entry("quantize_weights", "0", "left float", "only 128 weights"),
        Entry("quantize_weights", "1", "left float", "asked for"),
    ]


def test_half_weights_round_every_float_constant_to_float16() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), images()
    graph = capture(model, x)
    result = clone(graph)
    ledger = steps.apply("half_weights", result, context(HALVES))
    assert [e.action for e in ledger] == ["float16"] * 4
    assert stored_bytes(result) * 2 == stored_bytes(graph)
    rounded = nn.Sequential(*model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.half().float()
    assert torch.equal(run(result, [x])[0], rounded(x))


def test_half_weights_leave_numbers_beyond_float16_and_say_so() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.data[0, 0] = 1e5
    graph = capture(nn.Sequential(layer), torch.randn(2, 4))
    ledger = steps.apply("half_weights", graph, context(HALVES))
    assert {(e.action, "65504" in e.reason) for e in ledger} == {("left float32", True), ("float16", False)}
    assert bool(run(graph, [torch.randn(2, 4)])[0].isfinite().all())


def test_scales_of_int8_weights_stay_exact_beside_half_weights() -> None:
    graph = capture(nn.Sequential(nn.Linear(32, 16)), torch.randn(2, 32))
    steps.apply("quantize_weights", graph, context(WEIGHTS))
    scales = {n.target: constant(graph, n).clone() for n in nodes_of(graph, "weight") if "scales" in str(n.target)}
    steps.apply("half_weights", graph, context(HALVES))
    assert scales
    assert all(torch.equal(constant_named(graph, name), value) for name, value in scales.items())


def constant_named(graph: GraphModule, name: object) -> Tensor:
    (node,) = [n for n in nodes_of(graph, "weight") if n.target == name]
    return constant(graph, node)


def test_half_weights_of_a_model_without_any_is_an_error() -> None:
    graph = capture(Made(lambda m, x: x.relu()), torch.randn(2, 4))
    with pytest.raises(CalibrationError, match="no float32 weights"):
        steps.apply("half_weights", graph, context(HALVES))


QUANTIZING = ("quantize_static", "quantize_dynamic", "quantize_weights", "quantize_float8", "palettize")


def chain() -> GraphModule:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), X)


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", QUANTIZING)
def test_a_layer_whose_own_format_is_float16_keeps_half_weights_before_float_arithmetic(name: str) -> None:
    kind = {"palettize": "palette", "quantize_float8": "float8_e4m3"}.get(name, "int")
    plan = replace(ISLANDS, steps=(name,), weight=WeightFormat(8, kind=kind), formats={"2": HALF})  # type: ignore[arg-type]
    graph = chain()
    wanted = constant(graph, nodes_of(graph, "linear")[1].args[1]).half()
    ledger = steps.apply(name, graph, context(plan, [X]))
    (entry,) = [e for e in ledger if e.layer == "2"]
    assert (entry.action, entry.reason) == ("float16 weights", "linear, computed in float")
    first, layer, last = nodes_of(graph, "linear")
    cast = layer.args[1]
    assert cast.target is torch.ops.aten.to.dtype
    assert torch.equal(constant(graph, cast.args[0]), wanted)
    assert all(node.args[1].target is not torch.ops.aten.to.dtype for node in (first, last))
    assert {e.layer for e in ledger if e.action == "float16 weights"} == {"2"}


def test_half_weights_of_one_layer_leave_another_that_shares_them_as_it_was() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    graph = capture(Tied(), X)
    steps.apply("quantize_weights", graph, context(replace(WEIGHTS, formats={"first": HALF})))
    first, second = nodes_of(graph, "linear")
    assert first.args[1].target is torch.ops.aten.to.dtype
    assert "dequantize" in str(second.args[1].target)


@pytest.mark.parametrize("name", QUANTIZING[:3])
def test_a_layer_that_float16_cannot_hold_stays_float_and_says_so(name: str) -> None:
    layer = nn.Linear(32, 32)
    layer.weight.data[0, 0] = 1e5
    graph = capture(nn.Sequential(layer), X)
    ledger = steps.apply(name, graph, context(replace(ISLANDS, steps=(name,), formats={"0": HALF}), [X]))
    assert ledger == [Entry(name, "0", "left float", "values beyond float16's 65504")]
    assert constant(graph, nodes_of(graph, "linear")[0].args[1]).dtype == torch.float32


def test_a_layer_kept_float_is_not_halved() -> None:
    graph = chain()
    plan = keeping(replace(WEIGHTS, formats={"2": HALF}), **{"2": "asked for"})
    ledger = steps.apply("quantize_weights", graph, context(plan))
    assert Entry("quantize_weights", "2", "left float", "asked for") in ledger
