"""What `inspect` says of a model: costs by closed form, and what a device makes of its layers."""

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from small_models import captured
from torch import Tensor, nn

from calibrate.samples import InputSpec
from convert.capture_program import input_specs, unlift
from convert.costs import Cost, costs
from convert.errors import TightfitError
from convert.inspection import Inspection, inspect, inspect_model
from convert.inspection_view import render
from convert.normal_form import normalise
from device_profiles import DeviceProfile, load


def cost_of(module: nn.Module, *examples: Tensor, kind: str) -> Cost:
    model = captured(module, *examples)
    (found,) = [c for c in costs(model.graph, model.inputs) if c.kind == kind]
    return found


class Attention(nn.Module):
    """8 tokens of 12 numbers in 3 heads, as transformers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.reshape(-1, 8, 3, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(-1, 8, 12))


class Products(nn.Module):
    """Scores by an explicit product of two activations."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y.transpose(1, 2)).softmax(-1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(100, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )


CNN_INPUT = torch.randn(2, 3, 8, 8)
# 8x8 positions of 8 channels from 3 channels of 3x3; 4x4 of 16 from 8; 256 to 10.
CNN_MACS = 64 * 8 * 27 + 16 * 16 * 72 + 256 * 10


def test_a_convolution_multiplies_every_output_by_its_window() -> None:
    cost = cost_of(nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 10, 6), kind="conv")
    assert (cost.shape, cost.macs, cost.parameters) == ((1, 8, 10, 6), 60 * 8 * 3 * 9, 8 * 27 + 8)


@settings(max_examples=8, deadline=None)
@given(groups=st.sampled_from([1, 2, 4]), stride=st.integers(1, 2), kernel=st.sampled_from([1, 3]))
def test_a_grouped_convolution_multiplies_its_own_channels_only(groups: int, stride: int, kernel: int) -> None:
    layer = nn.Conv2d(4, 8, kernel, stride, groups=groups)
    cost = cost_of(layer, torch.randn(2, 4, 9, 9), kind="conv")
    side = (9 - kernel) // stride + 1
    assert cost.macs == side * side * 8 * (4 // groups) * kernel * kernel


def test_a_depthwise_convolution_multiplies_one_channel_per_output() -> None:
    cost = cost_of(nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.randn(2, 6, 5, 5), kind="conv")
    assert (cost.macs, cost.parameters) == (25 * 6 * 9, 6 * 9 + 6)


def test_a_transposed_convolution_multiplies_every_input_by_its_window() -> None:
    cost = cost_of(nn.ConvTranspose2d(3, 5, 2, stride=2), torch.randn(2, 3, 4, 4), kind="conv_transpose")
    assert (cost.shape, cost.macs) == ((1, 5, 8, 8), 16 * 3 * 5 * 4)


def test_a_linear_layer_over_tokens_counts_every_token() -> None:
    cost = cost_of(nn.Linear(12, 7), torch.randn(2, 9, 12), kind="linear")
    assert (cost.shape, cost.macs, cost.parameters) == ((1, 9, 7), 9 * 12 * 7, 12 * 7 + 7)


def test_attention_counts_both_of_its_products() -> None:
    cost = cost_of(Attention(), torch.randn(2, 8, 12), kind="attention")
    assert cost.macs == 3 * 8 * 8 * 4 * 2


def test_a_product_of_two_activations_counts_the_axis_it_sums() -> None:
    cost = cost_of(Products(), torch.randn(2, 5, 7), torch.randn(2, 6, 7), kind="matmul")
    assert (cost.shape, cost.macs, cost.parameters) == ((1, 5, 6), 5 * 6 * 7, 0)


def test_looking_up_an_embedding_multiplies_nothing() -> None:
    cost = cost_of(Words(), torch.zeros(2, 9, dtype=torch.int64), kind="embedding")
    assert (cost.macs, cost.parameters) == (0, 1600)


def test_a_fixed_batch_stays_as_it_is() -> None:
    program = torch.export.export(nn.Linear(4, 3), (torch.randn(5, 4),))
    graph = normalise(unlift(program))
    (cost,) = costs(graph, input_specs(graph))
    assert (cost.shape, cost.macs) == ((5, 3), 5 * 12)


def test_a_tied_weight_is_counted_once_in_the_first_layer_that_reads_it() -> None:
    model = captured(Tied(), torch.randn(2, 6))
    found = inspect(model, None)
    assert [layer.parameters for layer in found.layers if layer.kind == "linear"] == [36, 0]
    assert found.parameters == 36


@pytest.mark.parametrize(
    ("module", "example"),
    [(small_cnn(), CNN_INPUT), (Attention(), torch.randn(2, 8, 12)), (Words(), torch.zeros(2, 9, dtype=torch.int64))],
    ids=["cnn", "attention", "embedding"],
)
def test_totals_are_the_sums_over_the_layers(module: nn.Module, example: Tensor) -> None:
    found = inspect(captured(module, example), None)
    assert found.parameters == sum(p.numel() for p in module.parameters())
    assert found.parameters == sum(layer.parameters for layer in found.layers)
    assert found.macs == sum(layer.macs or 0 for layer in found.layers)
    assert sum(found.operators.values()) == len(found.layers)


def test_the_whole_network_has_the_macs_of_its_layers_and_the_bytes_of_its_constants() -> None:
    found = inspect(captured(small_cnn(), CNN_INPUT), None)
    assert found.macs == CNN_MACS
    # Parameters and the running mean and variance of 8 channels, four bytes each.
    assert found.float_bytes == 4 * (found.parameters + 16)
    assert found.outlook is None
    assert found.family == "cnn"


@pytest.mark.parametrize(("equation", "macs"), [("bij,bkj->bik", 3 * 3 * 4), ("b i j, b k l -> b i k", 3 * 3 * 4 * 4)])
def test_an_einsum_of_two_tensors_multiplies_every_combination_of_indices(equation: str, macs: int) -> None:
    class Einsum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, x)

    assert inspect(captured(Einsum(), torch.randn(2, 3, 4)), None).macs == macs


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_an_operator_whose_cost_no_shape_tells_is_named_and_not_counted_as_zero() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    found = inspect(captured(Recurrent(), torch.randn(2, 3, 4)), None)
    (layer,) = [one for one in found.layers if one.kind == "lstm"]
    assert layer.macs is None
    assert found.uncounted == (layer.name,)
    assert layer.parameters == 4 * 5 * (4 + 5 + 2)


