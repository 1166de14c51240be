"""Layers that read signs: what they compute, what is left alone, and that every runtime computes the same."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import ISLANDS, Made, capture, context, images
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import qdq, signs, steps
from calibrate.coded import coded_layers
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, run
from calibrate.plan import Entry
from calibrate.samples import InputSpec
from calibrate.simulation import simulate
from calibrate.steps import Context
from calibrate.surrogates import SURROGATES
from calibrate.training_samples import output_db
from calibrate.training_signs import LearnedSigns
from device_profiles import load
from targets import Job, TargetError, find

STEP = "binarize_activations"
UNSEEN = images(8, seed=9)


def network(m: Made, x: Tensor) -> Tensor:
    """Signed inputs (`second`, behind a plain convolution) and nonnegative ones (`third`, `wide`, behind a ReLU)."""
    x = m.stem(x)
    y = torch.relu(m.second(x))
    y = torch.relu(m.third(y)) + y
    return m.head(torch.relu(m.wide(y.mean((2, 3)))))


def quantized(**parameters: Any) -> tuple[GraphModule, Context]:
    torch.manual_seed(0)
    parts = {
        "stem": nn.Conv2d(3, 16, 3, padding=1),
        "second": nn.Conv2d(16, 16, 3, padding=1),
        "third": nn.Conv2d(16, 16, 3, padding=1),
        "wide": nn.Linear(16, 32),
        "head": nn.Linear(32, 4),
    }
    graph = capture(Made(network, **parts), images())
    plan = replace(ISLANDS, parameters={STEP: parameters, "finetune": {"iterations": 60, "batch": 16}})
    setting = context(plan, *[[b] for b in images(512).split(16)])
    steps.apply("quantize_static", graph, setting)
    return graph, setting


def binary(**parameters: Any) -> tuple[GraphModule, Context, list[Entry]]:
    graph, setting = quantized(**parameters)
    ledger = steps.apply(STEP, graph, setting) + steps.apply("binarize", graph, setting)
    return graph, setting, ledger


def test_every_layer_but_the_first_and_the_last_reads_signs_of_one_scale() -> None:
    graph, _, ledger = binary()
    places = signs.find(graph)
    assert [layer.name for p in places for layer in p.layers] == ["second", "third", "wide"]
    for place in places:
        seen = clone(graph)
        output = next(n for n in seen.graph.nodes if n.op == "output")
        output.args = ((next(n for n in seen.graph.nodes if n.name == place.quantize.name),),)
        seen.recompile()
        zero = place.quantize.args[2]
        assert set(run(seen, [UNSEEN])[0].flatten().tolist()) == {zero - 1, zero + 1}
    told = [e.reason for e in ledger if e.step == STEP and "signs" in e.action]
    assert len(told) == 3
    assert all("of the power" in r and "finetune" in r for r in told)


def test_the_mean_of_what_signs_leave_out_is_in_the_bias() -> None:
    """Without borders to pad, a layer's mean output stays where it was, though its input became signs."""
    graph, setting = quantized(wide=["second", "third"])
    (before,) = (n for n in graph.graph.nodes if n in [c.node for c in coded_layers(graph) if c.name == "wide"])
    means = []
    for _ in range(2):
        seen = clone(graph)
        output = next(n for n in seen.graph.nodes if n.op == "output")
        output.args = ((next(n for n in seen.graph.nodes if n.name == before.name),),)
        seen.recompile()
        means.append(run(seen, [torch.cat([b[0] for b in setting.batches()])])[0].mean(0))
        if len(means) == 1:
            steps.apply(STEP, graph, setting)
    assert signs.find(graph)
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-2 * float(means[0].abs().max()))


def test_a_zero_on_the_threshold_is_plus_one() -> None:
    graph, _, _ = binary(options={"threshold": "zero"})
    place = signs.find(graph)[1]
    assert not bool(constant(graph, place.threshold).any())
    third = next(layer for layer in coded_layers(graph) if layer.name == "third")
    (dequantize,) = place.quantize.users
    dead = clone(graph)
    stem = next(layer for layer in coded_layers(dead) if layer.name == "second")
    stem.set_codes(dead, constant(dead, stem.codes))
    stem.set_bias(dead, torch.full((16,), -1e3), int32=False)  # every ReLU behind it is dead
    output = next(n for n in dead.graph.nodes if n.op == "output")
    output.args = ((next(n for n in dead.graph.nodes if n.name == dequantize.name),),)
    dead.recompile()
    assert torch.equal(run(dead, [UNSEEN])[0], torch.full_like(run(dead, [UNSEEN])[0], place.scale))
    assert third.node.args[0] is dequantize


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "no"}, "no way to binarize activations 'no'; there are elastic"),
        ({"options": {"no": 1}}, "has no option 'no'; it has threshold"),
        ({"options": {"threshold": "no"}}, "no threshold 'no': use channel, tensor, zero"),
        ({"wide": ["no"]}, "no layer 'no' has coded weights"),
        ({"samples": 0}, "set samples to 1 or more"),
    ],
)
def test_wishes_that_there_are_not_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        binary(**parameters)


