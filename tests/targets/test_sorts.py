"""Stable sorts in files: the order of equals is torch's, on rows full of them, and rows are gathered whole."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cut_encoders import RULES, cut, job
from small_graphs import capture
from torch import Tensor, nn

from calibrate.graph import run
from calibrate.samples import InputSpec
from targets import Job, find

pytest.importorskip("onnxruntime")


class Sorted(nn.Module):
    """scores [1, N] -> their order, largest first, and the rank of each."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.sort(x, stable=True, dim=-1, descending=True)[1]
        return order.to(torch.float32), torch.sort(order, stable=True, dim=-1)[1].to(torch.float32)


@pytest.mark.parametrize("target", ["onnx", "tflite"])
@pytest.mark.parametrize("tokens", [6, 65, 197])
def test_equals_stay_in_their_order(target: str, tokens: int, tmp_path: Path) -> None:
    if target == "tflite":
        pytest.importorskip("litert_torch")
    graph = capture(Sorted(), torch.zeros(2, tokens))
    work = Job("sorted", graph, (InputSpec("x", (1, tokens), "float32", False),), ("order", "rank"), RULES[target])
    path = tmp_path / f"sorted{find(target).suffix}"
    find(target).lower(work, path)
    session = find(target).open(path)
    random = np.random.default_rng(0)
    for levels in (1, 2, 5, 1000):
        x = random.integers(0, levels, (1, tokens)).astype(np.float32)
        made = session.run({"x": x})
        expected = np.argsort(-x, axis=-1, kind="stable")
        assert np.array_equal(made["order"], expected)
        assert np.array_equal(made["rank"], np.argsort(expected, axis=-1))
        assert np.array_equal(run(graph, [torch.from_numpy(x)])[0], expected)


def test_onnx_gathers_rows_whole(tmp_path: Path) -> None:
    find("onnx").lower(job(cut("evit_fused", "topk"), ("y",), "onnx"), path := tmp_path / "cut.onnx")
    names = [node.op_type for node in onnx.load(path).graph.node]
    assert names.count("GatherND") == 4, "what stays and what goes, behind two blocks"
