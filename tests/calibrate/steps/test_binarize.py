"""The step `binarize`: which layers get few levels, what stays wide, what the graph then holds, and how near it is."""

from dataclasses import replace

import pytest
import torch
from refined_nets import DYNAMIC, STATIC, WEIGHTS, batches, cnn, drift, pictures
from small_graphs import capture, context
from torch import nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.coded import CodedLayer, coded_layers
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, run
from calibrate.plan import Entry, Plan


def network() -> GraphModule:
    """Five layers, two of them in the middle with rows long enough to be binarized."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, groups=24, padding=1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 24),
        nn.ReLU(),
        nn.Linear(24, 16),
    )
    return capture(model, pictures(4))


MIDDLE = {"2", "7"}


def binarized(
    plan: Plan, graph: GraphModule | None = None, **told: object
) -> tuple[GraphModule, GraphModule, list[Entry]]:
    """(float graph, binarized graph, the step's ledger)."""
    graph = network() if graph is None else graph
    setting = context(replace(plan, parameters={"binarize": told}), *batches())
    made = clone(graph)
    steps.apply(plan.steps[0], made, setting)
    return graph, made, steps.apply("binarize", made, setting)


def codes(graph: GraphModule) -> dict[str, set[int]]:
    return {x.name: set(constant(graph, x.codes).flatten().tolist()) for x in coded_layers(graph)}


def rows(graph: GraphModule, layer: CodedLayer) -> int:
    """The most codes that any row of a layer uses."""
    return max(len(set(r.flatten().tolist())) for r in constant(graph, layer.codes))


@pytest.mark.parametrize("plan", [STATIC, DYNAMIC, WEIGHTS], ids=["static", "dynamic", "weights"])
@pytest.mark.parametrize(("method", "allowed"), [("sign", {-1, 1}), ("ternary", {-1, 0, 1})])
def test_layers_in_the_middle_get_signs_or_ternary_codes(plan: Plan, method: str, allowed: set[int]) -> None:
    _, made, ledger = binarized(plan, method=method)
    found = codes(made)
    assert all(found[name] == allowed for name in MIDDLE)
    assert all(len(found[name]) > 3 for name in ("0", "4", "9") if name in found)  # 216 weights may stay float
    assert {e.layer for e in ledger if "levels by" in e.action} == MIDDLE
    reasons = {e.layer: e.reason for e in ledger if "left at 8 bits" in e.action}
    assert "first and the last" in reasons["0"]
    assert "4" not in found or "rows of 9 weights" in reasons["4"]
    assert all(torch.isfinite(t).all() for t in run(made, [pictures()]))


@pytest.mark.parametrize(("largest", "low"), [(0, -127), (7, -8)])
def test_two_planes_are_four_codes_per_row(largest: int, low: int) -> None:
    _, made, _ = binarized(WEIGHTS, method="planes", largest=largest)
    middle = [x for x in coded_layers(made) if x.name in MIDDLE]
    assert [x.low for x in middle] == [low, low]
    assert all(rows(made, x) <= 4 for x in middle)
    assert all(x.levels(made) is not None for x in middle)


def test_more_levels_come_closer_and_all_beat_rounding_to_nearest_of_two_bits() -> None:
    graph, nearest, _ = binarized(replace(WEIGHTS, formats={}))
    two = clone(graph)
    plan = replace(WEIGHTS, weight=replace(WEIGHTS.weight, bits=2))
    wide = dict.fromkeys(("0", "4", "9"), WEIGHTS.weight)
    steps.apply("quantize_weights", two, context(replace(plan, formats=wide), *batches()))
    error = {m: drift(graph, binarized(WEIGHTS, graph, method=m)[1]) for m in ("sign", "ternary", "planes")}
    assert error["planes"] < error["ternary"] < error["sign"] == drift(graph, nearest)
    assert error["ternary"] < 0.5 * drift(graph, two)


def test_making_up_for_earlier_errors_is_worth_it() -> None:
    graph = network()
    blind, told = (drift(graph, binarized(WEIGHTS, graph, target=t)[1]) for t in ("layer", "float"))
    assert told < blind


def test_a_gate_keeps_what_would_lose_too_much_and_lets_the_rest_through() -> None:
    _, made, ledger = binarized(WEIGHTS, gate=1e-6)
    assert all(len(c) > 3 for c in codes(made).values())
    assert all("above the gate" in e.reason for e in ledger if e.layer in MIDDLE)
    _, made, _ = binarized(WEIGHTS, gate=1.0)
    assert all(codes(made)[name] == {-1, 1} for name in MIDDLE)


def test_layers_named_wide_stay_and_ends_can_be_binarized_too() -> None:
    _, made, _ = binarized(WEIGHTS, wide=("2",), ends=False)
    found = codes(made)
    assert len(found["2"]) > 3
    assert found["0"] == found["7"] == found["9"] == {-1, 1}


def test_convolutions_that_the_quantizing_step_left_float_get_codes_beside_float_arithmetic() -> None:
    linear_only = replace(DYNAMIC, dynamic_kinds=frozenset({"linear"}))
    _, made, ledger = binarized(linear_only)
    assert codes(made)["2"] == {-1, 1}
    assert [x.dynamic for x in coded_layers(made)] == [False, False, True, True]
    assert any(e.layer == "2" and "left it float" in e.reason for e in ledger)
    kept = replace(linear_only, keep_float={"2": "asked for"})
    assert "2" not in codes(binarized(kept)[1])


def test_the_bias_of_a_static_layer_is_a_whole_number_of_steps() -> None:
    _, made, _ = binarized(STATIC)
    for layer in coded_layers(made):
        step, bias = layer.input_scale(), layer.bias
        if layer.name in MIDDLE and step is not None and bias is not None:
            unit = (torch.tensor(step) * constant(made, layer.scales)).double()
            steps_ = constant(made, bias).double() / unit
            assert float((steps_ - steps_.round()).abs().max()) < 1e-3  # float32 numbers of up to 2^14 steps


def test_training_keeps_signs_signs_and_comes_closer() -> None:
    graph, made, _ = binarized(WEIGHTS, target="layer", rounds=0, samples=8)  # a rough start
    setting = context(replace(WEIGHTS, parameters={"finetune": {"iterations": 60, "batch": 8}}), *batches())
    setting.float_graph = graph
    before = drift(graph, made)
    (entry,) = steps.apply("finetune", made, setting)
    assert "trained" in entry.action
    assert all(codes(made)[name] == {-1, 1} for name in MIDDLE)
    assert drift(graph, made) < before


@pytest.mark.parametrize("method", ["sign", "planes"])
def test_learned_rounding_moves_between_the_levels_of_a_row(method: str) -> None:
    graph, made, _ = binarized(WEIGHTS, method=method)
    rough = clone(made)
    setting = context(replace(WEIGHTS, parameters={"reconstruct": {"iterations": 40, "unit": "layer"}}), *batches())
    setting.float_graph = graph
    steps.apply("reconstruct", made, setting)
    for new, old in zip(coded_layers(made), coded_layers(rough), strict=True):
        if new.name in MIDDLE:
            assert rows(made, new) <= (2 if method == "sign" else 4)
            allowed = {abs(c) for c in codes(rough)[old.name]}
            assert {abs(c) for c in codes(made)[new.name]} <= allowed


def test_gptq_leaves_layers_of_few_levels_alone() -> None:
    graph, made, _ = binarized(WEIGHTS)
    setting = context(WEIGHTS, *batches())
    setting.float_graph = graph
    ledger = steps.apply("gptq", made, setting)
    assert all(codes(made)[name] == {-1, 1} for name in MIDDLE)
    assert all("two to four levels" in e.reason for e in ledger if e.layer in MIDDLE)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"method": "bits"}, "there is no binarizer 'bits'"),
        ({"target": "block"}, "use layer or float"),
        ({"options": {"rule": "x"}}, "has no option 'rule'"),
        ({"gate": 2.0}, "gate from 0"),
        ({"wide": ("99",)}, "no layer '99' has coded weights"),
        ({"method": "onebit"}, "columns scales of their own"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_to_do(told: dict[str, object], said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        binarized(WEIGHTS, **told)


def test_without_a_quantizing_step_before_it_says_so() -> None:
    with pytest.raises(CalibrationError, match="put a quantizing step before it"):
        steps.apply("binarize", cnn(), context(WEIGHTS, *batches()))


@pytest.mark.parametrize("plan", [STATIC, DYNAMIC, WEIGHTS], ids=["static", "dynamic", "weights"])
def test_signs_of_trained_weights_are_fitted_to_those_and_not_to_the_float_model(plan: Plan) -> None:
    # Training that turned every weight of a layer and its bias around: signs of float weights are then all wrong.
    turned: dict[str, GraphModule] = {}
    for source in ("float", "graph"):
        setting = context(replace(plan, parameters={"binarize": {"source": source, "target": "layer"}}), *batches())
        made = network()
        steps.apply(plan.steps[0], made, setting)
        (layer,) = [x for x in coded_layers(made) if x.name == "7"]
        layer.set_codes(made, -constant(made, layer.codes))
        assert layer.bias is not None
        layer.set_bias(made, -constant(made, layer.bias), plan.int32_bias)
        before = run(made, [pictures()])[0]
        steps.apply("binarize", made, setting)
        turned[source] = made
        if source == "graph":
            error = (run(made, [pictures()])[0] - before).square().sum() / before.square().sum()
    signs = {s: next(constant(g, x.codes) for x in coded_layers(g) if x.name == "7") for s, g in turned.items()}
    assert float((signs["float"] == -signs["graph"]).double().mean()) > 0.75  # errors carried turn small ones
    wrong = (run(turned["float"], [pictures()])[0] - before).square().sum() / before.square().sum()
    assert error < 0.5 * wrong


def test_a_source_that_there_is_not_is_refused() -> None:
    with pytest.raises(CalibrationError, match="binarize has no source 'mine': use float or graph"):
        binarized(STATIC, source="mine")
