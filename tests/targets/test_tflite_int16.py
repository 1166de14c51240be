"""16-bit activations in a .tflite file: the kernels' arithmetic is the simulation's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("litert_torch", reason="lowering needs the extra [tflite]")
pytest.importorskip("ai_edge_litert", reason="running needs the extra [tflite]")

from hypothesis import given
from hypothesis import strategies as st
from tflite_graphs import batch, capture, job, quantize

from calibrate import graph as graphs
from calibrate import kernels16, qdq
from calibrate.simulation import simulate
from targets import Job
from targets._tflite_file import TFLiteFile
from targets.errors import TargetError
from targets.tflite import TARGET


class Residual(nn.Module):
    """Convolutions (depthwise too), an add, pools, a mean, a linear: what has a 16x8 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.pointwise, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.pointwise(F.relu(self.depthwise(x))) + x)
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


IMAGE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def _case() -> Job:
    torch.manual_seed(0)
    return job(quantize(capture(Residual(), IMAGE), IMAGE, wide=True), IMAGE)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    case, path = _case(), tmp_path_factory.mktemp("int16") / "model.tflite"
    TARGET.lower(case, path)
    return case, path


def _images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 3, 12, 12, generator=generator) for _ in range(count)]


def test_sixteen_bit_activations_equal_the_simulation_bit_for_bit(lowered: tuple[Job, Path]) -> None:
    case, path = lowered
    session, reference = TARGET.open(path), simulate(case.graph, "float32", "fixed_point")
    for image in _images(12):
        np.testing.assert_array_equal(session.run(batch(image))["result0"], reference((image,))[0].numpy())


def test_the_arithmetic_of_another_runtime_is_not_that_of_these_kernels(lowered: tuple[Job, Path]) -> None:
    case, path = lowered
    session, other = TARGET.open(path), simulate(case.graph, "float32", "float")
    unequal = sum(
        int((session.run(batch(image))["result0"] != other((image,))[0].numpy()).sum()) for image in _images(12)
    )
    assert unequal > 0


def test_every_layer_runs_on_sixteen_bits_with_int64_biases(lowered: tuple[Job, Path]) -> None:
    case, path = lowered
    placement = TARGET.placement(path, case)
    assert placement.fallbacks == ()
    assert placement.float_ops == 0
    wanted = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "MEAN", "MAX_POOL_2D")
    assert {name for name in wanted if f"int16 {name}" in placement.kinds} == set(wanted)
    file = TFLiteFile.read(path)
    biases = [op.inputs[2] for op in file.graph.operators if file.operator(op) in wanted[:3]]
    assert {file.dtype(b) for b in biases} == {"INT64"}


def test_sixteen_bits_are_nearer_to_float_than_eight(lowered: tuple[Job, Path], tmp_path: Path) -> None:
    _, path = lowered
    torch.manual_seed(0)
    graph = capture(Residual(), IMAGE)
    exact = graphs.run(graph, (IMAGE,))[0].numpy()
    narrow = job(quantize(capture(Residual(), IMAGE), IMAGE), IMAGE)
    wide_error = np.abs(TARGET.open(path).run(batch(IMAGE))["result0"] - exact).max()
    assert narrow.graph is not None
    assert wide_error < 0.02 * np.abs(exact).max()  # what 8-bit weights alone cost: 1/254 each, averaged over sums


def test_a_graph_of_both_widths_is_refused(tmp_path: Path) -> None:
    case = _case()
    pair = [n for n in case.graph.graph.nodes if n.target in (qdq.QUANTIZE, qdq.DEQUANTIZE)][:2]
    for node in pair:
        node.args = (*node.args[:2], 0, -128, 127, torch.int8)
    with pytest.raises(TargetError, match="int8 activations where others have 16 bits"):
        TARGET.lower(case, tmp_path / "model.tflite")


@given(st.floats(1e-8, 100))
def test_a_multiplier_is_the_factor_to_31_bits(real: float) -> None:
    mantissa, exponent = kernels16.multiplier(real)
    assert 2**30 <= mantissa < 2**31
    assert abs(mantissa / 2**31 * 2.0**exponent / real - 1) < 2**-30


@given(st.integers(-(2**30), 2**30), st.floats(1e-6, 0.9))
def test_scaling_by_the_high_half_is_within_a_step_of_the_real_product(total: int, factor: float) -> None:
    found = int(kernels16.doubled_high(torch.tensor([total]), factor)[0])
    assert abs(found - total * factor) <= 1.01


@given(st.integers(-(2**40), 2**40), st.floats(1e-6, 1e-3))
def test_one_shift_is_within_the_cut_of_its_multiplier(total: int, factor: float) -> None:
    found = int(kernels16.shifted_once(torch.tensor([[total]]), [factor], 1)[0, 0])
    assert abs(found - total * factor) <= 0.51 + abs(total * factor) * 2**-14  # 15 bits of multiplier
