"""Outlier columns go into a float layer of their own: the same function, a finer int8 scale, plain operators."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import Made, capture, context, nodes_of
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import qdq, steps
from calibrate.errors import CalibrationError
from calibrate.graph import clone, kept_float, layer_name, run
from calibrate.plan import Entry, Plan
from calibrate.samples import InputSpec
from calibrate.simulation import simulate
from device_profiles import load
from targets import Job, find

PLAN = Plan(("quantize_static",))
COLUMNS = (3, 17)


def tokens(count: int = 4, seed: int = 0, columns: tuple[int, ...] = COLUMNS, width: int = 24) -> Tensor:
    x = torch.randn(count, 5, width, generator=torch.Generator().manual_seed(seed))
    x[..., list(columns)] *= 40
    return x


@cache
def two_readers() -> GraphModule:
    torch.manual_seed(0)
    children = {"q": nn.Linear(24, 16), "k": nn.Linear(24, 16, bias=False), "out": nn.Linear(16, 4)}
    return capture(Made(lambda m, x: m.out(torch.relu(m.q(x) * m.k(x))), **children), tokens())


def split(
    graph: GraphModule, *batches: list[Tensor], plan: Plan = PLAN, **more: object
) -> tuple[GraphModule, list[Entry]]:
    result = clone(graph)
    return result, steps.apply(
        "split_outliers", result, context(replace(plan, parameters={"split_outliers": more}), *batches)
    )


def difference(graph: GraphModule, other: GraphModule, x: Tensor) -> float:
    (before,), (after,) = run(graph, [x]), run(other, [x])
    return float((before - after).abs().max() / before.abs().max())


@settings(max_examples=10, deadline=None)
@given(st.sets(st.integers(0, 23), min_size=1, max_size=5), st.integers(0, 2**16))
def test_the_float_function_is_unchanged_whatever_the_columns(columns: set[int], seed: int) -> None:
    chosen = tuple(sorted(columns))
    graph = two_readers()
    result, ledger = split(graph, [tokens(8, seed, chosen)])
    assert [e.action for e in ledger[:2]] == [f"split off {len(chosen)} of 24"] * 2
    # Other sums in another order: float32 rounding relative to the outlier columns' products.
    assert difference(graph, result, tokens(3, seed + 1)) <= 1e-5
    assert difference(graph, result, tokens(3, seed + 1, chosen)) <= 1e-5


def test_the_main_layer_no_longer_reads_the_outliers_and_layers_share_the_mask() -> None:
    result, ledger = split(two_readers(), [tokens()])
    assert ledger[0].reason.startswith("columns 3, 17: up to")
    assert ledger[2] == Entry("split_outliers", "out", "left alone", "no column reaches 6 medians")
    masks = [n for n in nodes_of(result, "mul") if layer_name(n).endswith(".keep")]
    assert len(masks) == 1
    probe = clone(result)
    out = next(n for n in probe.graph.nodes if n.op == "output")
    out.args = ((next(n for n in probe.graph.nodes if n.name == masks[0].name),),)
    probe.recompile()
    (rest,) = run(probe, [tokens(seed=1)])
    assert float(rest.abs().max()) < 6
    assert not bool(rest[..., list(COLUMNS)].any())


def sqnr(graph: GraphModule, step: str, plan: Plan, reference: GraphModule) -> float:
    quantized = clone(graph)
    steps.apply(step, quantized, context(plan, [tokens(16, 2)]))
    (wanted,), (got,) = run(reference, [tokens(16, 3)]), simulate(quantized)([tokens(16, 3)])
    return float(10 * torch.log10(wanted.square().mean() / (wanted - got).square().mean()))


@pytest.mark.parametrize("step", ["quantize_static", "quantize_dynamic"])
def test_int8_comes_nearer_to_float_and_the_small_layer_stays_float(step: str) -> None:
    graph = two_readers()
    result, _ = split(graph, [tokens(16, 2)])
    plan = Plan((step,))
    assert sqnr(result, step, plan, graph) > sqnr(graph, step, plan, graph) + 6
    quantized = clone(result)
    ledger = steps.apply(step, quantized, context(plan, [tokens(16, 2)]))
    left = {e.layer: e.reason for e in ledger if e.action == "left float"}
    assert "outlier columns" in left["q.outliers"]
    assert "outlier columns" in left["k.outliers"]
    assert "q" not in left
    (small,) = [n for n in quantized.graph.nodes if layer_name(n) == "q.outliers"]
    assert small.target is torch.ops.aten.linear.default
    assert small.args[0].target is not qdq.DEQUANTIZE


def test_weights_of_the_small_layer_are_not_quantized_either() -> None:
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Linear(24, 300)), tokens())
    result, _ = split(graph, [tokens()])
    ledger = steps.apply("quantize_weights", result, context(Plan(("quantize_weights",))))
    assert {e.layer: e.action for e in ledger} == {"0": "int8 weights", "0.outliers": "left float"}


def test_layers_with_many_outliers_or_kept_float_are_left_with_the_reason() -> None:
    graph = two_readers()
    many = [tokens(8, 0, tuple(range(11)))]
    result, ledger = split(graph, many, max_columns=8)
    assert ledger[0].reason == "11 outlier columns are more than the 8 that may be split off"
    assert torch.equal(run(graph, [tokens()])[0], run(result, [tokens()])[0])
    _, ledger = split(graph, [tokens()], plan=replace(PLAN, keep_float={"q": "asked for"}))
    assert (ledger[0].action, ledger[0].reason) == ("left alone", "it stays float: asked for")
    assert ledger[1].action.startswith("split")


def test_a_higher_threshold_splits_nothing_and_a_senseless_one_is_refused() -> None:
    _, ledger = split(two_readers(), [tokens()], threshold=100.0)
    assert {e.action for e in ledger} == {"left alone"}
    with pytest.raises(CalibrationError, match="threshold above 1"):
        split(two_readers(), [tokens()], threshold=0.5)
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        split(two_readers())


def test_a_reason_in_the_graph_and_one_in_the_plan_both_keep_a_layer_float() -> None:
    node = nodes_of(clone(two_readers()), "linear")[0]
    assert kept_float(node, {}) is None
    assert kept_float(node, {"q": "plan"}) == "plan"
    node.meta["keep_float"] = "step"
    assert kept_float(node, {}) == "step"


LOWERINGS = {
    "onnx": ("raspberry-pi-4b", "onnxruntime", "m.onnx"),
    "tflite": ("raspberry-pi-4b", "ai_edge_litert", "m.tflite"),
}
LOWERINGS["coreml"] = ("iphone-a17-pro", "coremltools", "m.mlpackage")


@pytest.mark.parametrize("target", LOWERINGS)
@pytest.mark.slow
def test_the_split_layer_lowers_and_runs_on_every_target(target: str, tmp_path: Path) -> None:
    device, library, file = LOWERINGS[target]
    pytest.importorskip(library)
    graph, _ = split(two_readers(), [tokens()])
    spec = InputSpec("x", (1, 5, 24), "float32", dynamic_batch=False)
    job = Job("m", graph, (spec,), ("y",), load(device).rules(target))
    find(target).lower(job, tmp_path / file)
    x = tokens(1, 5)
    got = torch.from_numpy(find(target).open(tmp_path / file).run({"x": x.numpy()})["y"])
    (wanted,) = run(two_readers(), [x])
    # Sums in another order over products of the outlier columns.
    assert float((got - wanted).abs().max() / wanted.abs().max()) <= 1e-5