def test_layers_named_wide_and_layers_quantized_at_run_time_keep_their_inputs() -> None:
    graph, _, _ = binary(wide=["third"])
    assert [layer.name for p in signs.find(graph) for layer in p.layers] == ["second", "wide"]
    torch.manual_seed(0)
    model = capture(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 2)), torch.rand(4, 32))
    setting = context(replace(ISLANDS, dynamic_kinds=frozenset({"linear"})), [torch.rand(8, 32)])
    steps.apply("quantize_dynamic", model, setting)
    ledger = steps.apply(STEP, model, setting)
    assert ledger[-1].action == "left alone"
    assert "quantize_static" in ledger[0].reason


def test_the_same_input_gives_the_same_numbers() -> None:
    first, second = (binary()[0] for _ in range(2))
    assert torch.equal(run(first, [UNSEEN])[0], run(second, [UNSEEN])[0])


def test_signs_that_are_not_the_scale_break_the_promise() -> None:
    graph, _, _ = binary()
    assert steps.find(STEP).ensures(graph) is None
    place = signs.find(graph)[0]
    place.quantize.args = (place.quantize.args[0], place.scale * 2, *place.quantize.args[2:])
    assert "signs of scale" in str(steps.find(STEP).ensures(graph))


def trained() -> GraphModule:
    graph, setting, _ = binary()
    steps.apply("finetune", graph, setting)
    return graph


@pytest.mark.parametrize(
    ("target", "device", "adder"),
    [
        ("onnx", "generic-x86-vnni", "float"),
        ("tflite", "raspberry-pi-4b", "fixed_point"),
        ("c", "generic-riscv64", "fixed_point"),
    ],
)
def test_every_runtime_computes_what_the_simulation_does(target: str, device: str, adder: Any, tmp_path: Path) -> None:
    if target == "tflite":
        pytest.importorskip("litert_torch", reason="lowering needs the extra [tflite]")
        pytest.importorskip("ai_edge_litert", reason="running needs the extra [tflite]")
    if target == "c" and shutil.which("cc") is None:
        pytest.skip("no C compiler: what the sources compute is unknown")
    graph = trained()
    rules = load(device).rules(target)
    case = Job("model", graph, (InputSpec("x", tuple(UNSEEN[:1].shape), "float32"),), ("y",), rules, "float32")
    path = tmp_path / {"onnx": "m.onnx", "tflite": "m.tflite", "c": "m"}[target]
    backend = find(target)
    try:
        backend.lower(case, path)
    except TargetError as error:
        pytest.fail(str(error))
    session, wanted = backend.open(path), simulate(graph, "float32", adder)
    for image in UNSEEN.split(1):
        got = next(iter(session.run({"x": image.numpy()}).values()))
        np.testing.assert_array_equal(got, wanted([image])[0].numpy())
    if target == "c":
        kinds = backend.placement(path, case).kinds
        assert (kinds["w1a1 conv"], kinds["w1a1 linear"]) == (2, 1)


def numbers(graph: GraphModule) -> list[Tensor]:
    """What training of signs may change."""
    places = signs.find(graph)
    return [torch.tensor(p.scale) for p in places] + [constant(graph, p.threshold) for p in places]


def restless(parameters: dict[str, Any]) -> tuple[GraphModule, Context]:
    """A residual network whose outputs differ between images: more than their mean is there to be learned."""

    def call(m: Made, x: Tensor) -> Tensor:
        x = torch.relu(m.stem(x))
        x = nn.functional.max_pool2d(torch.relu(m.first(x)) + x, 2)
        return m.head(m.norm(x.flatten(2).mean(2)))

    torch.manual_seed(0)
    stem, first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    graph = capture(Made(call, stem=stem, first=first, norm=nn.LayerNorm(8), head=nn.Linear(8, 4)), images())
    setting = context(replace(ISLANDS, parameters=parameters), *[[b] for b in images(512).split(16)])
    steps.apply("quantize_static", graph, setting)
    return graph, setting


