"""The target `c` on signs: layers whose weights and inputs are -1 and +1, to the bit, on every processor."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from c_graphs import MACHINES, Binary, Sign, binary_graph, c_job, lowered, simulation
from tflite_graphs import batch
from torch import Tensor, nn

from calibrate import qdq
from targets._c_pack import block_words, packed, row_words, sign_words, stored_bits
from targets._c_session import build
from targets.c import TARGET

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: what the sources compute is unknown")
LAYERS = ("conv2d_1", "conv2d_2", "linear")
IMAGE = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def binary_job(channels: int = 70, layers: tuple[str, ...] = LAYERS):
    torch.manual_seed(0)
    return c_job(binary_graph(Binary(channels), IMAGE, layers), IMAGE)


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*IMAGE.shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("channels", [64, 70])
def test_layers_of_signs_are_popcounts_and_exact(channels: int, tmp_path: Path) -> None:
    case = binary_job(channels)
    path = lowered(case, tmp_path)
    session, reference = TARGET.open(path), simulation(case)
    for image in images(8):
        wanted = reference((image,))[0].numpy()
        # The stem is float: its last bits may turn a sign only where a sum is within 1e-6 of zero, which none is here.
        np.testing.assert_array_equal(session.run(batch(image))["result0"], wanted)
    assert TARGET.placement(path, case).kinds["w1a1 conv"] == 2
    assert TARGET.placement(path, case).kinds["w1a1 linear"] == 1


def test_signs_of_the_border_are_not_made_up(tmp_path: Path) -> None:
    """Without the correction of padding the answer is another one: the check can fail."""
    case = binary_job(64)
    path = lowered(case, tmp_path)
    model = (path / "model.c").read_text()
    (path / "model.c").write_text(
        model.replace(".tap_sums = tap_sums", ".tap_sums = NULL, .zero = 0 * sizeof tap_sums")
    )
    found = TARGET.open(path).run(batch(IMAGE))["result0"]
    assert not np.array_equal(found, simulation(case)((IMAGE,))[0].numpy())


@pytest.mark.parametrize("machine", MACHINES)
def test_every_processor_counts_the_same_bits(machine: str, tmp_path: Path) -> None:
    case = binary_job(70)
    path = lowered(case, tmp_path)
    samples = images(3)
    wanted = np.stack([simulation(case)((s,))[0].numpy().reshape(-1) for s in samples])
    found = MACHINES[machine].outputs(path, [s.numpy() for s in samples], tmp_path)
    np.testing.assert_array_equal(found, wanted, strict=True)


def test_the_avx512_kernel_compiles(tmp_path: Path) -> None:
    """Whether it counts right is known only where a processor with VPOPCNTDQ runs the other tests."""
    path = lowered(binary_job(64), tmp_path)
    build(path, tmp_path / "m.so", "-Wall", "-Werror", "-mavx2", "-mavx512f", "-mavx512vpopcntdq", command="gcc")


def test_codes_that_may_be_zero_are_not_taken_for_signs(tmp_path: Path) -> None:
    case = binary_job(64)
    for node in case.graph.graph.nodes:
        if node.target in (qdq.QUANTIZE, qdq.DEQUANTIZE) and node.args[1] == 0.25:
            node.args = (node.args[0], 1.0, *node.args[2:])  # +-0.25 of steps of 1: zero
    path = lowered_or_refused(case, tmp_path)
    assert path is None or TARGET.placement(path, case).kinds["w1a1 conv"] == 1


def lowered_or_refused(case, folder: Path) -> Path | None:
    from targets.errors import TargetError

    try:
        return lowered(case, folder)
    except TargetError:
        return None


def test_a_linear_layer_of_a_transformers_shape_is_exact(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sign, self.linear = Sign(0.125), nn.Linear(1088, 36)  # 17 words: two rounds of eight and a rest

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.sign(x))

    torch.manual_seed(1)
    x = torch.randn(1, 21, 1088)
    case = c_job(binary_graph(Rows(), x, ("linear",)), x)
    path = lowered(case, tmp_path)
    np.testing.assert_array_equal(TARGET.open(path).run(batch(x))["result0"], simulation(case)((x,))[0].numpy())
    assert TARGET.placement(path, case).kinds["w1a1 linear"] == 1


def test_words_hold_the_signs_and_come_back() -> None:
    codes = np.random.default_rng(0).choice(np.array([-1, 1], np.int8), (10, 9, 70))
    words = sign_words(codes)
    assert words.shape == (2, 18, 8)
    for row, tap, channel in ((0, 0, 0), (9, 8, 69), (3, 4, 64)):
        word = int(words[row // 8, tap * 2 + channel // 64, row % 8])
        assert (word >> channel % 64 & 1) == (codes[row, tap, channel] < 0)
    np.testing.assert_array_equal(block_words(row_words(words)), words)
    assert not words[1, :, 2:].any()  # rows that are not there


def test_codes_take_as_few_bits_as_they_need() -> None:
    codes = np.array([[-2, 1, 0, -1, 1]], np.int8)
    assert packed(codes, 2, -2).tolist() == [[0b01_10_11_00, 0b11]]
    assert [stored_bits(codes, *r) for r in ((-2, 1), (-4, 3), (-8, 7), (-127, 127))] == [2, 4, 4, 8]
    assert stored_bits(np.array([[-1, 1]], np.int8), -127, 127) == 1
