"""Attention, GELU and norms on the kernels that ONNX Runtime has for them, with torch's numbers."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import capture, job
from torch import Tensor, nn

from targets import find
from targets._onnx_placement import optimised

TARGET = find("onnx")
TOLERANCE = 2e-6  # float32 sums in another order, outputs of magnitude 1
TOKENS, HEADS, SIZE = 6, 2, 8


class Packed(nn.Module):
    """q, k and v from one linear, as vision transformers have them; post-norm and GELU after it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(1, TOKENS, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, TOKENS, 16)
        return nn.functional.gelu(self.norm(self.out(y) + x))


class Masked(nn.Module):
    """Attention alone on (1, heads, tokens, size), with a mask that comes in."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)


def heads(seed: int) -> Tensor:
    return torch.randn(1, HEADS, TOKENS, SIZE, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, inputs: dict[str, Tensor], path: Path) -> tuple[np.ndarray, np.ndarray]:
    graph = capture(model, tuple(inputs.values()))
    TARGET.lower(job(graph, inputs), path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    output = TARGET.open(path).run({k: v.numpy() for k, v in inputs.items()})["y"]
    return output, graph(*inputs.values()).detach().numpy()


def operators(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


def test_packed_attention_reads_slices_and_moves_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "m.onnx"
    x = torch.randn(1, TOKENS, 16)
    output, expected = run(Packed(), {"x": x}, path)
    np.testing.assert_allclose(output, expected, atol=TOLERANCE, rtol=0)
    found = operators(path)
    assert found["MultiHeadAttention"] == 1
    assert found["Slice"] == 3
    assert (found["Transpose"], found["Reshape"]) == (0, 0)
    fused = Counter(n.op_type for n in optimised(path).graph.node)
    assert (fused["Gelu"], fused["LayerNormalization"], fused["SkipLayerNormalization"]) == (1, 1, 0)


@pytest.mark.parametrize("kind", ["bool", "float", "keys"])
def test_masks_give_torchs_numbers_and_zeros_where_all_is_masked(kind: str, tmp_path: Path) -> None:
    mask = torch.rand(1, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, 0, 2] = False
    if kind == "float":
        mask = torch.where(mask, 0.5, -torch.inf)
    if kind == "keys":
        mask = mask[:, :, :1]
    path = tmp_path / "m.onnx"
    inputs = {"q": heads(0), "k": heads(1), "v": heads(2), "mask": mask}
    output, expected = run(Masked(), inputs, path)
    np.testing.assert_allclose(output, expected, atol=TOLERANCE, rtol=0)
    assert operators(path)["MultiHeadAttention"] == 1
    if kind != "keys":
        assert np.all(output[0, :, 2] == 0)
        assert np.abs(output[0, :, 3]).max() > 0


def test_a_mask_that_masks_nothing_leaves_no_trace(tmp_path: Path) -> None:
    class Open(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
            return nn.functional.scaled_dot_product_attention(q, k, v, mask)

    path = tmp_path / "m.onnx"
    output, expected = run(Open(), {"q": heads(0), "k": heads(1), "v": heads(2)}, path)
    np.testing.assert_allclose(output, expected, atol=TOLERANCE, rtol=0)
    found = operators(path)
    assert found.keys() <= {"Transpose", "Reshape", "MultiHeadAttention"}
    kernel = next(n for n in onnx.load(path).graph.node if n.op_type == "MultiHeadAttention")
    assert len(kernel.input) == 3


def test_a_causal_mask_hides_later_tokens(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    output, expected = run(Masked(causal=True), {"q": heads(0), "k": heads(1), "v": heads(2)}, path)
    np.testing.assert_allclose(output, expected, atol=TOLERANCE, rtol=0)
    full = nn.functional.scaled_dot_product_attention(heads(0), heads(1), heads(2)).numpy()
    assert np.abs(output - full).max() > 0.01


def test_tensorrt_gets_plain_operators(tmp_path: Path) -> None:
    x = torch.randn(1, TOKENS, 16)
    TARGET.lower(job(capture(Packed(), (x,)), {"x": x}, runtime="tensorrt"), tmp_path / "m.onnx")
    assert {n.domain for n in onnx.load(tmp_path / "m.onnx").graph.node} <= {"", "ai.onnx"}