@pytest.mark.parametrize("surrogate", ["straight", "bireal", "periodic"])
def test_training_comes_closer_to_float_and_moves_thresholds_and_scales(surrogate: str) -> None:
    told: dict[str, Any] = {"iterations": 100, "batch": 16, "lr": 0.02, "surrogate": surrogate}
    graph, setting = restless({"finetune": told, STEP: {"ends": False}, "binarize": {"ends": False}})
    steps.apply(STEP, graph, setting)
    steps.apply("binarize", graph, setting)
    assert setting.float_graph is not None
    before, start = output_db(setting.float_graph, graph, [[UNSEEN]]), numbers(graph)
    (entry,) = steps.apply("finetune", graph, setting)
    assert "2 signs of activations" in entry.action
    assert output_db(setting.float_graph, graph, [[UNSEEN]]) > before
    assert not any(torch.equal(a, b) for a, b in zip(start, numbers(graph), strict=True))


def test_stages_train_signs_of_activations_first_and_then_those_of_the_weights_so_trained() -> None:
    told: dict[str, Any] = {"batch": 16, "lr": 0.02, "surrogate": "bireal"}
    stages: dict[str, Any] = {"finetune:signs": {**told, "iterations": 40}, "finetune": {**told, "iterations": 30}}
    settled = {STEP: {"ends": False}, "binarize": {"ends": False, "source": "graph"}}
    graph, setting = restless({**stages, **settled})
    steps.apply(STEP, graph, setting)
    (first,) = steps.apply("finetune:signs", graph, setting)
    assert first.action.startswith("trained")
    assert first.reason.endswith("after 40 steps")
    steps.apply("binarize", graph, setting)
    (second,) = steps.apply("finetune", graph, setting)
    assert second.reason.endswith("after 30 steps")


@pytest.mark.parametrize("move", [-1e-6, 1e-6, -100.0, 100.0])
def test_no_step_of_training_turns_the_zeros_behind_a_relu(move: float) -> None:
    graph, _, _ = binary()
    _, second, third = signs.find(graph)
    for place in (second, third):
        dead = constant(graph, place.threshold).clone()
        dead.flatten()[0] = 0.0  # as of a channel that is never anything but zero
        place.set_threshold(graph, dead)
        learned = LearnedSigns(graph, place, SURROGATES["bireal"].activation)
        zeros = torch.zeros_like(dead)
        before = zeros - dead >= 0
        assert torch.equal(learned.value(zeros) > 0, before)  # and nothing changes until something is learned
        with torch.no_grad():
            learned.move += move
        assert torch.equal(learned.value(zeros) > 0, before)
        learned.threshold().sum().backward()
        assert learned.move.grad is not None
        assert bool((learned.move.grad > 0).all())  # held back, it still learns the way back


def test_thresholds_of_signed_inputs_may_cross_zero() -> None:
    graph, _, _ = binary()
    first = signs.find(graph)[0]
    learned = LearnedSigns(graph, first, SURROGATES["bireal"].activation)
    with torch.no_grad():
        learned.move += 100.0
    assert bool((learned.threshold() > 0).all())
    assert torch.allclose(learned.threshold(), learned.start + 100 * first.scale)


def test_what_training_did_not_improve_is_put_back() -> None:
    graph, setting, _ = binary()
    setting.plan = replace(setting.plan, parameters={"finetune": {"iterations": 0}})
    start, output = numbers(graph), run(graph, [UNSEEN])[0]
    (entry,) = steps.apply("finetune", graph, setting)
    assert "rolled back" in entry.reason
    assert all(torch.equal(a, b) for a, b in zip(start, numbers(graph), strict=True))
    assert torch.equal(run(graph, [UNSEEN])[0], output)


def test_a_surrogate_that_there_is_not_is_refused() -> None:
    graph, setting, _ = binary()
    setting.plan = replace(setting.plan, parameters={"finetune": {"surrogate": "no"}})
    with pytest.raises(CalibrationError, match="no surrogate 'no': use straight, bireal, periodic"):
        steps.apply("finetune", graph, setting)


def test_scales_of_signs_are_kept_out_of_those_that_tensors_share() -> None:
    graph, _, _ = binary()
    both = [n for n in graph.graph.nodes if n.target is qdq.QUANTIZE]
    assert len(both) > len(signs.find(graph)) == 3
