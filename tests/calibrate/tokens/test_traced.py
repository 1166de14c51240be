"""Where each token that stays came from: rows of a single one for pruning, weights for what was joined."""

import pytest
import torch
from encoders import TOKENS
from token_models import Scored, by_channel, feeds, graph_of, is_close, values
from torch import Tensor
from torch.fx import GraphModule

from calibrate.graph import run
from calibrate.tokens.attention import sites
from calibrate.tokens.insert import Cut, reduce
from calibrate.tokens.selection import FORMS

NAME = "encoder: fused, scale"
PRUNING = ("even", "importance", "zero_tprune")
JOINING = ("evit", "tome", "mctf")


def traced(method: object, form: str = "topk", name: str = NAME) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """The model cut to 5, then 4 tokens, and what it returns: its own output, then one origin per cut."""
    graph = graph_of(name)
    reduce(graph, [Cut(0, 5, method), Cut(1, 4, method)], form=form, traced=True)
    return graph, run(graph, feeds(name))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", [*PRUNING, *JOINING, "cluster"])
def test_the_models_own_output_is_the_same_to_the_last_bit(method: str, form: str) -> None:
    plain = graph_of(NAME)
    reduce(plain, [Cut(0, 5, method), Cut(1, 4, method)], form=form)
    (own,) = run(plain, feeds(NAME))
    _, (beside, *origins) = traced(method, form)
    assert torch.equal(own, beside)
    assert [tuple(o.shape) for o in origins] in ([(5, 5, TOKENS), (5, 4, TOKENS)], [(1, 5, TOKENS), (1, 4, TOKENS)])


@pytest.mark.parametrize("method", PRUNING)
def test_pruning_gives_each_row_a_single_one_of_its_own(method: str) -> None:
    _, (_, *origins) = traced(method)
    for origin in origins:
        assert ((origin == 0) | (origin == 1)).all()
        assert (origin.sum(-1) == 1).all()
        assert (origin.sum(-2) <= 1).all()  # no token stays twice
        assert (origin[:, 0, 0] == 1).all()  # the class token stays in front
    gone = [(origin.sum(-2) == 0).sum(-1) for origin in origins]
    assert [set(g.tolist()) for g in gone] == [{1}, {2}]
    assert ((origins[0].sum(-2) - origins[1].sum(-2)) >= 0).all()  # what is gone does not come back


@pytest.mark.parametrize("method", JOINING)
def test_what_is_joined_shares_a_row_and_nothing_is_lost(method: str) -> None:
    _, (_, *origins) = traced(method)
    for origin in origins:
        assert torch.allclose(origin.sum(-1), torch.ones(5, origin.shape[1]), atol=1e-6)  # a mean: a few roundings
        assert (origin >= 0).all()
        assert ((origin > 0).sum(-2) == 1).all()  # every token is in one that stays, and in one alone
    assert ((origins[0] > 0).sum(-1) > 1).any()


@pytest.mark.parametrize("method", [Scored(by_channel), *JOINING])
def test_an_origin_says_what_the_tokens_that_stay_are_made_of(method: object) -> None:
    graph = graph_of(NAME)
    (done,) = reduce(graph, [Cut(0, 4, method)], traced=True)
    _, origin = run(graph, feeds(NAME))
    residual, kept = values(graph, feeds(NAME), sites(graph)[0].residual, done.kept)
    assert is_close(origin @ residual, kept)
    assert not is_close(origin.flip(-1) @ residual, kept)


def test_nothing_is_added_where_nothing_was_asked_for() -> None:
    graph = graph_of(NAME)
    (done,) = reduce(graph, [Cut(0, 4, "evit")])
    assert done.origin is None
    assert len(run(graph, feeds(NAME))) == 1
