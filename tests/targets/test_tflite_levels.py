"""Weights of two to four levels in TFLite: INT2 and INT4 tensors, which are the least that LiteRT has kernels for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("litert_torch", reason="lowering needs the extra [tflite]")
pytest.importorskip("ai_edge_litert", reason="running needs the extra [tflite]")

from tflite_graphs import batch, capture, job

from calibrate import qdq
from calibrate.simulation import simulate
from targets._tflite_file import TFLiteFile
from targets.tflite import TARGET

OUT, IN = 32, 64
ROWS = torch.randn(1, 5, IN, generator=torch.Generator().manual_seed(0))
# float32 sums of 64 exact products in another order.
TOLERANCE = 1e-5


class Layer(nn.Module):
    def __init__(self, levels: tuple[int, ...], bits: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        picked = torch.randint(0, len(levels), (OUT, IN), generator=random)
        self.bits = bits
        self.register_buffer("codes", torch.tensor(levels)[picked].to(torch.int8))
        self.register_buffer("scales", torch.rand(OUT, generator=random) * 0.01 + 0.001)
        self.register_buffer("bias", torch.randn(OUT, generator=random))

    def forward(self, x: Tensor) -> Tensor:
        return qdq.DYNAMIC_LINEAR(x, self.codes, self.scales, self.bias, "row_int8", self.bits)


@pytest.mark.parametrize(
    ("levels", "bits", "stored"),
    [((-1, 1), 1, "INT2"), ((-1, 0, 1), 1, "INT2"), ((-7, -2, 2, 7), 4, "INT4")],
    ids=["signs", "ternary", "planes"],
)
def test_the_file_has_the_smallest_type_and_computes_what_the_simulation_does(
    levels: tuple[int, ...], bits: int, stored: str, tmp_path: Path
) -> None:
    graph = capture(Layer(levels, bits), ROWS)
    path = tmp_path / "layer.tflite"
    TARGET.lower(job(graph, ROWS), path)
    got = next(iter(TARGET.open(path).run(batch(ROWS)).values()))
    np.testing.assert_allclose(got, simulate(graph)([ROWS])[0].numpy(), rtol=0, atol=TOLERANCE)
    file = TFLiteFile.read(path)
    found = [file.dtype(t) for t in range(len(file.graph.tensors)) if tuple(file.shape(t)) == (OUT, IN)]
    assert found == [stored]


class Convolution(Layer):
    """A convolution that quantizes its input at run time."""

    def __init__(self, levels: tuple[int, ...], bits: int) -> None:
        super().__init__(levels, bits)
        self.codes = self.codes.view(OUT, -1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        pairs = ([1, 1], [1, 1], [1, 1])
        return qdq.DYNAMIC_CONV2D(x, self.codes, self.scales, self.bias, *pairs, 1, "row_int8", self.bits)


@pytest.mark.parametrize(("levels", "bits"), [((-1, 1), 1), ((-2, -1, 0, 1), 2)], ids=["signs", "int2"])
def test_a_dynamic_convolution_takes_four_bits_as_two_give_nan(
    levels: tuple[int, ...], bits: int, tmp_path: Path
) -> None:
    x = torch.randn(1, IN // 4, 6, 6, generator=torch.Generator().manual_seed(3))
    graph, path = capture(Convolution(levels, bits), x), tmp_path / "layer.tflite"
    case = job(graph, x)
    TARGET.lower(case, path)
    got = next(iter(TARGET.open(path).run(batch(x)).values()))
    np.testing.assert_allclose(got, simulate(graph)([x])[0].numpy(), rtol=0, atol=TOLERANCE)
    (fallback,) = TARGET.placement(path, case).fallbacks
    assert "4" in fallback.reason
