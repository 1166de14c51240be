"""Rewritings of a written file: fewer operators, the same numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("litert_torch", reason="lowering needs the extra [tflite]")
pytest.importorskip("ai_edge_litert", reason="running needs the extra [tflite]")

from tflite_graphs import batch, capture, job, quantize

from calibrate import graph as graphs
from calibrate.simulation import simulate
from targets.tflite import TARGET


class Shortcut(nn.Module):
    """A residual block whose shortcut takes every second pixel and pads channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(y.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 32)


def _kinds(model: nn.Module, x: Tensor, folder: Path, static: bool) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """The file's operators, its output, and what the graph computes."""
    graph = capture(model, x)
    case = job(quantize(graph, x) if static else graph, x)
    path = folder / "model.tflite"
    TARGET.lower(case, path)
    wanted = simulate(case.graph, "float32", "fixed_point")((x,))[0] if static else graphs.run(case.graph, (x,))[0]
    return TARGET.placement(path, case).kinds, TARGET.open(path).run(batch(x))["result0"], wanted.numpy()


@pytest.mark.parametrize("static", [True, False])
def test_a_strided_shortcut_stays_with_xnnpack_and_without_transposes(static: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    kinds, found, wanted = _kinds(Shortcut(), x, tmp_path, static)
    assert kinds["built-in operators"] == 0
    assert sum(count for name, count in kinds.items() if name.endswith("TRANSPOSE")) == 1  # of the input
    assert not any(name.endswith("STRIDED_SLICE") for name in kinds)
    np.testing.assert_allclose(found, wanted, atol=0 if static else 1e-6)  # float32 sums in another order


def test_an_odd_size_keeps_its_strided_slice_and_its_numbers(tmp_path: Path) -> None:
    class Every(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, 1::3, ::2] + 1

    x = torch.randn(1, 2, 11, 7)
    kinds, found, wanted = _kinds(Every(), x, tmp_path, False)
    assert any(name.endswith("STRIDED_SLICE") for name in kinds)
    np.testing.assert_array_equal(found, wanted)


def test_slices_that_begin_late_take_the_same_rows(tmp_path: Path) -> None:
    class Every(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, 1::3] + x[:, :, 2::3]

    x = torch.randn(1, 2, 12, 8)
    kinds, found, wanted = _kinds(Every(), x, tmp_path, False)
    assert not any(name.endswith("STRIDED_SLICE") for name in kinds)
    np.testing.assert_array_equal(found, wanted)


def test_attention_multiplies_in_rank_4_with_its_keys_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 32)
    kinds, found, wanted = _kinds(Attention(), x, tmp_path, False)
    assert kinds["float32 TRANSPOSE"] == 2  # heads to the front and back; none for the keys
    assert kinds["float32 BATCH_MATMUL"] == 2
    np.testing.assert_allclose(found, wanted, atol=1e-6)  # float32 softmax and sums in another order
