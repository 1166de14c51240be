"""What the benchmark of binary sizes predicts from bits and scales, on layers counted by hand."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from calibrate import qdq

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS, COLUMNS = 4, 32
BIAS = ROWS * 4


@pytest.fixture
def predicted() -> Iterator[object]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from binary_sizes_count import predicted as counted

        yield counted
    finally:
        sys.path.remove(str(BENCHMARKS))


class _Linear(nn.Module):
    def __init__(self, levels: list[int], bits: int) -> None:
        super().__init__()
        codes = torch.tensor(levels, dtype=torch.int8).repeat(COLUMNS)[:COLUMNS]
        self.bits = bits
        self.register_buffer("codes", codes.expand(ROWS, COLUMNS).contiguous())
        self.register_buffer("scales", torch.full((ROWS,), 0.5))
        self.register_buffer("bias", torch.arange(ROWS).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return qdq.DYNAMIC_LINEAR(x, self.codes, self.scales, self.bias, "row_int8", self.bits)


def _graph(levels: list[int], bits: int) -> torch.fx.GraphModule:
    program = torch.export.export(_Linear(levels, bits), (torch.zeros(1, COLUMNS),))
    return program.module(check_guards=False)


@pytest.mark.parametrize(
    ("levels", "bits", "each", "planes"),
    [([-1, 1], 1, 1, 1), ([-1, 0, 1], 1, 2, 1), ([-9, -2, 2, 9], 8, 2, 2), ([-9, -2, 0, 2, 9], 8, 8, 1)],
    ids=("signs", "ternary", "two planes", "eight bits"),
)
def test_levels_count_their_bits_and_scales(
    predicted: object, levels: list[int], bits: int, each: int, planes: int
) -> None:
    graph = _graph(levels, bits)
    for half, number in ((False, 4), (True, 2)):
        wanted = ROWS * COLUMNS * each / 8 + ROWS * planes * number + BIAS * number // 4
        assert predicted(graph, half=half) == wanted


def test_equal_constants_count_once(predicted: object) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.ones(8))
            self.register_buffer("b", torch.ones(8))
            self.register_buffer("c", torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.a) * self.b + self.c

    graph = torch.export.export(Twice(), (torch.zeros(8),)).module(check_guards=False)
    assert predicted(graph) == 2 * 8 * 4
