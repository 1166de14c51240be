"""The step that puts attention on bits: what it refuses, what it says, what training brings, what runtimes compute."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import LAYOUTS, tokens
from small_graphs import ISLANDS, capture, context, images
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import binarize_attention as methods
from calibrate import kept, signs, steps
from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, run
from calibrate.plan import Entry
from calibrate.samples import InputSpec
from calibrate.simulation import simulate
from calibrate.steps import Context
from calibrate.tokens.builder import Builder
from calibrate.training_samples import output_db
from device_profiles import load
from targets import Job, Session, find

STEP = "binarize_attention"
UNSEEN = tokens(8, seed=77)
MANY = tokens(64, seed=78)
TRAINING = {"iterations": 120, "batch": 32, "lr": 0.003}


def binary(layout: str = "fused", count: int = 8, **parameters: Any) -> tuple[GraphModule, Context, list[Entry]]:
    graph = clone(LAYOUTS[layout](True))
    plan = replace(ISLANDS, parameters={STEP: parameters, "finetune": TRAINING})
    setting = context(plan, *[[tokens(16, seed)] for seed in range(count)])
    steps.apply("quantize_static", graph, setting)
    return graph, setting, steps.apply(STEP, graph, setting)


def numbers(graph: GraphModule) -> list[Tensor]:
    """What training of bits may change."""
    places, bits = signs.find(graph), kept.find(graph)
    found = [constant(graph, p.threshold) for p in places] + [constant(graph, b.share) for b in bits]
    return found + [torch.tensor(p.scale) for p in [*places, *bits]]


@pytest.mark.parametrize("method", methods.names())
def test_the_ledger_says_what_each_attention_lost_and_that_it_wants_training(method: str) -> None:
    _, _, ledger = binary(method=method)
    assert [e.layer for e in ledger] == ["scaled_dot_product_attention", "scaled_dot_product_attention_1"]
    assert all(e.action == f"attention on bits by {method}" for e in ledger)
    assert all("of the power of its output lost" in e.reason and "finetune" in e.reason for e in ledger)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "no"}, "no way to binarize attention 'no'; there are"),
        ({"options": {"no": 1}}, "softmax_aware has no option 'no'; it has threshold"),
        ({"options": {"threshold": "no"}}, "no threshold 'no': use channel, tensor, zero"),
        ({"options": {"share": 0}}, r"'fitted' or in \(0, 1\], not 0"),
        ({"options": {"share": "no"}}, r"'fitted' or in \(0, 1\], not 'no'"),
        ({"samples": 0}, "set samples to 1 or more"),
        ({"wide": ["no"]}, "no attention 'no' to leave wide; there are scaled_dot"),
    ],
)
def test_wishes_that_there_are_not_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        binary(**parameters)


def test_attention_named_wide_stays_and_a_network_without_any_is_left_alone() -> None:
    graph, _, ledger = binary(wide=["scaled_dot_product_attention"])
    assert len(kept.find(graph)) == 1
    assert ledger[0].action == "left as it is"
    cnn = capture(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(576, 4)), images())
    setting = context(ISLANDS, [images(8)])
    steps.apply("quantize_static", cnn, setting)
    (entry,) = steps.apply(STEP, cnn, setting)
    assert (entry.action, entry.reason[:19]) == ("left alone", "it has no attention")


def test_an_operator_with_a_causal_mask_inside_is_left_with_the_reason() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0])

    graph, setting = capture(Causal(), tokens()), context(ISLANDS, [tokens(16)])
    steps.apply("quantize_static", graph, setting)
    (entry,) = steps.apply(STEP, graph, setting)
    assert entry.action == "left as it is"
    assert "attn_mask" in entry.reason


def test_it_stands_behind_a_step_that_quantizes() -> None:
    graph = clone(LAYOUTS["fused"](True))
    with pytest.raises(CalibrationError, match="put a quantizing step before it"):
        steps.apply(STEP, graph, context(ISLANDS, [tokens(16)]))


@pytest.mark.parametrize("method", methods.names())
def test_the_same_input_gives_the_same_numbers(method: str) -> None:
    first, second = (binary(method=method)[0] for _ in range(2))
    assert torch.equal(run(first, [UNSEEN])[0], run(second, [UNSEEN])[0])


def test_bits_that_are_not_the_scale_break_the_promise() -> None:
    graph, _, _ = binary()
    assert steps.find(STEP).ensures(graph) is None
    bit = kept.find(graph)[0]
    bit.quantize.args = (bit.quantize.args[0], bit.scale * 2, *bit.quantize.args[2:])
    assert "is to hold 0 and" in str(steps.find(STEP).ensures(graph))
    bit.set_scale(graph, 1.0)
    bit.set_share(graph, 2.0)
    assert "not in (0, 1]" in str(steps.find(STEP).ensures(graph))


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("layout", ["fused", "torch"])
def test_training_comes_closer_to_float(method: str, layout: str) -> None:
    graph, setting, _ = binary(layout, 32, method=method)
    assert setting.float_graph is not None
    before, start = output_db(setting.float_graph, graph, [[MANY]]), numbers(graph)
    (entry,) = steps.apply("finetune", graph, setting)
    assert "trained" in entry.action
    assert output_db(setting.float_graph, graph, [[MANY]]) > before + 0.3
    assert any(not torch.equal(a, b) for a, b in zip(start, numbers(graph), strict=True))
    assert steps.find(STEP).ensures(graph) is None


def test_what_training_did_not_improve_is_put_back() -> None:
    graph, setting, _ = binary()
    setting.plan = replace(setting.plan, parameters={"finetune": {"iterations": 0}})
    start, output = numbers(graph), run(graph, [UNSEEN])[0]
    (entry,) = steps.apply("finetune", graph, setting)
    assert "rolled back" in entry.reason
    assert all(torch.equal(a, b) for a, b in zip(start, numbers(graph), strict=True))
    assert torch.equal(run(graph, [UNSEEN])[0], output)


class Bare(nn.Module):
    """Attention on codes alone: no layer norm, whose sums each runtime rounds in its own order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts, self.head = nn.ModuleList(nn.Linear(8, 32) for _ in range(3)), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2) for part in self.parts)
        return self.head(nn.functional.scaled_dot_product_attention(q * 3, k, v).transpose(1, 2).flatten(2).mean(1))


