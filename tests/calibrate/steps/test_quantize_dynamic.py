"""Dynamic int8: what becomes codes, what stays float and why, and that it computes what its operators define."""

from dataclasses import replace

import pytest
import torch
from small_graphs import Made, capture, context, images, keeping, nodes_of, only
from torch import Tensor, nn

from calibrate import qdq, steps
from calibrate.graph import clone, constant, run
from calibrate.plan import Entry, Plan
from calibrate.weights import weight_codes, weight_scales

LINEAR = Plan(("quantize_dynamic",), dynamic_scheme="row_int8")
BOTH = replace(LINEAR, dynamic_kinds=frozenset({"linear", "conv"}))


def ledger_of(plan: Plan, module: nn.Module, *inputs: Tensor) -> list[Entry]:
    return steps.apply("quantize_dynamic", capture(module, *inputs), context(plan))


@pytest.mark.parametrize("scheme", qdq.SCHEMES)
def test_a_linear_layer_computes_what_the_dynamic_operator_defines(scheme: str) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 7, 6)
    graph = capture(nn.Sequential(layer), x)
    steps.apply("quantize_dynamic", graph, context(replace(LINEAR, dynamic_scheme=scheme)))  # type: ignore[arg-type]
    scales = weight_scales(layer.weight, 127, True)
    codes = weight_codes(layer.weight, scales, -127, 127)
    assert torch.equal(run(graph, [x])[0], qdq.DYNAMIC_LINEAR(x, codes, scales, layer.bias, scheme))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 8, (1, 3), padding=(0, 1), groups=2),
        nn.Conv2d(4, 4, 3, dilation=2, groups=4),
    ],
    ids=["plain", "strided", "grouped", "depthwise"],
)
def test_a_convolution_keeps_its_geometry_and_nearly_its_values(layer: nn.Conv2d) -> None:
    torch.manual_seed(0)
    x = images(2, 4)
    graph = capture(nn.Sequential(layer), x)
    result = clone(graph)
    assert steps.apply("quantize_dynamic", result, context(BOTH))[0].action == "int8, dynamic"
    assert len([n for n in result.graph.nodes if n.target is qdq.DYNAMIC_CONV2D]) == 1
    (before,), (after,) = run(graph, [x]), run(result, [x])
    assert before.shape == after.shape
    assert float((before - after).square().mean() / before.square().mean()) < 1e-3


def test_embedding_tables_become_codes() -> None:
    graph = capture(nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 2)), torch.arange(4)[:, None])
    ledger = steps.apply("quantize_dynamic", graph, context(LINEAR))
    assert [(e.layer, e.action) for e in ledger] == [("0", "int8 table"), ("1", "int8, dynamic")]
    assert only(graph, "embedding").args[0].target is qdq.DEQUANTIZE_CHANNEL


def test_a_layer_kept_float_is_left_with_its_reason() -> None:
    (entry,) = ledger_of(keeping(LINEAR, **{"0": "asked for"}), nn.Sequential(nn.Linear(6, 2)), torch.randn(3, 6))
    assert entry == Entry("quantize_dynamic", "0", "left float", "asked for")


def test_an_embedding_kept_float_is_left_with_its_reason() -> None:
    plan = keeping(LINEAR, **{"0": "asked for"})
    (entry,) = ledger_of(plan, nn.Sequential(nn.Embedding(10, 6)), torch.arange(4)[:, None])
    assert entry == Entry("quantize_dynamic", "0", "left float", "asked for")


def test_kinds_without_a_fast_kernel_are_left_and_named() -> None:
    (entry,) = ledger_of(LINEAR, nn.Sequential(nn.Conv2d(3, 4, 3)), images())
    assert (entry.action, entry.reason) == ("left float", "the runtime has no fast dynamic int8 conv")


@pytest.mark.parametrize(
    ("module", "inputs", "reason"),
    [
        (nn.Conv1d(3, 4, 3), torch.randn(2, 3, 9), "only 2-D convolutions run dynamically"),
        (nn.Conv2d(3, 4, 3, padding="same"), images(), "padding given as a word"),
        (nn.ConvTranspose2d(3, 4, 3), images(), "the runtime has no fast dynamic int8 conv_transpose"),
    ],
    ids=["conv1d", "same", "transposed"],
)
def test_convolutions_that_cannot_run_dynamically_say_why(module: nn.Module, inputs: Tensor, reason: str) -> None:
    (entry,) = ledger_of(BOTH, nn.Sequential(module), inputs)
    assert (entry.action, entry.reason) == ("left float", reason)


def test_a_computed_weight_is_left_with_a_reason() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        return nn.functional.linear(x, m.inner.weight * x.mean())

    (entry,) = ledger_of(LINEAR, Made(forward, inner=nn.Linear(6, 2)), torch.randn(3, 6))
    assert entry.reason == "the weight of this linear is computed, not constant"


def test_no_calibration_data_is_asked_for_and_the_original_keeps_its_outputs() -> None:
    graph, x = capture(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(3, 6)), torch.randn(3, 6)
    before = run(graph, [x])[0]
    result = clone(graph)
    steps.apply("quantize_dynamic", result, context(LINEAR))
    assert torch.equal(run(graph, [x])[0], before)
    assert not torch.equal(run(result, [x])[0], before)
    assert not nodes_of(result, "weight") or all(
        constant(result, n).dtype == torch.int8 or constant(result, n).dim() == 1 for n in nodes_of(result, "weight")
    )
