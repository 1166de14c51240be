"""Palettes: indices and tables in front of layers, fitted to their inputs, mixed bits, and what is left alone."""

from dataclasses import replace

import pytest
import torch
from small_graphs import IDS, TextLayers, capture, context, images, keeping
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import qdq, steps
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, run
from calibrate.plan import Plan, WeightFormat


def plan(bits: int = 4, **changes: object) -> Plan:
    return replace(Plan(("palettize",), weight=WeightFormat(bits, kind="palette")), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def layers() -> GraphModule:
    torch.manual_seed(0)
    return capture(TextLayers(), IDS)


def lookups(graph: GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    found = [n for n in graph.graph.nodes if n.target is qdq.LOOKUP]
    return {str(n.meta["layer"]): (constant(graph, n.args[0]), constant(graph, n.args[1])) for n in found}


def noise(graph: GraphModule, result: GraphModule, x: Tensor) -> float:
    (before,), (after,) = run(graph, [x]), run(result, [x])
    return float((before - after).square().mean() / before.square().mean())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_every_layer_gets_indices_of_so_many_bits_and_one_table(layers: GraphModule, bits: int) -> None:
    result = clone(layers)
    ledger = steps.apply("palettize", result, context(plan(bits), [IDS]))
    assert [(e.layer, e.action, e.reason) for e in ledger] == [
        (name, f"{bits}-bit palette weights", kind)
        for name, kind in (("table", "embedding"), ("conv", "conv"), ("linear", "linear"))
    ]
    found = lookups(result)
    assert set(found) == {"table.weight", "conv.weight", "linear.weight"}
    for indices, table in found.values():
        assert indices.dtype is torch.uint8
        assert len(table) == 2**bits
        assert int(indices.max()) < 2**bits


def test_more_bits_leave_less_noise(layers: GraphModule) -> None:
    found = []
    for bits in (2, 4, 8):
        result = clone(layers)
        steps.apply("palettize", result, context(plan(bits), [IDS]))
        found.append(noise(layers, result, IDS))
    assert found[0] > 4 * found[1] > 16 * found[2] > 0  # a bit is worth about 6 dB, a factor of 4


def test_tables_are_float16_numbers_where_the_runtime_keeps_halves(layers: GraphModule) -> None:
    halves, singles = clone(layers), clone(layers)
    steps.apply("palettize", halves, context(plan(half_scales=True), [IDS]))
    steps.apply("palettize", singles, context(plan(), [IDS]))
    assert all(torch.equal(table, table.half().float()) for _, table in lookups(halves).values())
    assert not any(torch.equal(table, table.half().float()) for _, table in lookups(singles).values())


def test_channels_that_carry_more_are_stored_more_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, groups=2))
    model[0].weight.data[16:, 1] *= 0.05  # the small weights that meet the large channel
    x = images(4, 8)
    x[:, 5] *= 50
    graph = capture(model, x)
    weighted, plain = clone(graph), clone(graph)
    steps.apply("palettize", weighted, context(plan(3), [x]))
    steps.apply("palettize", plain, context(plan(3, parameters={"palettize": {"importance": "none"}}), [x]))
    assert noise(graph, weighted, x) < 0.5 * noise(graph, plain, x)


def test_a_plan_may_give_layers_other_bits_or_no_palette(layers: GraphModule) -> None:
    mixed = plan(4, formats={"conv": WeightFormat(2, kind="palette"), "linear": WeightFormat(8)})
    result = clone(layers)
    ledger = steps.apply("palettize", result, context(mixed, [IDS]))
    assert [(e.action, e.reason) for e in ledger][1:] == [
        ("2-bit palette weights", "conv"),
        ("left float", "the plan wants int8 there, which is no palette"),
    ]
    assert {name: len(table) for name, (_, table) in lookups(result).items()} == {"table.weight": 16, "conv.weight": 4}


def test_small_layers_and_those_kept_float_are_left_with_the_reason() -> None:
    graph = capture(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 64), nn.Linear(64, 64)), torch.randn(2, 16))
    ledger = steps.apply("palettize", graph, context(keeping(plan(8), **{"2": "asked for"}), [torch.randn(2, 16)]))
    assert [(e.action, e.reason) for e in ledger] == [
        ("left float", "only 128 weights"),
        ("left float", "only 512 weights: a table of 256 would save nothing"),
        ("left float", "asked for"),
    ]
    empty = steps.apply("palettize", capture(nn.ReLU(), torch.randn(2, 3)), context(plan(), [torch.randn(2, 3)]))
    assert [(e.layer, e.action) for e in empty] == [("model", "left alone")]


def test_bits_and_parameters_there_are_not_are_refused(layers: GraphModule) -> None:
    with pytest.raises(CalibrationError, match="'table': a palette has 1, 2, 3, 4, 6, 8 bits, not 5"):
        steps.apply("palettize", clone(layers), context(plan(5), [IDS]))
    wrong = plan(parameters={"palettize": {"importance": "all"}})
    with pytest.raises(CalibrationError, match='importance is "none" or "inputs", not \'all\''):
        steps.apply("palettize", clone(layers), context(wrong, [IDS]))


def test_the_step_notices_indices_beyond_their_table(layers: GraphModule) -> None:
    result = clone(layers)
    steps.apply("palettize", result, context(plan(2), [IDS]))
    promise = steps.find("palettize").ensures
    assert promise(result) is None
    indices = next(n for n in result.graph.nodes if n.target is qdq.LOOKUP).args[0]
    setattr(result, str(indices.target), constant(result, indices) + 1)
    assert "indices up to 4 and a table of 4" in (promise(result) or "")