def bare(method: str) -> GraphModule:
    """Its attention on bits."""
    graph = capture(Bare(), tokens())
    setting = context(
        replace(ISLANDS, parameters={STEP: {"method": method}}), *[[tokens(16, seed)] for seed in range(8)]
    )
    steps.apply("quantize_static", graph, setting)
    steps.apply(STEP, graph, setting)
    return graph


def opened(graph: GraphModule, target: str, device: str, outputs: tuple[str, ...], folder: Path) -> Session:
    """The graph lowered and loaded."""
    for extra in {"tflite": ("litert_torch", "ai_edge_litert"), "coreml": ("coremltools",)}.get(target, ()):
        pytest.importorskip(extra, reason=f"needs the extra [{target}]")
    rules = load(device).rules(target)
    case = Job("m", graph, (InputSpec("x", tuple(UNSEEN[:1].shape), "float32"),), outputs, rules, "float32")
    path = folder / {"onnx": "m.onnx", "tflite": "m.tflite", "coreml": "m.mlpackage"}[target]
    find(target).lower(case, path)
    return find(target).open(path)


RUNTIMES = [("onnx", "generic-x86-vnni"), ("tflite", "raspberry-pi-4b"), ("coreml", "apple-m4")]


@pytest.mark.parametrize(("target", "device"), RUNTIMES)
def test_runtimes_keep_the_same_bits_as_the_simulation(target: str, device: str, tmp_path: Path) -> None:
    graph = bare("softmax_aware")
    (bit,) = kept.find(graph)
    (back,) = bit.quantize.users
    output = next(n for n in graph.graph.nodes if n.op == "output")
    doubled = Builder(graph, output, "doubled").call(torch.ops.aten.mul.Tensor, back, 2.0)
    output.args = ((*output.args[0], doubled),)
    graph.recompile()
    session, wanted = opened(graph, target, device, ("y", "bits"), tmp_path), simulate(graph, "float32", "float")
    for sample in UNSEEN.split(1):
        got, (scores, bits) = session.run({"x": sample.numpy()}), wanted([sample])
        assert set(np.unique(bits)) == {0, np.float32(2 * bit.scale)}
        np.testing.assert_array_equal(got["bits"], bits.numpy())
        np.testing.assert_allclose(got["y"], scores.numpy(), rtol=0, atol=2e-2 * float(scores.abs().max()))


@pytest.mark.parametrize("method", ["residual", "hashed"])
@pytest.mark.parametrize(("target", "device"), RUNTIMES[:2])
def test_runtimes_compute_what_the_simulation_does(method: str, target: str, device: str, tmp_path: Path) -> None:
    """Float products decide about bits here, so that a code of the output may round to its neighbour."""
    graph = bare(method)
    session, wanted = opened(graph, target, device, ("y",), tmp_path), simulate(graph, "float32", "float")
    for sample in UNSEEN.split(1):
        (scores,) = wanted([sample])
        got = session.run({"x": sample.numpy()})["y"]
        np.testing.assert_allclose(got, scores.numpy(), rtol=0, atol=2e-2 * float(scores.abs().max()))
