"""The zoo's trained models, where they are: TIGHTFIT_ZOO names their folder."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from onnx_graphs import Recipe, capture, job, quantize

from calibrate.simulation import simulate
from targets import find

ZOO = Path(os.environ.get("TIGHTFIT_ZOO", ""))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ZOO / "zoo.py").is_file(), reason="TIGHTFIT_ZOO names no folder with the zoo"),
]
TARGET = find("onnx")


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo", ZOO / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["cifar_resnet", "cifar_vit"])
@pytest.mark.parametrize("activation", [torch.int8, torch.uint8])
def test_every_quantized_layer_of_the_zoo_is_int8(
    zoo: ModuleType, model: str, activation: torch.dtype, tmp_path: Path
) -> None:
    images = zoo.to_input(np.load(ZOO / "cifar10_test_2000.npz")["images"][:20])
    recipe = Recipe(activation) if model == "cifar_resnet" else Recipe(activation, compute=("conv", "linear"), moves=())
    graph = quantize(capture(getattr(zoo, model)(), (images[:1],)), (images[:1],), recipe)
    work, path = job(graph, {"x": images[:1]}), tmp_path / "m.onnx"
    TARGET.lower(work, path)
    placed = TARGET.placement(path, work)
    assert placed.fallbacks == ()
    assert placed.float_ops == 0 or model == "cifar_vit"
    session, expected = TARGET.open(path), simulate(graph)
    for image in images.split(1):
        output = session.run({"x": image.numpy()})["y"]
        # A sum within float32 rounding of a tie may take the other code (one step) and its effect spreads.
        np.testing.assert_allclose(output, expected([image])[0].numpy(), atol=0.15, rtol=0)
