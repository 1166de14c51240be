"""The demo's files are what the training script measured."""

import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert import demo_assets

LEAST_ACCURACY = {"digits_cnn": 0.97, "digits_vit": 0.95}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demo_models() -> ModuleType:
    """The model code, loaded by its path, as the child interpreter does."""
    path = demo_assets.FOLDER / "demo_models.py"
    spec = importlib.util.spec_from_file_location("demo_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accuracy(model: torch.nn.Module) -> float:
    images, labels = demo_assets.digits_arrays("test")
    with torch.no_grad():
        return float((model(torch.from_numpy(images)).argmax(1).numpy() == labels).mean())


@pytest.mark.parametrize("name", demo_assets.MODELS)
def test_the_weights_reach_the_recorded_accuracy(demo_models: ModuleType, name: str) -> None:
    recorded = json.loads(demo_assets.ACCURACY.read_text())[name]
    model = getattr(demo_models, name)()
    weights = load_file(demo_assets.weights(name))
    model.load_state_dict(weights)
    # One image of 500 may tip over on a machine that adds in another order.
    assert accuracy(model) == pytest.approx(recorded["test_accuracy"], abs=1 / recorded["test_samples"] + 1e-9)
    assert accuracy(model) >= LEAST_ACCURACY[name]
    assert sum(p.numel() for p in model.parameters()) == recorded["parameters"]


@pytest.mark.parametrize(
    ("name", "weight"), [("digits_cnn", "down.0.weight"), ("digits_vit", "blocks.1.attention.qkv.weight")]
)
def test_one_shuffled_weight_misses_it(demo_models: ModuleType, name: str, weight: str) -> None:
    model = getattr(demo_models, name)()
    weights = load_file(demo_assets.weights(name))
    order = torch.randperm(weights[weight].shape[0], generator=torch.Generator().manual_seed(0))
    weights[weight] = weights[weight][order]
    model.load_state_dict(weights)
    assert accuracy(model) < LEAST_ACCURACY[name]


def test_the_files_are_small() -> None:
    for name in demo_assets.MODELS:
        assert demo_assets.weights(name).stat().st_size < 1_000_000
    assert demo_assets.DIGITS.stat().st_size < 100_000


def test_the_parts_are_disjoint_and_complete() -> None:
    with np.load(demo_assets.DIGITS) as arrays:
        parts = {kind: arrays[f"{kind}_images"].reshape(-1, 64) for kind in ("train", "test")}
    train, test = ({row.tobytes() for row in parts[kind]} for kind in ("train", "test"))
    assert len(parts["train"]) == 1297
    assert len(parts["test"]) == 500
    assert not train & test


def test_inputs_are_in_range_and_labels_are_digits() -> None:
    images, labels = demo_assets.digits_arrays("train")
    assert images.dtype == np.float32
    assert images.shape == (1297, 1, 32, 32)
    assert images.min() == -1.0
    assert images.max() <= 1.0
    assert sorted(set(labels.tolist())) == list(range(10))


def test_enlarging_is_bilinear_interpolation() -> None:
    small = np.random.default_rng(0).integers(0, 17, (3, 8, 8), np.uint8)
    scaled = torch.from_numpy(small / 8.0 - 1.0)[:, None]
    expected = torch.nn.functional.interpolate(scaled, size=(32, 32), mode="bilinear", align_corners=False)
    assert np.array_equal(demo_assets.to_input(small), expected.float().numpy())


def test_the_model_code_needs_torch_alone(demo_models: ModuleType) -> None:
    used = {value.__name__.split(".")[0] for value in vars(demo_models).values() if isinstance(value, ModuleType)}
    assert used == {"torch"}
    assert demo_models.__name__ not in sys.modules
