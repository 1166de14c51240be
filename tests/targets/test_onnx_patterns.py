"""Few sign kernels in ONNX: a codebook and numbers of few bits on disk, the same codes in memory and in answers."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_onnx_levels import FLOAT_TOLERANCE, SIGNS, Layer, input_of, lowered, optimised

from targets import find
from targets._onnx_patterns import MOST, packed, patterns_of


class Few(Layer):
    """A convolution of 96 x 32 kernels, each one of `count` patterns."""

    def __init__(self, count: int, how: str = "static") -> None:
        super().__init__(SIGNS, how, conv=True)
        random = torch.Generator().manual_seed(3)
        keys = torch.randperm(2**9, generator=random)[:count]
        book = ((keys[:, None] >> torch.arange(9)) & 1) * 2 - 1
        taken = torch.cat([torch.arange(count), torch.randint(0, count, (96 * 32 - count,), generator=random)])
        self.codes = book[taken].reshape(96, 32, 3, 3).to(torch.int8)


@pytest.mark.parametrize("count", [2, 16, 32, 33])
@pytest.mark.parametrize("how", ["static", "float"])
def test_a_file_of_few_kernels_is_smaller_and_computes_what_the_simulation_does(
    count: int, how: str, tmp_path: Path
) -> None:
    few, many = Few(count, how), Layer(SIGNS, how, conv=True)
    got, expected = lowered(few, tmp_path / "few.onnx")
    np.testing.assert_allclose(got, expected, rtol=0, atol=0 if how == "static" else FLOAT_TOLERANCE)
    lowered(many, tmp_path / "many.onnx")
    saved = (tmp_path / "many.onnx").stat().st_size - (tmp_path / "few.onnx").stat().st_size
    kernels, each = 96 * 32, 16 // max(1, (count - 1).bit_length())
    # The codebook is a byte per sign; names and nodes take some hundred bytes; the table of signs is not there.
    assert saved > kernels * 9 / 8 - 2 * -(-kernels // each) - 9 * count - 600
    if how == "static":
        held = [a for a in optimised(tmp_path / "few.onnx", tmp_path).values() if a.size == few.codes.numel()]
        assert [a.dtype for a in held] == [np.int8]


def test_another_number_of_a_pattern_changes_the_output(tmp_path: Path) -> None:
    layer, path = Few(16), tmp_path / "few.onnx"
    got, _ = lowered(layer, path)
    model = onnx.load(path)
    (words,) = [t for t in model.graph.initializer if t.name.endswith("_patterns_taken")]
    words.raw_data = bytes([words.raw_data[0] ^ 1]) + words.raw_data[1:]
    onnx.save(model, path)
    other = find("onnx").open(path).run({"x": input_of(layer).numpy()})["y"]
    assert (other != got).any((0, 2, 3)).sum() == 1  # one kernel, so one output channel


def test_many_kernels_few_weights_and_other_codes_are_no_case_for_a_codebook() -> None:
    few = Few(16).codes.numpy()
    assert patterns_of(few) is not None
    assert patterns_of(Few(MOST + 1).codes.numpy()) is None
    assert patterns_of(few[:2]) is None, "the nodes would weigh more"
    assert patterns_of(few * np.int8(2)) is None
    assert patterns_of(few.reshape(96, -1)) is None


@given(st.integers(1, MOST), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_words_hold_the_numbers(count: int, length: int, seed: int) -> None:
    places = np.random.default_rng(seed).integers(0, count, length)
    words = packed(places, count).astype(np.int64)
    bits = 16 // (16 // max(1, (count - 1).bit_length()))
    unpacked = words // (1 << (bits * np.arange(16 // bits))) % (1 << bits)
    assert np.array_equal(unpacked.reshape(-1)[:length], places)