def outlook(
    module: nn.Module, example: Tensor, device: str, target: str | None = None, recipe: str = "auto"
) -> Inspection:
    return inspect(captured(module, example), load(device), target, recipe)


def actions(found: Inspection) -> dict[str, str]:
    assert found.outlook is not None
    return {f.layer: f.action for f in found.outlook.fates if f.step.startswith("quantize")}


def test_static_int8_is_foreseen_from_the_graph_alone() -> None:
    found = outlook(small_cnn(), CNN_INPUT, "raspberry-pi-4b")
    assert found.outlook is not None
    assert found.outlook.recipe == "auto: int8"
    assert actions(found) == {"0": "int8", "3": "int8", "6": "int8"}
    assert found.outlook.int8_macs == found.macs
    assert [f.layer for f in found.outlook.fates if f.action == "folded"] == ["1"]


def test_dynamic_int8_leaves_what_has_no_kernel_and_says_why() -> None:
    found = outlook(Attention(), torch.randn(2, 8, 12), "raspberry-pi-4b", "onnx", "int8-dynamic")
    assert found.outlook is not None
    assert {a for layer, a in actions(found).items() if layer in ("qkv", "out")} == {"int8, dynamic"}
    (left,) = [f for f in found.outlook.fates if f.action == "left float"]
    assert left.reason == "the runtime has no fast dynamic int8 attention"
    assert found.outlook.int8_macs == found.macs - 3 * 8 * 8 * 4 * 2


def test_weight_only_int8_computes_nothing_on_codes() -> None:
    found = outlook(Attention(), torch.randn(2, 8, 12), "generic-arm64", "onnx", "int8-weights")
    assert found.outlook is not None
    assert found.outlook.int8_macs == 0
    assert actions(found) == {"qkv": "int8 weights", "out": "left float"}  # 144 weights are too few


def test_the_estimate_of_the_artifact_counts_codes_as_bytes_and_scales_as_floats() -> None:
    found = outlook(small_cnn(), CNN_INPUT, "generic-arm64", "onnx", "int8")
    weights, channels = 8 * 27 + 16 * 72 + 10 * 256, 8 + 16 + 10
    assert found.outlook is not None
    assert found.outlook.estimated_bytes == weights + 4 * channels + 4 * channels  # scales, biases


def test_half_precision_halves_the_estimate() -> None:
    found = outlook(small_cnn(), CNN_INPUT, "generic-arm64", "onnx", "float16")
    weights, channels = 8 * 27 + 16 * 72 + 10 * 256, 8 + 16 + 10
    assert found.outlook is not None
    assert found.outlook.estimated_bytes == 2 * (weights + channels)
    assert actions(found) == {}


