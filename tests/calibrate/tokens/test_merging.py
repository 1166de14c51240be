"""Merged tokens count as often as they stand for: sums, means and attention stay those of all tokens."""

import pytest
import torch
from encoders import TOKENS, WIDTH, tokens
from small_graphs import Made
from token_models import (
    PAIRED,
    ROUNDING,
    Layer,
    attention_of,
    captured,
    cut,
    feeds,
    graph_of,
    is_close,
    text,
    twins,
    values,
)
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate.errors import CalibrationError
from calibrate.graph import clone, operator_name, run
from calibrate.tokens.insert import Cut, reduce
from calibrate.tokens.selection import FORMS

NAME = "encoder: fused, scale"


def by_the_paper(key: Tensor, residual: Tensor, gone: int) -> tuple[Tensor, Tensor]:
    """(tokens, sizes) of one sample, behind a class token: the bipartite matching in loops."""
    unit = nn.functional.normalize(key.mean(0), dim=-1)
    a, b = list(range(1, TOKENS, 2)), list(range(2, TOKENS, 2))
    edges = sorted(((float(unit[i] @ unit[j]), i, j) for i in a for j in b), reverse=True)
    into: dict[int, int] = {}
    for _, i, j in edges:
        if i not in into and len(into) < gone:
            into[i] = j
    rows, sizes = [], []
    for k in range(TOKENS):
        if k not in into:
            made_of = [k, *(i for i, j in into.items() if j == k)]
            rows.append(residual[made_of].mean(0))
            sizes.append(len(made_of))
    return torch.stack(rows), torch.tensor(sizes).float()


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_the_most_alike_are_merged_as_the_paper_says(gone: int) -> None:
    graph, inputs = graph_of(NAME), feeds(NAME)
    _, key, residual = attention_of(NAME, inputs)
    (done,) = cut(graph, TOKENS - gone, method="tome")
    (kept,) = values(graph, inputs, done.kept)
    wanted = [by_the_paper(k, r, gone) for k, r in zip(key, residual, strict=True)]
    assert is_close(kept, torch.stack([w[0] for w in wanted]))
    assert not is_close(kept, residual[:, : TOKENS - gone])
    # weighted by size, the mean of all tokens is what it was
    sizes = torch.stack([w[1] for w in wanted])
    mean = (kept * sizes[:, :, None]).sum(1) / TOKENS
    assert is_close(mean, residual.mean(1))
    assert not is_close(kept.mean(1), residual.mean(1))


@pytest.mark.parametrize("pool", ["mean", "summed", "rest"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_merging_tokens_that_are_the_same_changes_no_answer(by_hand: bool, pool: str) -> None:
    graph = twins(by_hand, **{pool: True})
    (before,) = run(graph, PAIRED)
    merged, unweighted, pruned = clone(graph), clone(graph), clone(graph)
    reduce(merged, [Cut(0, 4, "tome")])
    reduce(unweighted, [Cut(0, 4, "tome", {"proportional": False})])
    cut(pruned, 4, method="even")
    assert float((run(merged, PAIRED)[0] - before).abs().max() / before.abs().max()) < ROUNDING
    assert not is_close(run(unweighted, PAIRED)[0], before)
    assert not is_close(run(pruned, PAIRED)[0], before)


def test_sizes_add_up_over_two_cuts_and_are_pruned_with_their_tokens() -> None:
    graph = twins(False)
    done = reduce(graph, [Cut(0, 4, "tome"), Cut(1, 3, "tome")])
    assert [(d.before, d.after) for d in done] == [(6, 4), (4, 3)]
    sizes = [n for n in graph.graph.nodes if operator_name(n) == "log"]
    assert len(sizes) == 1  # attention behind the first cut; behind the second there is none
    (stands_for,) = values(graph, PAIRED, sizes[0].args[0])
    assert stands_for.shape == (5, 4)
    assert torch.equal(stands_for.sum(1), torch.full((5,), 6.0))
    graph = twins(False)
    reduce(graph, [Cut(0, 4, "tome"), Cut(1, 3, "importance")])
    assert run(graph, PAIRED)[0].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_merging_none_is_bit_identical_and_takes_no_scatter(form: str) -> None:
    graph = graph_of(NAME)
    cut(graph, TOKENS, TOKENS, method="tome", form=form)
    assert torch.equal(run(graph, feeds(NAME))[0], run(graph_of(NAME), feeds(NAME))[0])
    names = {operator_name(n) for n in graph.graph.nodes}
    assert not names & {"topk", "argsort", "gather", "scatter", "scatter_add", "scatter_reduce", "index_put"}
    assert ("sort" in names) == (form == "topk"), "ranks"


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(CalibrationError, match="at most half of the tokens"):
        cut(graph_of(NAME), 2, method="tome")
    for name in ("masked: bool row", "masked: added by hand", "biased: by hand"):
        with pytest.raises(CalibrationError, match="a merged token has no place"):
            cut(graph_of(name), 4, method="tome")


def deep() -> GraphModule:
    """Three blocks and a class token."""
    torch.manual_seed(6)
    blocks = {name: Layer() for name in ("one", "two", "three")}

    def call(self: nn.Module, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.one(self.embed(x))))[:, 0])

    return captured(Made(call, embed=nn.Linear(8, WIDTH), head=nn.Linear(WIDTH, 5), **blocks), tokens())


def test_merged_tokens_can_be_fused_later_and_are_counted_on() -> None:
    graph = deep()
    reduce(graph, [Cut(0, 5, "tome"), Cut(1, 4, "evit")])
    one, two = values(graph, feeds(NAME), *[n.args[0] for n in graph.graph.nodes if operator_name(n) == "log"])
    for sizes, count in ((one, 5), (two, 4)):
        assert sizes.shape == (5, count)
        assert torch.equal(sizes.sum(1), torch.full((5,), float(TOKENS)))
    # what an earlier cut follows besides sizes cannot be fused
    with pytest.raises(CalibrationError, match="set fuse to false"):
        reduce(clone(text()), [Cut(0, 5, "importance", {"separator": 9}), Cut(1, 4, "evit")])
