"""Recipes, and what auto makes of a profile."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from calibrate.plan import WeightFormat
from convert import recipes
from convert.errors import TightfitError
from convert.normal_form import normalise
from convert.planning import AUTO_FLOOR_DB, decide, family
from device_profiles import load, names


def graph_of(model: nn.Module, x: torch.Tensor) -> torch.fx.GraphModule:
    return torch.export.export(model.eval(), (x,)).module(check_guards=False)


@pytest.fixture(scope="module")
def cnn() -> torch.fx.GraphModule:
    return graph_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def mlp() -> torch.fx.GraphModule:
    return graph_of(nn.Linear(4, 2), torch.zeros(1, 4))


def test_the_family_is_read_off_the_operators(cnn: torch.fx.GraphModule, mlp: torch.fx.GraphModule) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert family(cnn) == "cnn"
    assert family(mlp) == "other"
    assert family(graph_of(layer, torch.zeros(1, 4, 8))) == "transformer"


def test_auto_follows_the_profile_and_promises_a_floor(cnn: torch.fx.GraphModule) -> None:
    decision = decide(cnn, load("raspberry-pi-4b"), "tflite", "auto")
    assert decision.recipe == "auto: int8"
    assert decision.floor_db == AUTO_FLOOR_DB
    assert decision.plan.steps == ("fold_batchnorm", "fuse_activations", "quantize_static", "correct_bias")
    assert decide(cnn, load("raspberry-pi-4b"), "tflite", "int8").floor_db is None


def test_what_a_runtime_cannot_do_is_refused_with_a_way_out(cnn: torch.fx.GraphModule) -> None:
    with pytest.raises(TightfitError, match="int8-weights"):
        decide(cnn, load("iphone-a17-pro"), "coreml", "int8-dynamic")


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_made_of_steps_that_exist(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.steps
    assert recipe.summary


def test_joined_recipes_run_each_step_once_and_half_weights_last() -> None:
    joined = ("fold_batchnorm", "fuse_activations", "quantize_static", "correct_bias", "half_weights")
    assert recipes.load("float16+int8").steps == joined
    assert recipes.load("float16+int8").compute == "float16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "did you mean 'int8'"),
        ("int8+int8-dynamic", "twice"),
        ("float16+float32", "at once"),
        ("none.toml", "no recipe"),
    ],
)
def test_a_wrong_recipe_is_explained(text: str, message: str) -> None:
    with pytest.raises(TightfitError, match=message):
        recipes.load(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps = [", "not valid TOML"),
        ("steps = []", "needs `steps`"),
        ('steps = ["fold_batchnrom"]', "did you mean 'fold_batchnorm'"),
        ('steps = ["fold_batchnorm"]\nbits = 4', "unknown key 'bits'"),
        ('steps = ["fold_batchnorm"]\ncompute = "int4"', "float16"),
    ],
)
def test_a_wrong_recipe_file_is_explained(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TightfitError, match=message):
        recipes.load(str(path))


def test_a_users_own_recipe_file_works(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('steps = ["fold_batchnorm", "quantize_weights"]\n', encoding="utf-8")
    assert recipes.load(str(path)).steps == ("fold_batchnorm", "quantize_weights")


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_has_a_plan_or_a_way_out_on_every_device(name: str, cnn: torch.fx.GraphModule) -> None:
    refusals: list[str] = []
    for device in names():
        profile = load(device)
        for target in ("onnx", "tflite", "coreml"):
            try:
                assert recipes.QUANTIZE not in decide(cnn, profile, target, name).plan.steps
            except TightfitError as error:
                refusals.append(str(error))
    assert all("se --recipe" in r or "--target" in r for r in refusals)


def test_four_bits_are_for_weights_and_the_ends_keep_eight(cnn: torch.fx.GraphModule) -> None:
    plan = decide(cnn, load("raspberry-pi-4b"), "tflite", "w4a8").plan
    assert plan.weight == WeightFormat(4)
    assert set(plan.formats.values()) == {WeightFormat(8)}
    assert "quantize_static" in plan.steps
    assert "quantize_weights" in decide(cnn, load("iphone-a15"), "coreml", "w4a8").plan.steps


@pytest.mark.parametrize(("width", "group"), [(128, 128), (96, None)])
def test_tables_have_groups_of_their_own_where_these_fit(width: int, group: int | None) -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(32, width), torch.nn.Linear(width, 4)).eval()
    graph = normalise(graph_of(module, torch.zeros(2, 5, dtype=torch.int64)))
    plan = decide(graph, load("generic-x86"), "onnx", "w4").plan
    assert [f.group for f in plan.formats.values()] == ([group] if group else [])
    assert plan.weight.group == 64


def test_sixteen_bits_are_for_activations(cnn: torch.fx.GraphModule) -> None:
    plan = decide(cnn, load("raspberry-pi-4b"), "tflite", "w8a16").plan
    assert (plan.activation, plan.symmetric, plan.weight.bits) == ("int16", True, 8)
    with pytest.raises(TightfitError, match=r"16-bit activations\. Use --target tflite"):
        decide(cnn, load("raspberry-pi-4b"), "onnx", "w8a16")


def test_eight_bit_floats_and_palettes_are_refused_where_nothing_runs_them(cnn: torch.fx.GraphModule) -> None:
    with pytest.raises(TightfitError, match="no arithmetic for 8-bit floats"):
        decide(cnn, load("jetson-orin-nano"), "onnx", "fp8")
    assert "quantize_float8" in decide(cnn, load("jetson-agx-thor"), "onnx", "fp8").plan.steps
    with pytest.raises(TightfitError, match="Use --target onnx, for TensorRT"):
        decide(cnn, load("jetson-agx-thor"), "tflite", "fp8")
    with pytest.raises(TightfitError, match="a Core ML format"):
        decide(cnn, load("raspberry-pi-4b"), "tflite", "palette4")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("weight = { bits = 5 }", "weight.bits = 5; it takes 2 or 4 or 8"),
        ("weight = { bits = 4, group = 48 }", "weight.group = 48; it takes a power of two from 16"),
        ("weight = { bit = 4 }", "takes bits, group, kind, power_of_two"),
        ("activation_bits = 12", "activation_bits = 12; it takes 8 or 16"),
        ("ends_bits = 3", "ends_bits = 3; it takes 8 or 4"),
        ('search = "best"', "search = 'best'; it takes 'mixed'"),
        ("[parameters.gptq]\nblok = 3", "the step gptq has no parameter 'blok'"),
        ("parameters = { gptq = 3 }", "parameters.gptq = 3; it takes a table"),
        ("[parameters.smooth]\nalpha = 3", "sets parameters of 'smooth', which is not among its steps"),
    ],
)
def test_a_recipe_that_says_something_else_is_refused_in_words(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'steps = ["quantize_weights", "gptq"]\n{text}\n')
    with pytest.raises(TightfitError, match=re.escape(complaint)):
        recipes.load(str(path))


def test_what_a_recipe_sets_reaches_the_step(tmp_path: Path, cnn: torch.fx.GraphModule) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('steps = ["quantize_weights", "gptq"]\nweight = { bits = 4 }\n[parameters.gptq]\ndamping = 0.5\n')
    plan = decide(cnn, load("raspberry-pi-4b"), "onnx", str(path)).plan
    assert plan.parameters == {"gptq": {"damping": 0.5}}
