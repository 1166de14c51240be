"""Static int8: the graph that comes out, its ledger, its biases, and tensors that no scale can serve."""

from dataclasses import replace

import pytest
import torch
from small_graphs import ISLANDS, SKIPS, Made, capture, context, images, keeping, nodes_of, only
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from calibrate import qdq, steps
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, kind, run
from calibrate.plan import Entry, Plan
from calibrate.simulation import simulate

SIMPLE = replace(ISLANDS, quantize_inputs=frozenset({"conv", "linear"}), quantize_outputs=frozenset())


def quantize(graph: GraphModule, plan: Plan, *batches: Tensor) -> list[Entry]:
    return steps.apply("quantize_static", graph, context(plan, *([b] for b in batches)))


def relative_error(graph: GraphModule, other: GraphModule, *inputs: Tensor) -> float:
    (a,), (b,) = run(graph, inputs), simulate(other)(inputs)
    return float((a - b).square().mean() / a.square().mean())


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10)
    )


def test_a_small_network_computes_nearly_what_it_did() -> None:
    graph = capture(small_cnn(), images(32))
    result = clone(graph)
    quantize(result, ISLANDS, images(32))
    # 20 dB and more: the network's drift at 8 bits, far from a wrong scale's.
    assert relative_error(graph, result, images(32, seed=1)) < 1e-2


def test_the_ledger_names_every_layer_and_how_its_range_was_found() -> None:
    graph = capture(small_cnn(), images(32))
    ledger = quantize(graph, ISLANDS, images(32))
    assert [(e.step, e.layer, e.action) for e in ledger] == [("quantize_static", n, "int8") for n in ("0", "3", "5")]
    first = only_dequantize_of(graph, only(graph, "input"))
    assert f"scale {first.args[1]:.6g}, zero_point {first.args[2]}" in ledger[0].reason
    assert any(f"range by {name}" in ledger[0].reason for name in ISLANDS.observers)


def only_dequantize_of(graph: GraphModule, node: Node) -> Node:
    (quantize_node,) = [u for u in node.users if u.target is qdq.QUANTIZE]
    (made,) = quantize_node.users
    return made


def test_layers_kept_float_are_in_the_ledger_with_the_reason_and_compute_in_float() -> None:
    graph = capture(small_cnn(), images(32))
    plan = keeping(SIMPLE, **{"3": "put back by auto"})
    ledger = quantize(graph, plan, images(32))
    assert Entry("quantize_static", "3", "left float", "put back by auto") in ledger
    (left,) = [n for n in nodes_of(graph, "conv") if n.meta["layer"] == "3"]
    assert all(a.target not in (qdq.DEQUANTIZE, qdq.DEQUANTIZE_CHANNEL) for a in left.all_input_nodes)


def test_quantize_and_dequantize_have_the_same_parameters_everywhere() -> None:
    graph = capture(small_cnn(), images(32))
    quantize(graph, ISLANDS, images(32))
    pairs = [n for n in graph.graph.nodes if n.target is qdq.DEQUANTIZE]
    assert len(pairs) > 3
    assert all(n.args[0].target is qdq.QUANTIZE and n.args[0].args[1:] == n.args[1:] for n in pairs)


def test_moves_of_codes_keep_scale_and_zero_point_in_the_graph() -> None:
    graph = capture(small_cnn(), images(32))
    quantize(graph, ISLANDS, images(32))
    pool = only(graph, "max_pool")
    (after,) = pool.users
    assert isinstance(pool.args[0], Node)
    assert after.args[1:] == pool.args[0].args[1:]


def test_a_tensor_read_twice_by_one_node_is_replaced_in_both_places() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        y = m.conv(x)
        return y + y

    graph = capture(Made(forward, conv=nn.Conv2d(3, 4, 3)), images())
    result = clone(graph)
    quantize(result, ISLANDS, images())
    add = only(result, "add")
    assert add.args[0] is add.args[1]
    assert add.args[0].target is qdq.DEQUANTIZE
    assert relative_error(graph, result, images(seed=1)) < 1e-2


def test_a_float_reader_keeps_the_float_tensor() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        return m.linear(x) * x.sigmoid().sum(-1, keepdim=True)

    graph = capture(Made(forward, linear=nn.Linear(8, 4)), torch.randn(4, 8))
    quantize(graph, SIMPLE, torch.randn(16, 8))
    (sigmoid,) = nodes_of(graph, "sigmoid")
    assert sigmoid.args[0] is only(graph, "input")
    assert only(graph, "linear").args[0].target is qdq.DEQUANTIZE


