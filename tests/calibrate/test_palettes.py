"""Tables of a palette: the least squared error there is, whatever the weights look like."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibrate.palettes import nearest, palette

numbers = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9)


def error(weight: Tensor, table: Tensor, importance: Tensor | None = None) -> float:
    missed = (weight.double() - table.double()[nearest(weight, table).long()]).square()
    return float((missed if importance is None else missed * importance.double()).sum())


def least_error(weight: Tensor, entries: int, importance: Tensor) -> float:
    """Of every partition of the sorted values into stretches, tried one by one."""
    order = weight.argsort()
    values, masses = weight.double()[order], importance.double()[order]
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(values)), min(entries, len(values)) - 1):
        bounds = [0, *cuts, len(values)]
        total = 0.0
        for a, b in itertools.pairwise(bounds):
            mean = (values[a:b] * masses[a:b]).sum() / masses[a:b].sum()
            total += float((masses[a:b] * (values[a:b] - mean).square()).sum())
        best = min(best, total)
    return best


@settings(max_examples=60, deadline=None)
@given(numbers, st.sampled_from([2, 4]), st.data())
def test_no_partition_of_few_values_is_better(values: list[float], entries: int, data: st.DataObject) -> None:
    weight = torch.tensor(values)
    masses = torch.tensor([data.draw(st.floats(0.1, 10)) for _ in values])
    table = palette(weight, entries, masses)
    # Entries are rounded to float32 (2^-24 of 50), and masses are raised by a billionth.
    assert error(weight, table, masses) <= least_error(weight, entries, masses) * (1 + 1e-6) + 1e-8


def test_a_table_made_by_quantiles_is_worse_than_the_best() -> None:
    weight = torch.tensor([0.0, 0.1, 0.2, 9.0])
    quantiles = torch.tensor([0.05, 4.6])
    assert error(weight, palette(weight, 2)) < 0.1 * error(weight, quantiles)


# Max 1960, "Quantizing for minimum distortion", table I: the least error of a Gaussian of variance 1.
LLOYD_MAX = {2: 0.3634, 4: 0.1175, 8: 0.03454, 16: 0.009497}


@pytest.mark.parametrize(("entries", "distortion"), LLOYD_MAX.items())
def test_a_gaussian_gets_the_quantizer_of_the_textbook(entries: int, distortion: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(100_000)
    # 100,000 samples: their own variance is off by up to 1 %, and the table is fitted to them
    assert error(weight, palette(weight, entries)) / len(weight) == pytest.approx(distortion, rel=0.015)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_a_palette_of_long_tails_beats_evenly_spaced_codes_of_as_many_bits(bits: int) -> None:
    torch.manual_seed(1)
    weight = torch.distributions.Laplace(0.0, 1.0).sample((20_000,))
    reach = weight.abs().max()
    even = torch.linspace(float(-reach), float(reach), 2**bits)
    assert error(weight, palette(weight, 2**bits)) < 0.6 * error(weight, even)


def test_more_entries_than_values_keep_every_value() -> None:
    weight = torch.tensor([[0.5, -1.0], [0.5, 2.0]])
    table = palette(weight, 8)
    assert table.tolist() == [-1.0, 0.5, *[2.0] * 6]
    assert torch.equal(table[nearest(weight, table).long()], weight)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 16, 256]))
def test_entries_ascend_are_float16_numbers_when_asked_and_the_same_every_time(seed: int, entries: int) -> None:
    weight = torch.randn(700, generator=torch.Generator().manual_seed(seed)) * 0.05
    table = palette(weight, entries, half=True)
    assert torch.equal(table, table.half().float())
    assert torch.equal(table, table.sort()[0])
    assert torch.equal(table, palette(weight, entries, half=True))
    chosen = table[nearest(weight, table).long()]
    assert torch.equal((weight - chosen).abs(), (weight[:, None] - table).abs().amin(1))


def test_weights_that_count_for_nothing_do_not_pull_the_table() -> None:
    weight = torch.cat([torch.linspace(-1, 1, 50), torch.full((50,), 100.0)])
    masses = (weight < 2).float()
    assert error(weight, palette(weight, 4, masses), masses) < 0.6 * error(weight, palette(weight, 4), masses)
    plain = palette(weight, 4)
    assert torch.equal(palette(weight, 4, torch.zeros_like(weight)), plain)
