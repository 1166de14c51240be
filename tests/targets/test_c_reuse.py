"""Channels computed from their neighbours: the same sums to the bit, in fewer words where rows are alike."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from c_graphs import MACHINES, binary_graph, c_job, lowered, run, simulation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from targets import Job
from targets._c_reuse import spanning, tree

IMAGE = torch.randn(1, 70, 5, 6, generator=torch.Generator().manual_seed(1))


class Alike(nn.Module):
    """A padded convolution of signs whose output channels are one row, with single signs turned."""

    def __init__(self, turned: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(turned)
        self.conv = nn.Conv2d(70, 60, 3, padding=1)
        with torch.no_grad():
            rows = torch.randn(1, 70, 3, 3, generator=random).repeat(60, 1, 1, 1).reshape(60, -1)
            for row in rows[1:]:
                places = torch.randint(0, rows.shape[1], (turned,), generator=random)
                row[places] = -row[places]
            self.conv.weight.copy_(rows.reshape(60, 70, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.where(x >= 0, 1.0, -1.0))


def reusing(turned: int) -> Job:
    torch.manual_seed(0)
    made = c_job(binary_graph(Alike(turned).eval(), IMAGE, ("conv2d",)), IMAGE)
    return replace(made, rules=made.rules.model_copy(update={"reuse_outputs": True}))


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: sums were not computed")


@needs_compiler
@pytest.mark.parametrize("turned", [0, 1])
def test_channels_from_their_neighbours_are_exact(turned: int, tmp_path: Path) -> None:
    case = reusing(turned)
    path = lowered(case, tmp_path)
    assert "tree_mask" in (path / "weights.h").read_text()
    np.testing.assert_array_equal(run(path, IMAGE), simulation(case)((IMAGE,))[0].numpy())


@needs_compiler
@pytest.mark.parametrize("machine", MACHINES)
def test_every_processor_walks_the_tree_alike(machine: str, tmp_path: Path) -> None:
    case = reusing(1)
    path = lowered(case, tmp_path)
    assert "tree_mask" in (path / "weights.h").read_text()
    found = MACHINES[machine].outputs(path, [IMAGE.numpy()], tmp_path)
    np.testing.assert_array_equal(found, simulation(case)((IMAGE,))[0].numpy().reshape(1, -1))


def test_rows_that_are_not_alike_are_left_as_they_are(tmp_path: Path) -> None:
    assert "tree_mask" not in (lowered(reusing(300), tmp_path) / "weights.h").read_text()


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    case = reusing(0)
    plain = replace(case, rules=case.rules.model_copy(update={"reuse_outputs": False}))
    assert "tree_mask" not in (lowered(plain, tmp_path) / "weights.h").read_text()
    assert c_job(case.graph, IMAGE).rules.reuse_outputs is False


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_tree_is_the_cheapest_and_gives_every_sum(rows: int, words: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    signs = random.integers(0, 3, (rows, words), np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    used, x = np.full(words, 2**64 - 1, np.uint64), random.integers(0, 2**63, words, np.uint64)
    made, sums = tree(signs, used, 64 * words), {}
    for i, (row, parent) in enumerate(zip(made.order.tolist(), made.parent.tolist(), strict=True)):
        pick = slice(made.first[i], made.first[i + 1])
        count = sum(int(v).bit_count() for v in (x[made.place[pick]] & made.mask[pick]) ^ made.bits[pick])
        sums[row] = int(made.add[i]) + (-2 * count if parent < 0 else sums[parent] - 4 * count)
    assert sums == {r: 64 * words - 2 * sum(int(v).bit_count() for v in x ^ signs[r]) for r in range(rows)}
    edges = sorted((int((signs[a] != signs[b]).sum()), a, b) for a in range(rows) for b in range(a))
    component, least = list(range(rows)), 0  # Kruskal's, as a second opinion
    for cost, a, b in edges:
        if component[a] != component[b]:
            least += cost
            component = [component[a] if c == component[b] else c for c in component]
    assert sum(int((signs[r] != signs[p]).sum()) for r, p in spanning(signs) if p >= 0) == least
