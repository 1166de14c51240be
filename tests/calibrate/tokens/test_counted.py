"""Pruned tokens are counted with what they are most like: sizes against a loop over tokens, and what they weigh."""

import pytest
import torch
from encoders import TOKENS
from token_models import attention_of, feeds, graph_of, values
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate.graph import operator_name, run
from calibrate.tokens.insert import Cut, reduce
from calibrate.tokens.merging import ALIKE
from calibrate.tokens.selection import FORMS

IMAGE, MASKED = "encoder: fused, scale", "masked: infinite"
METHODS = ("importance", "zero_tprune")
ON, OFF = {"proportional": True}, {"proportional": False}


def sizes_in(graph: GraphModule, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """How many tokens each of those that stay is counted as, [B, K], as attention reads them: cut by cut."""
    logs = dict.fromkeys(n.args[0] for n in graph.graph.nodes if operator_name(n) == "log")
    return values(graph, inputs, *logs)


def by_hand(kept: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """The sizes of one sample's tokens: `kept` [K] places in order, keys [H, N, d], `seen` [N] no padding."""
    unit = nn.functional.normalize(key.mean(0), dim=-1)
    likeness = ((unit @ unit.T) / ALIKE).round()
    stays = kept.tolist()
    takers = [i for i in range(1, TOKENS) if i in stays and seen[i]]
    size = dict.fromkeys(stays, 1.0)
    for i in range(TOKENS):
        if i not in stays and seen[i]:
            size[max(takers, key=lambda j: (float(likeness[i, j]), -j))] += 1
    return torch.tensor([size[i] for i in stays])


def visible(name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    return inputs[1] > 0 if len(inputs) > 1 else torch.ones(len(inputs[0]), TOKENS, dtype=torch.bool)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [IMAGE, MASKED])
def test_what_goes_is_counted_with_what_it_is_most_like(name: str, method: str, form: str) -> None:
    inputs, seen = feeds(name), visible(name, feeds(name))
    _, key, _ = attention_of(name, inputs)
    for keep in (3, 4):
        graph = graph_of(name)
        reduce(graph, [Cut(0, keep, method, ON)], form=form, traced=True)
        kept = run(graph, inputs)[1].argmax(-1)
        (sizes,) = sizes_in(graph, inputs)
        wanted = torch.stack([by_hand(k, q, s) for k, q, s in zip(kept, key, seen, strict=True)])
        assert torch.equal(sizes, wanted)
        assert not torch.equal(sizes, torch.ones_like(sizes))  # something went, and to different places
        # every token that is no padding is counted once
        counted = (sizes * seen.gather(1, kept)).sum(1)
        assert torch.equal(counted, seen.sum(1).float())


def test_padding_adds_nothing_and_the_class_token_stays_single() -> None:
    inputs = feeds(MASKED)[0], (torch.arange(TOKENS) < 3).long().expand(5, -1)
    graph = graph_of(MASKED)
    reduce(graph, [Cut(0, 3, "importance", ON)])
    assert torch.equal(sizes_in(graph, inputs)[0], torch.ones(5, 3))  # only padding went
    everything = feeds(MASKED)[0], torch.ones(5, TOKENS).long()
    (sizes,) = sizes_in(graph, everything)
    assert torch.equal(sizes[:, 0], torch.ones(5))
    assert torch.equal(sizes.sum(1), torch.full((5,), float(TOKENS)))


def test_sizes_are_handed_on_from_cut_to_cut() -> None:
    name = "biased: by hand"
    graph = graph_of(name)
    reduce(graph, [Cut(0, 4, "importance", ON), Cut(1, 3, "importance", ON)])
    one, two = sizes_in(graph, feeds(name))
    assert (one.shape, two.shape) == ((5, 4), (5, 3))
    for sizes in (one, two):
        assert torch.equal(sizes.sum(1), torch.full((5,), float(TOKENS)))


@pytest.mark.parametrize("method", METHODS)
def test_without_proportional_the_same_tokens_stay_and_count_once(method: str) -> None:
    inputs, answers, kept = feeds(IMAGE), [], []
    for options in (OFF, ON):
        graph = graph_of(IMAGE)
        (done,) = reduce(graph, [Cut(0, 4, method, options)])
        kept.append(values(graph, inputs, done.kept)[0])
        answers.append(run(graph, inputs)[0])
        assert bool(sizes_in(graph, inputs)) == options["proportional"]
    assert torch.equal(*kept)
    assert not torch.equal(*answers)


@pytest.mark.parametrize("method", METHODS)
def test_keeping_every_token_counts_nothing(method: str) -> None:
    graph = graph_of(IMAGE)
    reduce(graph, [Cut(0, TOKENS, method, ON)])
    assert sizes_in(graph, feeds(IMAGE)) == []
