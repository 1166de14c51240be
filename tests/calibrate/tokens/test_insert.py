"""Cutting tokens behind blocks: keeping all changes nothing, dropping some reduces all that meets them alike."""

import pytest
import torch
from encoders import TOKENS, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from token_models import MASKS, MODELS, Scored, by_channel, cut, feeds, graph_of, in_order, level, padding
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.errors import CalibrationError
from calibrate.graph import kind, run
from calibrate.tokens import methods
from calibrate.tokens.attention import sites
from calibrate.tokens.insert import Cut, reduce
from calibrate.tokens.selection import FORMS, Fixed

# The tokens in another order: sums over them round differently; a few layers of float32.
REORDERED = 2e-5


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the reach of the first."""
    return float((one - other).abs().max() / one.abs().max())


def shapes_are_true(graph: GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Every shape that the graph claims is the one it computes, and nothing but the batch is left open."""
    symbols = {str(d) for n in graph.graph.find_nodes(op="placeholder") for d in n.meta["val"].shape}

    class Checked(torch.fx.Interpreter):
        def run_node(self, node: Node) -> object:
            made = super().run_node(node)
            known = node.meta.get("val")
            if isinstance(made, Tensor) and isinstance(known, Tensor):
                assert made.dtype == known.dtype, node
                assert made.dim() == known.dim(), node
                for size, claimed in zip(made.shape, known.shape, strict=True):
                    assert not isinstance(claimed, int) or claimed == size, (node, made.shape, known.shape)
                    open_ = set() if isinstance(claimed, int) else {str(s) for s in claimed.node.expr.free_symbols}
                    assert open_ <= symbols, (node, known.shape)
            return made

    with torch.no_grad():
        Checked(graph).run(*inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_keeping_every_token_is_bit_identical(name: str, form: str) -> None:
    graph, inputs = graph_of(name), feeds(name)
    reduce(graph, [Cut(0, TOKENS, Scored(in_order)), Cut(1, TOKENS, "even")], form=form)
    assert torch.equal(run(graph, inputs)[0], run(graph_of(name), inputs)[0])


@pytest.mark.parametrize("name", ["encoder: fused", "torch: post masked"])
def test_dropping_tokens_is_not(name: str) -> None:
    graph, inputs = graph_of(name), feeds(name)
    cut(graph, TOKENS - 2)
    assert not torch.equal(run(graph, inputs)[0], run(graph_of(name), inputs)[0])


@pytest.mark.parametrize("name", MODELS)
def test_all_tokens_in_another_order_give_the_same_answer(name: str) -> None:
    """Masks, tables and tokens are put into one order of the sample's own: one left behind would change the answer."""
    graph, inputs = graph_of(name), feeds(name)
    (before,) = run(graph, inputs)
    cut(graph, TOKENS, method=Scored(by_channel))
    assert apart(before, run(graph, inputs)[0]) < REORDERED


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_right_behind_the_cuts(name: str) -> None:
    graph = graph_of(name)
    done = cut(graph, 5, 3, method=Scored(by_channel))
    shapes_are_true(graph, feeds(name))
    shapes_are_true(graph, feeds(name, count=2))
    assert [(d.before, d.after) for d in done] == [(6, 5), (5, 3)]
    residuals = [s.tokens for s in sites(graph)]
    assert residuals[:2] == [6, 5]
    assert all(r == 3 for r in residuals[2:])


def test_a_shape_that_is_not_true_is_noticed() -> None:
    graph = graph_of("encoder: fused")
    cut(graph, 4)
    linear = next(n for n in graph.graph.nodes if kind(n) == "linear")
    linear.meta["val"] = linear.meta["val"].new_empty(5, 4, 32)
    with pytest.raises(AssertionError):
        shapes_are_true(graph, feeds("encoder: fused"))


@given(name=st.sampled_from(MODELS), keep=st.tuples(st.integers(2, 6), st.integers(2, 6)), seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_both_forms_give_the_same_bits(name: str, keep: tuple[int, int], seed: int) -> None:
    inputs, answers = feeds(name, seed=seed), []
    for form in FORMS:
        graph = graph_of(name)
        cuts = [Cut(0, max(keep), Scored(by_channel)), Cut(1, min(keep), "random")]
        reduce(graph, cuts, form=form, seed=seed)
        answers.append(run(graph, inputs)[0])
    assert torch.equal(*answers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", MASKS)
def test_without_its_padding_a_batch_gives_the_same_answer(mask: str, form: str) -> None:
    """Half of the tokens are padding in every sample; they have the lowest scores, so only they go."""
    keep = (torch.arange(TOKENS) < 3).long().expand(4, -1)
    score = torch.arange(TOKENS, 0, -1).float()

    def padding_last(build, site):
        return build.call(torch.ops.aten.add.Tensor, level(build, site), build.constant("order", score))

    graph, inputs = graph_of(f"masked: {mask}"), (tokens(), keep)
    (before,) = run(graph, inputs)
    cut(graph, 3, method=Scored(padding_last), form=form)
    assert apart(before, run(graph, inputs)[0]) < REORDERED
    (other,) = run(graph_of(f"masked: {mask}"), (tokens(), padding()))
    assert apart(before, other) > 0.01  # the mask matters to this model


@pytest.mark.parametrize("form", FORMS)
def test_ties_go_to_the_lower_index(form: str) -> None:
    name = "encoder: fused, pooled"
    tied, fixed = graph_of(name), graph_of(name)
    cut(tied, 4, method=Scored(level), form=form)

    class First(Scored):
        def reduction(self, build, site, request):
            return Fixed(range(request.keep), site.tokens, request.form)

    cut(fixed, 4, method=First(level), form=form)
    assert torch.equal(run(tied, feeds(name))[0], run(fixed, feeds(name))[0])
    cut(other := graph_of(name), 4, method=Scored(by_channel), form=form)
    assert not torch.equal(run(tied, feeds(name))[0], run(other, feeds(name))[0])


def test_the_matmul_form_has_no_topk_gather_or_scatter() -> None:
    def used(form: str) -> set[str]:
        graph = graph_of("masked: infinite")
        cut(graph, 4, 3, method=Scored(by_channel), form=form)
        return {kind(n) for n in graph.graph.nodes} & {"topk", "sort", "gather", "scatter"}

    assert used("rank") == set()
    assert used("topk") == {"sort", "gather"}


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ((1,), "leaves no token"),
        ((0,), "leaves no token"),
        ((7,), "there are 6 tokens"),
        ((4, 5), "there are 4 tokens"),
    ],
)
def test_impossible_counts_are_refused(keep: tuple[int, ...], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        cut(graph_of("encoder: fused"), *keep)
    cut(graph_of("encoder: fused"), 2, 2)


def test_unknown_blocks_forms_and_methods_are_refused() -> None:
    with pytest.raises(CalibrationError, match="there is no block 2"):
        cut(graph_of("encoder: fused"), 4, 4, 4)
    with pytest.raises(CalibrationError, match="there is no form 'sorted'"):
        cut(graph_of("encoder: fused"), 4, form="sorted")
    with pytest.raises(CalibrationError, match="there is no token method 'best'"):
        cut(graph_of("encoder: fused"), 4, method="best")
    assert {"even", "random"} <= set(methods.names())
