"""Labels of the calibration data reach the step that a recipe lets learn from them; without any it says what to do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import Samples, captured, cnn

from convert.compress import Builder, Compressed
from convert.errors import TightfitError, user_errors
from convert.planning import decide
from device_profiles import load

RECIPE = """
summary = "learns from labels"
steps = ["fold_batchnorm", "fuse_activations", "quantize_static", "finetune"]
weight = { bits = 4 }
[parameters.finetune]
iterations = 4
labels = 0.5
"""


def built(folder: Path, labels: np.ndarray | None, recipe: str = RECIPE) -> Compressed:
    (folder / "mine.toml").write_text(recipe, encoding="utf-8")
    model = captured(cnn(), torch.zeros(2, 3, 12, 12))
    images = np.random.default_rng(0).standard_normal((40, 3, 12, 12), dtype=np.float32)
    decision = decide(model.graph, load("generic-x86"), "onnx", str(folder / "mine.toml"))
    with user_errors():
        return Builder(model, Samples(model.inputs[0].name, images, labels)).build(decision)


def numbers(made: Compressed) -> list[torch.Tensor]:
    return list(made.graph.state_dict().values())


def test_labels_reach_finetune_and_other_labels_make_another_file(tmp_path: Path) -> None:
    classes = np.arange(40) % 10
    first, same, other = (numbers(built(tmp_path, c)) for c in (classes, classes, (classes + 1) % 10))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_recipe_that_asks_for_no_labels_does_not_look_at_them(tmp_path: Path) -> None:
    plain = RECIPE.replace("labels = 0.5", "")
    first, second = numbers(built(tmp_path, np.arange(40) % 10, plain)), numbers(built(tmp_path, None, plain))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_labels_that_are_missing_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TightfitError, match="add an array `labels` with one class index per sample"):
        built(tmp_path, None)
