"""Weights of two to four levels in Core ML: palettes with a table per output channel, exactly a times the sign."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_coreml import TARGET, job_of, run, weights
from torch import Tensor, nn

pytest.importorskip("coremltools")

from calibrate import qdq
from calibrate.simulation import simulate
from targets import Job

OUT, IN = 96, 128
BITS = {"signs": 1, "levels": 2}
# float16 results of 128 products of magnitude 0.01: rounded elsewhere by the executor than by the simulation.
HALF_TOLERANCE = 2e-2


class Layer(nn.Module):
    def __init__(self, form: str, conv: bool) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        shape = (OUT, IN, 3) if conv else (OUT, IN)
        levels = torch.tensor([-1, 1] if form == "signs" else [-60, -20, 20, 60])
        self.conv, self.high = conv, int(levels.max()) if form == "signs" else 127
        picked = torch.randint(0, len(levels), shape, generator=random)
        self.register_buffer("codes", levels[picked].to(torch.int8))
        scales = torch.rand(OUT, generator=random) * 0.01 + 0.001
        self.register_buffer("scales", (scales if form == "signs" else scales / 60).half().float())
        self.register_buffer("zeros", torch.zeros(OUT, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        weight = qdq.DEQUANTIZE_CHANNEL(self.codes, self.scales, self.zeros, 0, -self.high, self.high, torch.int8)
        return nn.functional.conv1d(x, weight) if self.conv else nn.functional.linear(x, weight)


def made(form: str, conv: bool, compute: str) -> tuple[Job, Tensor]:
    shape = (1, IN, 5) if conv else (3, IN)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return job_of(Layer(form, conv), (x,), ("x",), ("y",), compute=compute), x


@pytest.mark.parametrize("form", ["signs", "levels"])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("compute", ["float16", "float32"])
def test_indices_of_few_bits_and_a_table_per_channel(form: str, conv: bool, compute: str, tmp_path: Path) -> None:
    job, x = made(form, conv, compute)
    path = tmp_path / "layer.mlpackage"
    TARGET.lower(job, path)
    got, expected = run(path, {"x": x})["y"], simulate(job.graph, job.compute)([x])[0].numpy()
    tolerance = HALF_TOLERANCE if compute == "float16" else 1e-5
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    count = OUT * IN * (3 if conv else 1)
    number = 2 if compute == "float16" else 4
    predicted = count * BITS[form] / 8 + OUT * 2 ** BITS[form] * number
    # The blob file aligns each tensor to 64 bytes and describes it in as many; a linear gets a bias of zeros.
    assert predicted <= weights(path).stat().st_size <= predicted + 512 + OUT * number
    placed = TARGET.placement(path, job).kinds
    name = "1-bit weights, iOS18" if form == "signs" else "int2 weights, iOS18"
    assert any(name in kind for kind in placed), placed
    assert not TARGET.placement(path, job).fallbacks


def test_codes_of_many_levels_stay_bytes(tmp_path: Path) -> None:
    job, _ = made("levels", False, "float16")
    codes = next(n for n in job.graph.graph.nodes if n.target is qdq.DEQUANTIZE_CHANNEL).args[0]
    random = torch.randint(-127, 128, (OUT, IN), generator=torch.Generator().manual_seed(2), dtype=torch.int16)
    setattr(job.graph, str(codes.target), random.to(torch.int8))
    TARGET.lower(job, tmp_path / "layer.mlpackage")
    assert weights(tmp_path / "layer.mlpackage").stat().st_size >= OUT * IN
