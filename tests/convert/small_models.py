"""Small captured models with samples, for tests of what `convert` does between capture and lowering."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibrate.samples import Batch
from convert.capture import Captured
from convert.capture_program import input_specs, unlift
from convert.capture_raw import CaptureCheck
from convert.capture_weights import count_parameters
from convert.normal_form import normalise


def captured(module: nn.Module, *examples: Tensor) -> Captured:
    """The module's graph in the normal form, with a dynamic batch."""
    shapes = tuple({0: torch.export.Dim("batch", min=2, max=512)} for _ in examples)
    program = torch.export.export(module.eval(), examples, dynamic_shapes=shapes)
    graph = unlift(program)
    inputs, parameters = input_specs(graph), count_parameters(graph)
    check = CaptureCheck(math.inf, 0.0, 0, "nothing", True)
    return Captured("made", "made", normalise(graph), inputs, ("output",), parameters, "", check)


@dataclass
class Samples:
    """A `CalibrationSet` of one input in memory."""

    name: str
    array: NDArray[np.float32]
    labels: NDArray[np.int64] | None = None
    fingerprint: str = "made"
    synthetic: bool = False

    def __len__(self) -> int:
        return len(self.array)

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self.array), size):
            yield {self.name: self.array[start : start + size]}

    def select(self, indices: NDArray[np.int64]) -> "Samples":
        return Samples(self.name, self.array[indices])


def cnn() -> nn.Module:
    """A CNN of four layers, seed 0; the second layer's channels differ so much in range that int8 suffers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    with torch.no_grad():
        spread = torch.logspace(-1.5, 1.5, 16)
        model[0].weight *= spread.view(-1, 1, 1, 1)
        model[0].bias *= spread
        model[2].weight /= spread.view(1, -1, 1, 1)
    return model


def planted() -> nn.Module:
    """Four linear layers, seed 0; the second has one input with weights a thousand times the others', which meets
    numbers as much smaller: a scale per output channel leaves the others few of their 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[0] /= 1000
        model[0].bias[0] /= 1000
        model[2].weight[:, 0] *= 1000
    return model


def prepared(module: nn.Module, example: Tensor, count: int = 48) -> tuple[Captured, Samples]:
    """A captured model and `count` random samples of its input."""
    model = captured(module, example)
    shape = (count, *example.shape[1:])
    data = torch.randn(shape, generator=torch.Generator().manual_seed(1)).numpy()
    return model, Samples(model.inputs[0].name, data)
