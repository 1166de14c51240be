"""Multi-criteria fusion: what is fused and how is what loops over the paper's equations say."""

import pytest
import torch
from encoders import TOKENS, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from token_models import PAIRED, ROUNDING, attention_of, cut, feeds, graph_of, is_close, twins, values
from torch import Tensor, nn

from calibrate.errors import CalibrationError
from calibrate.graph import clone, operator_name, run
from calibrate.tokens.insert import Cut, reduce
from calibrate.tokens.selection import FORMS

NAME = "encoder: fused, scale"
TAU = {"similarity": 1.0, "information": 20.0, "size": 40.0}


def matching(edges: Tensor, sources: list[int], targets: list[int], gone: int) -> dict[int, int]:
    """Each source's best target, for the `gone` sources of highest edges."""
    best = {i: max(targets, key=lambda j: float(edges[i, j])) for i in sources}
    order = sorted(sources, key=lambda i: -float(edges[i, best[i]]))
    return {i: best[i] for i in order[:gone]}


def by_the_paper(
    table: Tensor, key: Tensor, residual: Tensor, gone: int, tau: dict[str, float], both: bool, attentive: bool
) -> tuple[Tensor, Tensor]:
    """(tokens, sizes) of one sample of tokens that stand for themselves, behind a class token."""
    attention = table.mean((0, 1))
    scarce = attention.min() / attention
    unit = nn.functional.normalize(key.mean(0), dim=-1)
    edges = ((unit @ unit.T + 1) / 2) ** (1 / tau["similarity"]) if tau["similarity"] else torch.ones(TOKENS, TOKENS)
    if tau["information"]:
        edges = edges * (scarce[:, None] * scarce[None]) ** (1 / tau["information"])
    a, b = list(range(1, TOKENS, 2)), list(range(2, TOKENS, 2))
    half = gone // 2 if both else gone
    into = matching(edges, a, b, half)
    if both:
        into |= matching(edges, b, [i for i in a if i not in into], gone - half)

    def ends(i: int) -> int:
        return ends(into[i]) if i in into else i

    weight = attention if attentive else torch.ones(TOKENS)
    rows, sizes = [], []
    for k in (k for k in range(TOKENS) if k not in into):
        parts = [i for i in range(TOKENS) if ends(i) == k]
        rows.append((residual[parts] * weight[parts, None]).sum(0) / weight[parts].sum())
        sizes.append(float(len(parts)))
    return torch.stack(rows), torch.tensor(sizes)


def fused(gone: int, inputs: tuple[Tensor, ...], form: str = "topk", **options: object) -> Tensor:
    """What block 0 passes on."""
    graph = graph_of(NAME)
    (done,) = reduce(graph, [Cut(0, TOKENS - gone, "mctf", options)], form=form)
    return values(graph, inputs, done.kept)[0]


@pytest.mark.parametrize("left_out", [None, "similarity", "information"])
@pytest.mark.parametrize("attentive", [True, False])
@pytest.mark.parametrize(("gone", "both"), [(1, True), (2, True), (3, True), (1, False), (3, False)])
def test_what_is_fused_is_what_the_paper_says(gone: int, both: bool, attentive: bool, left_out: str | None) -> None:
    inputs = feeds(NAME)
    tau = {name: 0.0 if name == left_out else 3.0 * value for name, value in TAU.items()}
    samples = list(zip(*attention_of(NAME, inputs), strict=True))
    kept = fused(gone, inputs, both_ways=both, attentive=attentive, **tau)
    wanted = [by_the_paper(*sample, gone, tau, both, attentive) for sample in samples]
    assert is_close(kept, torch.stack([w[0] for w in wanted]))
    other = [by_the_paper(*sample, gone, tau, both, not attentive) for sample in samples]
    assert not is_close(kept, torch.stack([w[0] for w in other]))


def test_each_criterion_changes_what_is_fused() -> None:
    inputs = feeds(NAME, 16)
    plain = fused(2, inputs)
    assert not is_close(plain, fused(2, inputs, both_ways=True))
    assert not is_close(plain, fused(2, inputs, similarity=0.0))
    assert not is_close(plain, fused(2, inputs, information=0.1))


