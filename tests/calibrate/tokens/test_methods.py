"""Each method keeps the tokens that its paper says, computed here a second time from the model's queries and keys."""

import math

import pytest
import torch
from encoders import HEADS, TOKENS, WIDTH
from token_models import IDS, KEEP, MASKS, ROUNDING, attention_of, cut, feeds, graph_of, is_close, text, values
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate.errors import CalibrationError
from calibrate.graph import clone, operator_name, run
from calibrate.tokens.attention import sites
from calibrate.tokens.insert import Cut, Done, reduce
from calibrate.tokens.methods import even, names
from calibrate.tokens.selection import FORMS

IMAGE, POST = "encoder: fused, scale", "encoder: by hand, post, pooled"
ALL = ("even", "random", "evit", "importance", "zero_tprune")


def kept_by(name: str, method: str, keep: int, form: str, **options: object) -> Tensor:
    """What block 0 passes on [B, keep, C]."""
    graph, inputs = graph_of(name), feeds(name)
    (done,) = reduce(graph, [Cut(0, keep, method, options)], form=form)
    return values(graph, inputs, done.kept)[0]


def best(score: Tensor, residual: Tensor, keep: int) -> Tensor:
    """The class token, then the others of highest score in its order."""
    order = score[:, 1:].argsort(1, descending=True)[:, : keep - 1] + 1
    index = torch.cat([torch.zeros_like(order[:, :1]), order], 1)
    return residual.gather(1, index[:, :, None].expand(-1, -1, residual.shape[2]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [IMAGE, POST])
def test_evit_keeps_what_the_class_token_attends_to(name: str, form: str) -> None:
    table, _, residual = attention_of(name, feeds(name))
    score = table[:, :, 0].mean(1)
    kept = kept_by(name, "evit", 4, form, fuse=False)
    assert is_close(kept, best(score, residual, 4))
    assert not is_close(kept, best(-score, residual, 4))


@pytest.mark.parametrize("form", FORMS)
def test_evit_fuses_the_rest_by_its_attention(form: str) -> None:
    table, _, residual = attention_of(IMAGE, feeds(IMAGE))
    score = table[:, :, 0].mean(1)
    kept = kept_by(IMAGE, "evit", 4, form)
    assert is_close(kept[:, :3], best(score, residual, 3))
    gone = score[:, 1:].argsort(1, descending=True)[:, 2:] + 1
    weight = score.gather(1, gone)
    rows = residual.gather(1, gone[:, :, None].expand(-1, -1, WIDTH))
    fused = (rows * (weight / weight.sum(1, keepdim=True))[:, :, None]).sum(1)
    assert is_close(kept[:, 3], fused)
    assert not is_close(kept[:, 3], rows.mean(1))


@pytest.mark.parametrize("name", [IMAGE, "encoder: by hand"])
def test_evit_counts_the_fused_token_as_often_as_it_stands_for(name: str) -> None:
    """Attention behind the cut is softmax(q kᵀ + log s) v, computed here a second time (arXiv 2210.09461)."""
    inputs, made = feeds(name), []
    for proportional in (True, False):
        graph = graph_of(name)
        reduce(graph, [Cut(0, 4, "evit", {"proportional": proportional})])
        site = sites(graph)[1]
        attended = site.node if site.probabilities is None else next(iter(site.probabilities.users))
        query, key, value, out = values(graph, inputs, site.query, site.key, site.value, attended)
        scores = query @ key.transpose(-1, -2) / (3.0 if "by hand" in name else math.sqrt(query.shape[-1]))
        sizes = torch.tensor([1.0, 1.0, 1.0, 3.0])  # of six tokens three stay as they are, three are one
        made.append(is_close(out, (scores + sizes.log()).softmax(-1) @ value))
        assert is_close(out, scores.softmax(-1) @ value) != proportional
        logs = [n.args[0] for n in graph.graph.nodes if operator_name(n) == "log"]
        assert len(logs) == proportional
        if proportional:
            assert torch.equal(values(graph, inputs, *logs)[0], sizes.view(1, 4)), "the same for every sample"
    assert made == [True, False]


def test_evit_refuses_what_has_no_class_token_or_no_room_for_the_rest() -> None:
    with pytest.raises(CalibrationError, match="this model has none"):
        cut(graph_of(POST), 4, method="evit", protected=0)
    with pytest.raises(CalibrationError, match="one of them is the fused rest"):
        cut(graph_of(IMAGE), 2, method="evit")
    with pytest.raises(CalibrationError, match="the fused token has no place"):
        cut(graph_of("masked: bool row"), 4, method="evit")
    with pytest.raises(CalibrationError, match="has no option 'merge'"):
        reduce(graph_of(IMAGE), [Cut(0, 4, "evit", {"merge": True})])


@pytest.mark.parametrize("form", FORMS)
def test_importance_keeps_what_all_tokens_attend_to(form: str) -> None:
    table, _, residual = attention_of(POST, feeds(POST))
    kept = kept_by(POST, "importance", 3, form)
    assert is_close(kept, best(table.sum((1, 2)), residual, 3))
    assert not is_close(kept, best(table.sum((1, 3)), residual, 3))


@pytest.mark.parametrize("method", ["importance", "zero_tprune"])
@pytest.mark.parametrize("mask", MASKS)
def test_padding_is_the_first_to_go(mask: str, method: str) -> None:
    """Every sample has three tokens of padding: dropping three changes no answer, dropping four does."""
    name = f"masked: {mask}"
    inputs = (feeds(name)[0], (torch.arange(TOKENS) % 2 == 0).long().expand(5, -1))
    (before,) = run(graph_of(name), inputs)
    answers = []
    for keep in (3, 2):
        graph = graph_of(name)
        cut(graph, keep, method=method)
        answers.append(run(graph, inputs)[0])
    assert is_close(answers[0], before)
    assert not is_close(answers[1], before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("told", [True, False])
def test_separators_stay_through_every_cut(told: bool, form: str) -> None:
    """The first sample has two, the tokens that are attended to the least; both outlive two cuts, to three tokens."""
    ids, separator = _least_attended(text())
    graph, options = clone(text()), {"separator": separator if told else None}
    done = reduce(graph, [Cut(b, k, "importance", options) for b, k in ((0, 4), (1, 3))], form=form)
    (before,) = values(text(), (ids, KEEP), sites(text())[0].residual)
    kept, later, last = values(graph, (ids, KEEP), done[0].kept, sites(graph)[1].residual, done[1].kept)
    assert is_close(kept[0, 1:3], before[0][ids[0] == separator]) == told
    assert torch.equal(last[0, 1:], later[0, 1:3]) == told


def _least_attended(graph: GraphModule) -> tuple[Tensor, int]:
    """Sentences whose separators receive the least attention, and the separator."""
    site = sites(graph)[0]
    for separator in range(9, 20):
        ids = torch.where(IDS == 9, separator, IDS)
        query, key = values(graph, (ids, KEEP), site.query, site.key)
        received = (query[0] @ key[0].transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1).sum((0, 1))
        if set(received[1:].argsort()[:2].tolist()) == {1, 4}:
            return ids, separator
    raise AssertionError("no id of these is attended to the least")


def test_a_separator_without_ids_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no input of the model is the ids"):
        reduce(graph_of(IMAGE), [Cut(0, 4, "importance", {"separator": 2})])


def page_rank(table: Tensor, rounds: int, alive: Tensor, low: float, high: float) -> Tensor:
    start = torch.ones(TOKENS)
    start[0] = math.sqrt(TOKENS)
    joined = []
    for sample in range(len(table)):
        heads = []
        for a in table[sample]:
            s = start * alive[sample]
            for _ in range(rounds):
                s = (a.T @ s) * alive[sample]
            heads.append(s / s.sum() * TOKENS)
        says = [h for h in heads if low <= float((h - 1).square().mean()) <= high] or heads
        joined.append(torch.stack(says).square().mean(0).sqrt())
    return torch.stack(joined)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bounds", [(0.01, 0.7), (0.02, 0.05), (5.0, 6.0)])
def test_zero_tprune_ranks_by_votes(bounds: tuple[float, float], form: str) -> None:
    table, _, residual = attention_of(IMAGE, feeds(IMAGE))
    score = page_rank(table, 8, torch.ones(5, TOKENS), *bounds)
    kept = kept_by(IMAGE, "zero_tprune", 4, form, similar=0, low=bounds[0], high=bounds[1])
    assert is_close(kept, best(score, residual, 4))
    assert not is_close(kept, best(-score, residual, 4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("keep", "share", "alike"), [(4, 0.5, 1), (4, None, 2), (5, None, 1), (5, 0.4, 0)])
def test_zero_tprune_drops_what_is_alike_first(keep: int, share: float | None, alike: int, form: str) -> None:
    """`similar` is the share of what goes, three quarters where nothing is said, rounded to whole tokens."""
    table, key, residual = attention_of(IMAGE, feeds(IMAGE))
    order = page_rank(table, 1, torch.ones(5, TOKENS), 0.01, 0.7)[:, 1:].argsort(1, descending=True) + 1
    unit = nn.functional.normalize(key.mean(1), dim=-1)
    alive = torch.ones(5, TOKENS)
    for i in range(5):
        upper, lower = order[i, :3], order[i, 3:]
        likeness = (unit[i, lower] @ unit[i, upper].T).amax(1)
        alive[i, lower[likeness.argsort(descending=True)[:alike]]] = 0
    score = torch.where(alive > 0, page_rank(table, 8, alive, 0.01, 0.7), -1.0)
    options = {} if share is None else {"similar": share}
    kept = kept_by(IMAGE, "zero_tprune", keep, form, **options)
    assert is_close(kept, best(score, residual, keep))
    plain = best(page_rank(table, 8, torch.ones(5, TOKENS), 0.01, 0.7), residual, keep)
    assert is_close(kept, plain) == (alike == 0)


@pytest.mark.parametrize("method", ALL)
def test_both_forms_of_a_method_give_the_same_bits(method: str) -> None:
    def answer(form: str) -> Tensor:
        graph = graph_of(IMAGE)
        cut(graph, 5, 4, method=method, form=form)
        return run(graph, feeds(IMAGE))[0]

    one, other = answer("topk"), answer("rank")
    # EViT's fused token is a sum, of what is dropped or of all with zeros.
    assert is_close(one, other) if method == "evit" else torch.equal(one, other)
    assert not torch.equal(other, run(graph_of(IMAGE), feeds(IMAGE))[0])


@pytest.mark.parametrize("method", ALL)
def test_keeping_all_with_a_method_changes_no_answer(method: str) -> None:
    """Tokens come in the order of their scores, and attention is written out: sums round differently."""
    graph = graph_of(IMAGE)
    done: list[Done] = cut(graph, TOKENS, TOKENS, method=method)
    assert [d.after for d in done] == [TOKENS, TOKENS]
    (before,), (after,) = run(graph_of(IMAGE), feeds(IMAGE)), run(graph, feeds(IMAGE))
    assert float((before - after).abs().max() / before.abs().max()) < 2 * ROUNDING


def test_even_is_evenly_spaced_and_the_registry_lists_files() -> None:
    assert set(ALL) <= set(names())
    site = sites(graph_of(IMAGE))[0]
    request = type("Request", (), {"keep": 3, "protected": 1, "form": "topk"})
    assert even.METHOD.reduction(None, site, request).indices == [0, 2, 4]
