"""Clusters of tokens, and all tokens put back where a model needs them: exact where nothing was lost, close else."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from encoders import WIDTH
from small_graphs import Made
from token_models import ROUNDING, Layer, captured, cut, graph_of, is_close, twins, values
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate.errors import CalibrationError
from calibrate.graph import clone, operator_name, run
from calibrate.tokens.attention import sites
from calibrate.tokens.insert import Cut, Done, reduce
from calibrate.tokens.methods.cluster import Cluster, Clustered, neighbours
from calibrate.tokens.selection import FORMS

N = 13  # a class token and twelve of a grid of 3 x 4


def samples(count: int = 4, seed: int = 0) -> tuple[Tensor]:
    return (torch.randn(count, N, 8, generator=torch.Generator().manual_seed(seed)),)


def repeated(values_: tuple[int, ...] = (0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4)) -> tuple[Tensor]:
    """Samples of five things: a class token, and runs of three that are the same."""
    return (samples(4, 3)[0][:, list(values_)],)


def grid(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(x)[:, 1:].reshape(-1, 3, 4, 5)


def convolved(m: nn.Module, x: Tensor) -> Tensor:
    return m.c(x[:, 1:].transpose(1, 2).reshape(-1, WIDTH, 3, 4))


# What is behind the blocks, by name: (the head, the layer it needs besides `head`).
HEADS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "a value per token": lambda m, x: m.head(m.norm(x)),
    "a grid and the class token": lambda m, x: (grid(m, m.norm(x)), m.head(x[:, 0])),
    "a convolution over the grid": lambda m, x: convolved(m, m.norm(x)),
    "tokens first": lambda m, x: m.head(x).transpose(0, 1),
}


@cache
def _dense(head: str, parallel: bool = False) -> tuple[GraphModule, nn.Module]:
    torch.manual_seed(0)

    def call(self: nn.Module, x: Tensor) -> object:
        first = self.one(self.embed(x))
        last = self.three(self.two(first))
        if head == "earlier blocks":
            return self.head(first) + self.head(self.norm(last))
        return HEADS[head](self, last)

    layers = {name: Layer(parallel=parallel) for name in ("one", "two", "three")}
    ends = {"norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 5), "c": nn.Conv2d(WIDTH, 5, 3, padding=1)}
    module = Made(call, embed=nn.Linear(8, WIDTH), **layers, **ends)
    return captured(module, *samples()), module


def dense(head: str, parallel: bool = False) -> GraphModule:
    return clone(_dense(head, parallel)[0])


def clustered(graph: GraphModule, *keep: int, protected: int = 1, form: str = "topk", **options: object) -> list[Done]:
    return reduce(graph, [Cut(i, k, "cluster", options) for i, k in enumerate(keep)], protected, form)


def apart(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    assert [o.shape for o in one] == [o.shape for o in other]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other, strict=True))


ALL = (*HEADS, "earlier blocks")


@pytest.mark.parametrize("head", ALL)
def test_keeping_every_token_is_bit_identical(head: str) -> None:
    graph = dense(head)
    clustered(graph, N, N)
    assert all(map(torch.equal, run(graph, samples(5, 9)), run(dense(head), samples(5, 9))))


@pytest.mark.parametrize("head", ALL)
def test_outputs_keep_their_shapes_and_tokens_that_are_the_same_come_back_exactly(head: str) -> None:
    graph = dense(head)
    clustered(graph, 5)
    assert apart(run(dense(head), repeated()), run(graph, repeated())) < ROUNDING
    assert apart(run(dense(head), samples(5, 9)), run(graph, samples(5, 9))) > 0.01
    fewer = dense(head)
    clustered(fewer, 4)
    assert apart(run(dense(head), repeated()), run(fewer, repeated())) > 0.01


def test_a_model_without_a_class_token_and_one_with_a_parallel_mlp_can_be_clustered() -> None:
    inputs = (samples(4, 3)[0][:, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]],)
    graph = dense("a value per token")
    clustered(graph, 4, protected=0)
    assert apart(run(dense("a value per token"), inputs), run(graph, inputs)) < ROUNDING
    graph = dense("a value per token", parallel=True)
    clustered(graph, 5)
    assert apart(run(dense("a value per token", parallel=True), repeated()), run(graph, repeated())) < ROUNDING


def means(x: Tensor, keep: int, rounds: int) -> tuple[Tensor, Tensor]:
    """k-means of one sample behind a class token: (cluster of each token [N], centroids [keep, C])."""
    runs = [[i for i in range(N - 1) if i * (keep - 1) // (N - 1) == k] for k in range(keep - 1)]
    centroids = torch.stack([x[1:][r].mean(0) for r in runs])
    begin = centroids.clone()
    for _ in range(rounds):
        label = torch.stack([(centroids - t).norm(dim=1).argmin() for t in x[1:]])
        centroids = torch.stack(
            [x[1:][label == k].mean(0) if (label == k).any() else begin[k] for k in range(keep - 1)]
        )
    return torch.cat([torch.zeros(1).long(), label + 1]), torch.cat([x[:1], centroids])


@pytest.mark.parametrize("deviation", [True, False])
@pytest.mark.parametrize(("keep", "rounds"), [(4, 3), (8, 1), (12, 2)])
def test_it_computes_what_loops_over_the_samples_do(keep: int, rounds: int, deviation: bool) -> None:
    module, inputs = _dense("a value per token")[1], samples(5, 9)
    graph = dense("a value per token")
    (done,) = clustered(graph, keep, iterations=rounds, deviation=deviation)

    def alone(x: Tensor) -> tuple[Tensor, Tensor]:
        x = module.embed(x[None])
        x = x + module.one.attention(module.one.norm1(x))
        label, kept = means(x[0], keep, rounds)
        sizes = torch.bincount(label, minlength=keep).float()
        y = kept[None] + module.one.mlp(module.one.norm2(kept[None]))
        for layer in (module.two, module.three):
            y = layer(y, sizes.log()[None, None, None])
        whole = x[0] + (y[0] - kept)[label] if deviation else y[0][label]
        return kept, module.head(module.norm(whole))

    with torch.no_grad():
        wanted = [alone(x) for x in inputs[0]]
    (kept,) = values(graph, inputs, done.kept)
    assert is_close(kept, torch.stack([w[0] for w in wanted]))
    assert apart((torch.stack([w[1] for w in wanted]),), run(graph, inputs)) < 2 * ROUNDING
    other = dense("a value per token")
    clustered(other, keep, iterations=rounds, deviation=not deviation)
    assert apart(run(graph, inputs), run(other, inputs)) > 0.01


def test_sizes_add_up_over_two_cuts_and_the_class_token_is_alone_in_front() -> None:
    graph, inputs = dense("a value per token"), samples(5, 9)
    done = clustered(graph, 9, 5)
    assert [(d.before, d.after) for d in done] == [(N, 9), (9, 5)]
    planes = [n.args[0] for n in graph.graph.nodes if operator_name(n) == "log"]
    assert [int(p.meta["val"].shape[1]) for p in planes] == [9, 5]
    sizes = values(graph, inputs, *planes)
    residual, kept = values(graph, inputs, sites(graph)[0].residual, done[0].kept)
    assert is_close(kept[:, 0], residual[:, 0])
    for size in sizes:
        assert torch.allclose(size.sum(1), torch.full((5,), float(N)), atol=1e-4)  # empty ones have 1e-6 each
        assert torch.equal(size[:, 0], torch.ones(5))
    mean = (kept * sizes[0][:, :, None]).sum(1) / N
    assert float((mean - residual.mean(1)).abs().max()) < 1e-4
    assert not is_close(kept.mean(1), residual.mean(1))


def test_clusters_that_nobody_is_in_change_no_answer() -> None:
    """All tokens but the class token are the same: one cluster holds all, three hold none."""
    inputs = (samples()[0][:, [0] + [1] * (N - 1)],)
    graph = dense("a value per token")
    clustered(graph, 5)
    assert apart(run(dense("a value per token"), inputs), run(graph, inputs)) < ROUNDING
    (size,) = {n.args[0] for n in graph.graph.nodes if operator_name(n) == "log"}
    assert int((values(graph, inputs, size)[0] < 0.5).sum()) == 4 * 3


class Chance(Cluster):
    """Clusters drawn by lot, put back in the same way."""

    def reduction(self, build, site, request):
        made = super().reduction(build, site, request)
        drawn = torch.cat([torch.arange(request.keep), torch.randint(1, request.keep, (N - request.keep,))])
        drawn[1:] = drawn[1:][torch.randperm(N - 1)]
        belongs = nn.functional.one_hot(drawn, request.keep).float()
        weights = belongs.T / belongs.sum(0)[:, None]
        return Clustered(
            build.constant("by_lot", weights[None]), made.size, request.keep, build.constant("lot", belongs), made.whole
        )


def planted() -> tuple[Tensor]:
    """Samples of a class token and twelve tokens that are four things, in any order, with a little noise."""
    torch.manual_seed(1)
    things = torch.randn(16, 4, 8).gather(1, torch.randint(0, 4, (16, N - 1, 1)).expand(-1, -1, 8))
    return (torch.cat([torch.randn(16, 1, 8), things + 0.02 * torch.randn(16, N - 1, 8)], 1),)


def test_it_beats_chance_where_tokens_have_clusters() -> None:
    (before,), errors = run(dense("a value per token"), planted()), {}
    for name, method in (("cluster", "cluster"), ("chance", Chance())):
        graph = dense("a value per token")
        cut(graph, 7, method=method)
        errors[name] = float((run(graph, planted())[0] - before).norm() / before.norm())
    assert errors["cluster"] < 0.5 * errors["chance"]


def test_tokens_may_be_put_back_behind_an_earlier_block() -> None:
    graph = dense("a value per token")
    clustered(graph, 5, until=1)
    assert [int(s.key.meta["val"].shape[-2]) for s in sites(graph)] == [N, 5, N]
    assert apart(run(dense("a value per token"), repeated()), run(graph, repeated())) < ROUNDING
    late = dense("a value per token")
    clustered(late, 5)
    assert [int(s.key.meta["val"].shape[-2]) for s in sites(late)] == [N, 5, 5]


def test_a_model_that_pools_gets_none_back() -> None:
    """Means over clusters are weighted by size, so tokens that are the same change no answer."""
    graph, inputs = twins(False), (samples()[0][:, [0, 1, 1, 1, 2, 2]],)
    (before,) = run(graph, inputs)
    clustered(graph, 3)
    assert is_close(run(graph, inputs)[0], before)
    (mean,) = [n for n in graph.graph.nodes if operator_name(n) == "mean" and n.meta["val"].shape[-1] == WIDTH]
    assert mean.args[0].meta["val"].shape[1] == 3


def test_both_forms_are_one_without_sort_gather_or_scatter() -> None:
    answers = []
    for form in FORMS:
        graph = dense("a value per token")
        clustered(graph, 9, 5, form=form)
        names = {operator_name(n) for n in graph.graph.nodes}
        assert not names & {"topk", "sort", "argsort", "argmax", "gather", "scatter", "index_select"}
        answers.append(run(graph, samples(5, 9))[0])
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], run(dense("a value per token"), samples(5, 9))[0])


def test_neighbours_are_runs_of_nearly_equal_length() -> None:
    made = neighbours(8, 4, 1)
    assert made.tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]
    assert torch.equal(neighbours(8, 8, 1), torch.eye(8))


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        ([Cut(0, 5, "tome")], "recipe cluster-tokens"),
        ([Cut(0, 9, "cluster"), Cut(1, 7, "tome")], "use cluster for every cut"),
        ([Cut(0, 9, "cluster", {"until": 1}), Cut(1, 7, "cluster")], "the same option 'until'"),
        ([Cut(1, 9, "cluster", {"until": 0})], "from 1 .the last cut. to 2"),
        ([Cut(0, 9, "cluster", {"until": 3})], "from 0 .the last cut. to 2"),
        ([Cut(0, 9, "cluster", {"iterations": 0})], "at least one round"),
        ([Cut(4, 9, "cluster")], "there is no block 4"),
    ],
)
def test_cuts_that_cannot_be_undone_are_refused(cuts: list[Cut], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        reduce(dense("a value per token"), cuts)


def test_models_with_masks_or_with_tokens_in_another_layout_are_refused() -> None:
    with pytest.raises(CalibrationError, match="a merged token has no place"):
        cut(graph_of("masked: bool row"), 4, method="cluster")

    def call(self: nn.Module, x: Tensor) -> object:
        turned = self.one(self.embed(x)).transpose(1, 2)
        return self.two(turned.transpose(1, 2)), turned

    torch.manual_seed(0)
    module = Made(call, embed=nn.Linear(8, WIDTH), one=Layer(), two=Layer())
    with pytest.raises(CalibrationError, match=r"is no value \[batch, tokens, channels\]"):
        cut(captured(module, *samples()), 5, method="cluster")