@given(seed=st.integers(0, 999), gone=st.integers(1, 3), both=st.booleans())
@settings(max_examples=6, deadline=None)
def test_sizes_add_up_and_the_mean_of_all_tokens_stays(seed: int, gone: int, both: bool) -> None:
    inputs = (tokens(4, seed),)
    samples = list(zip(*attention_of(NAME, inputs), strict=True))
    kept = fused(gone, inputs, both_ways=both, attentive=False)
    sizes = torch.stack([by_the_paper(*s, gone, TAU, both, False)[1] for s in samples])
    residual = torch.stack([s[2] for s in samples])
    assert torch.equal(sizes.sum(1), torch.full((4,), float(TOKENS)))
    assert is_close((kept * sizes[:, :, None]).sum(1) / TOKENS, residual.mean(1))
    assert not is_close(kept.mean(1), residual.mean(1))
    assert is_close(kept[:, 0], residual[:, 0])  # the class token, alone and in front


def test_tokens_that_stand_for_few_are_fused_first() -> None:
    """Of two cuts by one token each, the second spares what the first has fused when size is all that counts."""

    def parts(**options: float) -> Tensor:
        graph = graph_of(NAME)
        done = reduce(graph, [Cut(0, 5, "mctf"), Cut(1, 4, "mctf", options)], traced=True)
        assert [(d.before, d.after) for d in done] == [(6, 5), (5, 4)]
        counts = (values(graph, feeds(NAME, 16), done[1].origin)[0] > 0).sum(-1)
        assert torch.equal(counts.sum(1), torch.full((16,), TOKENS))
        assert torch.equal(counts[:, 0], torch.ones(16).long())
        return counts

    assert int(parts(similarity=0.0, information=0.0).max()) == 2
    assert int(parts(size=0.0).max()) == 3


@pytest.mark.parametrize("both", [True, False])
def test_fusing_tokens_that_are_the_same_changes_no_answer(both: bool) -> None:
    graph = twins(False)
    (before,) = run(graph, PAIRED)
    merged, unweighted = clone(graph), clone(graph)
    reduce(merged, [Cut(0, 4, "mctf", {"both_ways": both})])
    reduce(unweighted, [Cut(0, 4, "mctf", {"both_ways": both, "proportional": False})])
    assert float((run(merged, PAIRED)[0] - before).abs().max() / before.abs().max()) < ROUNDING
    assert not is_close(run(unweighted, PAIRED)[0], before)


def test_both_forms_answer_alike_and_sort_ranks_alone() -> None:
    answers = []
    for form in FORMS:
        graph = graph_of(NAME)
        cut(graph, 4, 3, method="mctf", form=form)
        used = {operator_name(n) for n in graph.graph.nodes} & {"topk", "sort", "argsort", "gather", "scatter"}
        assert used == ({"sort"} if form == "topk" else set())
        answers.append(run(graph, feeds(NAME))[0])
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], run(graph_of(NAME), feeds(NAME))[0])


def test_fusing_none_changes_no_answer() -> None:
    """The attention before is written out as products and a softmax, which round differently."""
    graph = graph_of(NAME)
    cut(graph, TOKENS, TOKENS, method="mctf")
    (before,), (after,) = run(graph_of(NAME), feeds(NAME)), run(graph, feeds(NAME))
    assert float((before - after).abs().max() / before.abs().max()) < 2 * ROUNDING


def planted() -> tuple[Tensor]:
    """Samples of six tokens: a class token, and five that are two things with a little noise."""
    torch.manual_seed(1)
    things = torch.randn(32, 2, 8).gather(1, torch.randint(0, 2, (32, 5, 1)).expand(-1, -1, 8))
    return (torch.cat([torch.randn(32, 1, 8), things + 0.02 * torch.randn(32, 5, 8)], 1),)


def test_it_beats_chance_where_tokens_are_alike() -> None:
    graph, inputs = twins(False), planted()
    (before,) = run(graph, inputs)

    def error(method: str) -> float:
        less = clone(graph)
        cut(less, 4, method=method)
        return float((run(less, inputs)[0] - before).norm() / before.norm())

    assert error("mctf") < 0.5 * error("random")


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(CalibrationError, match="at most half of the tokens"):
        cut(graph_of(NAME), 2, method="mctf")
    for name in ("masked: bool row", "masked: added by hand", "biased: by hand"):
        with pytest.raises(CalibrationError, match="a merged token has no place"):
            cut(graph_of(name), 4, method="mctf")
    with pytest.raises(CalibrationError, match="temperatures of 0 or more"):
        reduce(graph_of(NAME), [Cut(0, 5, "mctf", {"size": -1})])
