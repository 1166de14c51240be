"""Real conversions for the tests of what works on their results; each is made once and copied where it is changed."""

import atexit
import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from convert.demo_assets import FOLDER, digits_arrays, weights
from convert.latency import measure
from convert.pipeline import Options, convert

ONNX = (("raspberry-pi-4b", "onnx"),)
ALL = (("raspberry-pi-4b", "tflite"), ("raspberry-pi-4b", "onnx"), ("iphone-a17-pro", "coreml"))
# Shortest latency the protocol allows: these tests look at anything but time.
hasty = functools.partial(measure, min_runs=20, min_seconds=0.0, warmup_seconds=0.0)


def need_all_targets() -> None:
    """Skip the test where the packages of TFLite or Core ML are not installed."""
    for name in ("litert_torch", "ai_edge_litert", "coremltools"):
        pytest.importorskip(name)


@functools.cache
def converted(pairs: tuple[tuple[str, str], ...] = ONNX, recipe: str = "int8") -> Path:
    """OUT of the demo's digits CNN for these devices and targets. Not to be changed: see `copy`."""
    folder = Path(tempfile.mkdtemp(prefix="tightfit-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    images, _ = digits_arrays("train")
    test_images, labels = digits_arrays("test")
    np.savez(folder / "calibration.npz", x=images[:32])
    np.savez(folder / "test.npz", x=test_images[:20], labels=labels[:20])
    options = Options(
        model=str(_exported(folder / "digits_cnn.pt2")),
        devices=(),
        pairs=pairs,
        out=folder / "out",
        calibration=str(folder / "calibration.npz"),
        evaluation=str(folder / "test.npz"),
        recipe=recipe,
    )
    with mock.patch("convert.artifact.measure", hasty):
        convert(options)
    return folder / "out"


def copy(out: Path, folder: Path) -> Path:
    """A copy of `out` in `folder`, to be changed."""
    return Path(shutil.copytree(out, folder / "out"))


def _exported(path: Path) -> Path:
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("demo_models", FOLDER / "demo_models.py")
    assert spec is not None
    assert spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    model = models.digits_cnn().eval()
    model.load_state_dict(load_file(weights("digits_cnn")))
    shapes = {"x": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(model, (torch.zeros(2, 1, 32, 32),), dynamic_shapes=shapes), path)
    return path
