"""Layouts turned in registers: every size around whole squares of 8, images there and back, on every processor."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from c_graphs import MACHINES, c_job, int8_job, lowered, run, simulation
from tflite_graphs import capture
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: what the sources move is unknown")


class Turns(nn.Module):
    """Transposes of floats whose sides are and are not multiples of 8, in two and in three axes."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.transpose(1, 2) + 1, x.permute(2, 0, 1) * 2, x.permute(2, 1, 0) - 1


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (7, 9), (1, 40), (33, 1), (40, 71)])
def test_turned_values_are_the_same_values(rows: int, columns: int, tmp_path: Path) -> None:
    x = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
    case = c_job(capture(Turns(), x), x)
    from targets.c import TARGET

    found = TARGET.open(lowered(case, tmp_path)).run({case.inputs[0].name: x.numpy()})
    for name, wanted in zip(case.outputs, Turns()(x), strict=True):
        np.testing.assert_array_equal(found[name], wanted.numpy())


@pytest.mark.parametrize("machine", MACHINES)
def test_codes_and_floats_of_images_are_turned_alike_everywhere(machine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 19, 9, 11)
    case = int8_job(nn.Sequential(nn.Conv2d(19, 21, 3), nn.Flatten(2)), x)
    wanted = simulation(case)((x,))[0].numpy()
    path = lowered(case, tmp_path)
    np.testing.assert_array_equal(run(path, x), wanted)
    found = MACHINES[machine].outputs(path, [x.numpy()], tmp_path)
    np.testing.assert_array_equal(found, wanted.reshape(1, -1))