def own_device(limit: str) -> DeviceProfile:
    """generic-arm64 with one more limit in its ONNX rules."""
    profile = load("generic-arm64")
    fields = profile.model_dump(exclude_unset=True)
    fields["targets"] = {"onnx": {limit: [{"op": "relu", "reason": "its relu unit is broken"}]}}
    return DeviceProfile.model_validate(fields)


@pytest.mark.parametrize("verdict", ["unsupported", "costly"])
def test_a_profile_that_refuses_an_operator_is_heard_with_its_reason_and_the_layers(
    verdict: str,
) -> None:
    found = inspect(captured(small_cnn(), CNN_INPUT), own_device(verdict), "onnx")
    assert found.outlook is not None
    (limit,) = found.outlook.limits
    assert (limit.kind, limit.verdict, limit.layers) == ("relu", verdict, ("2", "4"))
    assert limit.reason == "its relu unit is broken"


def test_a_profile_that_refuses_what_the_model_does_not_have_is_silent() -> None:
    found = inspect(captured(nn.Linear(4, 3), torch.randn(2, 4)), own_device("unsupported"), "onnx")
    assert found.outlook is not None
    assert found.outlook.limits == ()


def test_the_edge_tpu_names_the_layers_it_leaves_to_the_processor() -> None:
    found = outlook(Attention(), torch.randn(2, 8, 12), "coral-edgetpu")
    assert found.outlook is not None
    assert "attention" in {limit.kind for limit in found.outlook.limits if limit.verdict == "unsupported"}


def test_an_inspection_changes_nothing_in_the_model_it_looks_at() -> None:
    model = captured(small_cnn(), CNN_INPUT)
    code, before = model.graph.code, model.graph(CNN_INPUT)[0]
    for recipe in ("int8", "int8-dynamic", "int8-weights", "float16"):
        inspect(model, load("raspberry-pi-4b"), "onnx", recipe)
    assert model.graph.code == code
    assert torch.equal(model.graph(CNN_INPUT)[0], before)


def test_an_inspection_survives_json() -> None:
    found = outlook(small_cnn(), CNN_INPUT, "raspberry-pi-4b")
    assert Inspection.model_validate_json(found.model_dump_json()) == found


def test_a_recipe_the_runtime_cannot_run_is_an_error() -> None:
    with pytest.raises(TightfitError, match="cannot quantize activations at run time"):
        outlook(small_cnn(), CNN_INPUT, "iphone-a17-pro", "coreml", "int8-dynamic")


def test_an_unknown_target_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(TightfitError, match="there is no target 'onx'"):
        outlook(small_cnn(), CNN_INPUT, "raspberry-pi-4b", "onx")


def test_a_model_file_is_inspected_for_every_device_named(tmp_path: Path) -> None:
    program = torch.export.export(small_cnn().eval(), (CNN_INPUT,), dynamic_shapes=({0: torch.export.Dim("n")},))
    path = tmp_path / "small.pt2"
    torch.export.save(program, path)
    alone = inspect_model(str(path), ())
    assert [i.outlook for i in alone] == [None]
    found = inspect_model(str(path), ("raspberry-pi-4b", "iphone-a15"))
    assert [i.outlook.device for i in found if i.outlook] == ["raspberry-pi-4b", "iphone-a15"]
    assert {i.macs for i in found} == {CNN_MACS}
    with pytest.raises(TightfitError, match="raspberry-pi-4b"):
        inspect_model(str(path), ("raspberry-pi-4",))


def test_the_view_shows_totals_layers_limits_and_reasons() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    render(inspect(captured(small_cnn(), CNN_INPUT), own_device("costly"), "onnx"), console)
    text = console.export_text()
    for expected in (
        "3,970 parameters",
        "34.8 k MACs per sample",
        "costly relu: its relu unit is broken",
        "recipe auto: int8",
        "folded",
    ):
        assert expected in text


def test_names_from_a_model_are_never_read_as_markup() -> None:
    found = inspect(captured(nn.Linear(4, 3), torch.randn(2, 4)), None)
    odd = found.model_copy(update={"model": "[red]x[/nothing]", "inputs": ("[b]",)})
    console = Console(width=120, record=True, file=io.StringIO())
    render(odd, console)
    assert "[red]x[/nothing]" in console.export_text()


def test_a_spec_of_several_inputs_flows_through() -> None:
    model = captured(Products(), torch.randn(2, 5, 7), torch.randn(2, 6, 7))
    assert [type(i) for i in model.inputs] == [InputSpec, InputSpec]
    assert inspect(model, None).inputs == ("x: float32 [1, 5, 7]", "y: float32 [1, 6, 7]")