def test_a_graph_with_several_outputs_quantizes_each() -> None:
    def forward(m: Made, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.body(x).relu()
        return m.head(y), y

    graph = capture(Made(forward, body=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 1)), images())
    result = clone(graph)
    quantize(result, ISLANDS, images())
    assert all(n.target is qdq.DEQUANTIZE for n in result.graph.output_node().args[0])
    for before, after in zip(run(graph, [images()]), simulate(result)([images()]), strict=True):
        assert float((before - after).square().mean() / before.square().mean()) < 1e-2


def test_the_skip_of_a_residual_add_is_read_as_codes_and_the_other_side_as_float() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        y = m.stem(x).relu()
        return m.conv(y) + y

    model = Made(forward, stem=nn.Conv2d(3, 4, 3, padding=1), conv=nn.Conv2d(4, 4, 3, padding=1))
    graph = capture(model, images())
    quantize(graph, SKIPS, images())
    fused, skip = only(graph, "add").args
    assert kind(fused) == "conv"
    assert skip.target is qdq.DEQUANTIZE


# --- biases --------------------------------------------------------------------------------------------------


def step_and_bias(graph: GraphModule, what: str) -> tuple[Tensor, Tensor]:
    """The float32 product of input and weight scales, as float64, and the bias."""
    node = only(graph, what)
    x, weight, bias = node.args[:3]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    scales = constant(graph, weight.args[1])
    return (torch.tensor(x.args[1], dtype=torch.float32) * scales).double(), constant(graph, bias).double()


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
def test_a_bias_is_a_whole_number_of_the_kernels_steps(size: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    layer.bias.data *= size
    graph = capture(nn.Sequential(layer), torch.randn(4, 6))
    quantize(graph, SIMPLE, torch.randn(64, 6))
    unit, bias = step_and_bias(graph, "linear")
    codes = torch.round(bias / unit)
    # The bias is the float32 number nearest to the multiple.
    assert bool(((bias - codes * unit).abs() <= bias.abs() * 2.0**-23).all())
    assert float((bias - layer.bias.detach().double()).abs().max() / unit.max()) <= 0.5 * (1 + size * 1e-2)


def test_the_bias_of_a_channel_with_tiny_weights_does_not_overflow_int32() -> None:
    layer = nn.Linear(6, 2)
    layer.weight.data[0] = 1e-9
    layer.weight.data[1] = torch.randn(6, generator=torch.Generator().manual_seed(0))
    layer.bias.data = torch.tensor([3.0, 0.1])
    graph = capture(nn.Sequential(layer), torch.randn(4, 6))
    result = clone(graph)
    quantize(result, SIMPLE, torch.randn(64, 6))
    unit, bias = step_and_bias(result, "linear")
    assert float((bias / unit).abs().max()) <= 2**30 * (1 + 1e-6)
    assert float(bias[0]) == pytest.approx(3.0)
    x = torch.randn(9, 6)
    assert float((simulate(result)([x])[0] - run(graph, [x])[0]).abs().max()) < 0.2


def test_a_bias_stays_as_it_is_where_the_runtime_adds_it_in_float() -> None:
    layer = nn.Linear(6, 2)
    graph = capture(nn.Sequential(layer), torch.randn(4, 6))
    quantize(graph, replace(SIMPLE, int32_bias=False), torch.randn(64, 6))
    assert torch.equal(constant(graph, only(graph, "linear").args[2]), layer.bias)


def test_a_channel_of_zero_weights_gives_its_bias() -> None:
    layer = nn.Conv2d(3, 2, 3)
    layer.weight.data[0] = 0.0
    graph = capture(nn.Sequential(layer), images())
    quantize(graph, SIMPLE, images())
    (got,) = simulate(graph)([images()])
    step = step_and_bias(graph, "conv")[0][0]
    assert float((got[:, 0] - layer.bias.detach()[0]).abs().max()) <= float(step)


def test_a_dead_layer_whose_weights_have_all_but_vanished_does_not_make_nan() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.data.fill_(1e-41)
    layer.bias.data.zero_()
    graph = capture(nn.Sequential(layer), torch.randn(4, 4))
    quantize(graph, SIMPLE, torch.randn(16, 4) * 1e-30)
    for got in (run(graph, [torch.randn(4, 4)]), simulate(graph)([torch.randn(4, 4)])):
        assert bool(got[0].isfinite().all())


# --- tensors no scale can serve ------------------------------------------------------------------------------


@pytest.mark.parametrize("sentinel", [-3e38, float("-inf"), -1e9], ids=["-3e38", "-inf", "-1e9"])
def test_a_linear_layer_fed_by_a_tensor_with_sentinels_stays_float_with_a_reason(sentinel: float) -> None:
    model = Made(lambda m, x: m.last(m.first(x)), first=nn.Linear(8, 8), last=nn.Linear(8, 4))
    graph = capture(model, torch.randn(4, 8))
    x = torch.randn(64, 8)
    x[::3, ::2] = sentinel
    result = clone(graph)
    ledger = quantize(result, SIMPLE, x)
    reasons = {e.layer: e.reason for e in ledger if e.action == "left float"}
    assert "a mask?" in reasons["first"]
    node = next(n for n in nodes_of(result, "linear") if n.meta["layer"] == "first")
    assert node.args[0] is only(result, "input")


def test_only_the_layers_that_touch_the_sentinels_stay_float() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        return m.first(x.masked_fill(x > 2.0, -3e38)) + m.other(x)

    graph = capture(Made(forward, first=nn.Linear(8, 4), other=nn.Linear(8, 4)), torch.randn(4, 8))
    ledger = quantize(graph, SIMPLE, torch.randn(256, 8))
    actions = {e.layer: e.action for e in ledger if e.layer in ("first", "other")}
    assert actions == {"first": "left float", "other": "int8"}


@pytest.mark.parametrize("reach", [100.0, 1e4, 3e5])
def test_outliers_of_real_data_are_no_sentinels(reach: float) -> None:
    graph = capture(nn.Sequential(nn.Linear(8, 4)), torch.randn(4, 8))
    x = torch.randn(256, 8)
    x[0, 0] = reach
    assert [e.action for e in quantize(graph, SIMPLE, x)] == ["int8"]


def test_large_numbers_all_alike_are_no_sentinels() -> None:
    graph = capture(nn.Sequential(nn.Linear(8, 4)), torch.randn(4, 8))
    assert [e.action for e in quantize(graph, SIMPLE, torch.randn(256, 8) * 1e9)] == ["int8"]


# --- the context ---------------------------------------------------------------------------------------------


def test_no_samples_is_an_error_that_says_so() -> None:
    graph = capture(nn.Sequential(nn.Linear(8, 4)), torch.randn(4, 8))
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        quantize(graph, SIMPLE)


def test_a_second_plan_on_the_same_graph_does_not_look_at_the_data_again() -> None:
    graph = capture(small_cnn(), images(32))
    found = context(ISLANDS, [images(32)])
    steps.apply("quantize_static", clone(graph), found)
    silent = replace(found, batches=lambda: iter(()), few_batches=lambda: iter(()))
    silent.plan = keeping(ISLANDS, **{"5": "wanted"})
    ledger = steps.apply("quantize_static", clone(graph), silent)
    assert {e.layer: e.action for e in ledger} == {"0": "int8", "3": "int8", "5": "left float"}


def test_the_same_graph_and_samples_give_the_same_result_bit_by_bit() -> None:
    def once() -> GraphModule:
        graph = capture(small_cnn(), images(32))
        quantize(graph, ISLANDS, images(32))
        return graph

    first, second = once(), once()
    assert first.code == second.code
    tensors = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in tensors)


def test_a_prescribed_output_scale_is_used_in_either_code_type() -> None:
    base = replace(
        ISLANDS,
        quantize_inputs=ISLANDS.quantize_inputs | {"sigmoid"},
        quantize_outputs=ISLANDS.quantize_outputs | {"sigmoid"},
        fixed_output={"sigmoid": (1 / 256, -128)},
    )
    for activation, zero, low in (("int8", -128, -128), ("uint8", 0, 0)):
        graph = capture(Made(lambda m, x: m.conv(x).sigmoid(), conv=nn.Conv2d(3, 4, 3)), images())
        quantize(graph, replace(base, activation=activation), images())  # type: ignore[arg-type]
        assert graph.graph.output_node().args[0][0].args[1:4] == (1 / 256, zero, low)
