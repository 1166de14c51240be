"""Recipes, and what auto makes of a profile."""

from pathlib import Path

import pytest
import torch
from torch import nn

from convert import recipes
from convert.errors import TightfitError
from convert.planning import AUTO_FLOOR_DB, decide, family
from device_profiles import load


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
