"""Training by distillation: closer to float on samples it never saw, in numbers a runtime can store, or not there."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_graphs import ISLANDS, Made, capture, context, images
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import qdq, steps
from calibrate.coded import coded_layers
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, run
from calibrate.plan import Entry, Plan, WeightFormat
from calibrate.steps import Context
from calibrate.training_samples import Samples, output_db

FAST = {"iterations": 30, "lr": 0.02, "batch": 16}
PLAN = replace(
    ISLANDS,
    weight=WeightFormat(2),
    dynamic_kinds=frozenset({"conv", "linear"}),
    parameters={"finetune": FAST},
)
UNSEEN = images(64, seed=9)
CLASSES = torch.arange(64) % 4


def small(m: Made, x: Tensor) -> Tensor:
    x = torch.relu(m.stem(x))
    x = torch.relu(m.first(x)) + x
    x = torch.nn.functional.max_pool2d(x, 2)
    return m.head(m.norm(x.flatten(2).mean(2)))


def quantized(plan: Plan = PLAN, by: str = "quantize_static", count: int = 64) -> tuple[GraphModule, Context]:
    torch.manual_seed(0)
    parts = {
        "stem": nn.Conv2d(3, 8, 3, padding=1),
        "first": nn.Conv2d(8, 8, 3, padding=1),
        "norm": nn.LayerNorm(8),
        "head": nn.Linear(8, 4),
    }
    graph = capture(Made(small, **parts), images())
    setting = context(plan, *[[b] for b in images(count).split(16)])
    steps.apply(by, graph, setting)
    return graph, setting


def with_(**parameters: Any) -> Plan:
    return replace(PLAN, parameters={"finetune": {**FAST, **parameters}})


def signal(graph: GraphModule, setting: Context) -> float:
    assert setting.float_graph is not None
    return output_db(setting.float_graph, graph, [[UNSEEN]])


def state(graph: GraphModule) -> list[Any]:
    """Every number that training may change, in the order of the graph."""
    found: list[Any] = []
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found.append(constant(graph, node))
        elif node.target in (qdq.QUANTIZE, qdq.DEQUANTIZE):
            found.append(torch.tensor(node.args[1], dtype=torch.float64))
    return found


def scales(graph: GraphModule) -> list[tuple[float, float]]:
    """(scale of the quantize node, scale of its dequantize node) for each static tensor."""
    pairs = []
    for node in graph.graph.nodes:
        if node.target is qdq.QUANTIZE:
            (reader,) = node.users
            pairs.append((node.args[1], reader.args[1]))
    return pairs


@pytest.mark.parametrize("by", ["quantize_static", "quantize_dynamic", "quantize_weights"])
def test_training_brings_the_output_closer_to_float_on_samples_it_never_saw(by: str) -> None:
    graph, setting = quantized(by=by)
    before = signal(graph, setting)
    (entry,) = steps.apply("finetune", graph, setting)
    assert entry.action.startswith("trained ")
    assert "weights with their scales" in entry.action
    assert "KL divergence, the float model's class for" in entry.reason
    assert "on held-out samples after" in entry.reason
    assert signal(graph, setting) > before + 1  # a fifth less squared error: more than unseen samples differ by


def test_the_ledger_tells_what_the_finished_graph_measures() -> None:
    graph, setting = quantized()
    (entry,) = steps.apply("finetune", graph, setting)
    samples = Samples.of(graph, setting, 1024)
    assert samples is not None
    assert setting.float_graph is not None
    wanted, got = (torch.cat([run(g, b)[0] for b in samples.held]) for g in (setting.float_graph, graph))
    apart = (wanted.softmax(1) * (wanted.log_softmax(1) - got.log_softmax(1))).sum(1).mean()
    assert f"-> {apart:.3g} KL divergence" in entry.reason
    assert f"-> {(wanted.argmax(1) == got.argmax(1)).double().mean():.1%}, on held-out" in entry.reason
    assert "dB" not in entry.reason


def test_training_that_does_not_help_is_rolled_back_whole() -> None:
    graph, setting = quantized(with_(lr=1000.0))  # every weight at an end of its range in one step
    before, old, pairs = run(graph, [UNSEEN])[0], state(graph), scales(graph)
    (entry,) = steps.apply("finetune", graph, setting)
    assert entry.action == "left alone"
    assert "rolled back" in entry.reason
    assert torch.equal(run(graph, [UNSEEN])[0], before)
    assert scales(graph) == pairs
    assert all(torch.equal(a, b) for a, b in zip(state(graph), old, strict=True))


def test_what_is_written_back_can_be_stored() -> None:
    graph, setting = quantized()
    steps.apply("finetune", graph, setting)
    for layer in coded_layers(graph):
        codes, scale = constant(graph, layer.codes), layer.input_scale()
        assert codes.dtype == torch.int8
        assert layer.low <= int(codes.min()) <= int(codes.max()) <= layer.high
        assert layer.bias is not None
        assert scale is not None
        assert scale == float(torch.tensor(scale, dtype=torch.float32))
        unit = (torch.tensor(scale, dtype=torch.float32) * constant(graph, layer.scales)).double()
        whole = constant(graph, layer.bias).double() / unit
        assert float((whole - torch.round(whole)).abs().max()) < 1e-3  # float32 holds these few thousand steps so well


def test_tensors_that_share_a_scale_share_the_trained_one() -> None:
    graph, setting = quantized()
    before = scales(graph)
    steps.apply("finetune", graph, setting)
    after = scales(graph)
    assert before != after
    assert all(q == dq for q, dq in after)
    assert len(before) > len(set(before))  # the max pool's input and output
    trained = dict(zip(before, after, strict=True))
    assert [trained[b] for b in before] == after


def test_a_scale_that_the_plan_fixes_stays() -> None:
    # The classifier's input is (say) fixed by the runtime: its scale is named in the plan and must survive.
    graph, setting = quantized()
    first = scales(graph)[0]
    setting.plan = replace(setting.plan, fixed_output={"softmax": (first[0], 0)})
    before = scales(graph)
    steps.apply("finetune", graph, setting)
    after = scales(graph)
    assert after[0] == first
    assert after[1:] != before[1:]


def test_layer_norms_learn_and_graphs_that_share_their_constants_do_not_see_it() -> None:
    graph, setting = quantized()
    assert setting.float_graph is not None
    before = run(graph, [UNSEEN])[0], run(setting.float_graph, [UNSEEN])[0]
    result = clone(graph)
    steps.apply("finetune", result, setting)
    (norm,) = [n for n in result.graph.nodes if "layer_norm" in str(n.target)]
    (old,) = [n for n in graph.graph.nodes if "layer_norm" in str(n.target)]
    assert not torch.equal(constant(result, norm.args[2]), constant(graph, old.args[2]))
    assert torch.equal(run(graph, [UNSEEN])[0], before[0])
    assert torch.equal(run(setting.float_graph, [UNSEEN])[0], before[1])


@pytest.mark.parametrize(("labels", "intervention"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_same_seed_trains_the_same_numbers_and_another_seed_others(labels: float, intervention: float) -> None:
    found = []
    for seed in (0, 0, 1):
        graph, setting = quantized(with_(iterations=6, labels=labels, intervention=intervention))
        setting.seed, setting.labels = seed, CLASSES
        steps.apply("finetune", graph, setting)
        found.append(torch.cat([t.double().flatten() for t in state(graph)]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_time_limit_ends_training_after_the_step_that_reaches_it_and_the_ledger_says_so() -> None:
    graph, setting = quantized(with_(time_limit_s=1e-6))
    (entry,) = steps.apply("finetune", graph, setting)
    assert entry.reason.endswith("stopped by time_limit_s after 1 of 30 steps: another run may differ")
    (whole,) = steps.apply("finetune", *quantized())
    assert whole.reason.endswith("after 30 steps")


def labelled(weight: float, classes: Tensor | None = CLASSES, **parameters: Any) -> tuple[GraphModule, Context, Entry]:
    """The graph trained with labels of that weight, its setting, and the entry in the ledger."""
    graph, setting = quantized(with_(labels=weight, **parameters))
    setting.labels = classes
    (entry,) = steps.apply("finetune", graph, setting)
    return graph, setting, entry


def cross_entropy(graph: GraphModule, setting: Context) -> float:
    """On the held-out part of the samples: the last quarter."""
    scores = run(graph, [images(64)[48:]])[0]
    assert setting.labels is not None
    return float(nn.functional.cross_entropy(scores, setting.labels[48:]))


def brightest() -> Tensor:
    """A class that the images of the tests show: which quarter of the values their mean falls in, int64 [64]."""
    means = images(64).mean((1, 2, 3))
    return torch.bucketize(means, means.quantile(torch.tensor([0.25, 0.5, 0.75])))


def test_labels_pull_the_answers_towards_them() -> None:
    shuffled = brightest()[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    found = []
    for weight, classes in ((0.0, brightest()), (10.0, brightest()), (10.0, shuffled)):
        graph, setting, entry = labelled(weight, classes, iterations=60)
        assert entry.action.startswith("trained ")
        assert ("loss on held-out samples" in entry.reason) == (weight > 0)
        setting.labels = brightest()
        found.append(cross_entropy(graph, setting))
    assert found[1] < found[0]
    assert found[1] < found[2]  # labels of other samples do not teach the same


def test_labels_that_nobody_asked_for_change_nothing() -> None:
    without, _, _ = labelled(0.0, None)
    beside, _, _ = labelled(0.0, CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(state(without), state(beside), strict=True))
    used, _, _ = labelled(10.0, brightest())
    assert not all(torch.equal(a, b) for a, b in zip(state(without), state(used), strict=True))


def test_with_labels_training_that_does_not_lower_their_loss_is_rolled_back_whole() -> None:
    graph, setting = quantized(with_(lr=1000.0, labels=1.0))
    setting.labels = CLASSES
    old = state(graph)
    (entry,) = steps.apply("finetune", graph, setting)
    assert entry.action == "left alone"
    assert "rolled back" in entry.reason
    assert "loss on held-out samples" in entry.reason
    assert all(torch.equal(a, b) for a, b in zip(state(graph), old, strict=True))


def test_labels_asked_for_that_are_not_there_or_do_not_fit_are_refused() -> None:
    with pytest.raises(CalibrationError, match="the calibration data has none: add an array `labels`"):
        labelled(0.5, None)
    with pytest.raises(CalibrationError, match="a label 4, but the model has 4 classes, 0 to 3"):
        labelled(0.5, CLASSES + 1)
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), images())
    setting = context(with_(labels=0.5), *[[b] for b in images(64).split(16)])
    setting.labels = CLASSES
    steps.apply("quantize_static", graph, setting)
    with pytest.raises(CalibrationError, match="holds no scores of classes"):
        steps.apply("finetune", graph, setting)


def test_intervention_changes_what_is_learned_and_still_brings_the_output_closer() -> None:
    plain, _ = quantized()
    graph, setting = quantized(with_(intervention=0.5))
    before = signal(graph, setting)
    steps.apply("finetune", plain, replace(setting, plan=PLAN))
    steps.apply("finetune", graph, setting)
    assert not all(torch.equal(a, b) for a, b in zip(state(plain), state(graph), strict=True))
    assert signal(graph, setting) > before + 1


def test_a_lone_sample_is_too_few() -> None:
    graph, setting = quantized(count=1)
    (entry,) = steps.apply("finetune", graph, setting)
    assert "too few samples" in entry.reason
