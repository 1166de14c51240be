"""Super tokens: sizes that sum to all tokens, soft means as computed by hand, and tokens that come back."""

import pytest
import torch
from encoders import WIDTH
from test_cluster import ALL, N, apart, dense, planted, repeated, samples
from token_models import ROUNDING, cut, graph_of, is_close, values
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate.errors import CalibrationError
from calibrate.graph import operator_name, run
from calibrate.tokens.attention import sites
from calibrate.tokens.insert import Cut, Done, reduce
from calibrate.tokens.methods.cluster import neighbours
from calibrate.tokens.selection import FORMS
from calibrate.tokens.trained import marked, write

HEAD = "a value per token"


def sampled(graph: GraphModule, *keep: int, form: str = "topk", **options: object) -> list[Done]:
    return reduce(graph, [Cut(i, k, "super_tokens", options) for i, k in enumerate(keep)], 1, form)


@pytest.mark.parametrize("head", ALL)
def test_keeping_every_token_is_bit_identical(head: str) -> None:
    graph = dense(head)
    sampled(graph, N, N)
    assert all(map(torch.equal, run(graph, samples(5, 9)), run(dense(head), samples(5, 9))))


@pytest.mark.parametrize("head", ALL)
def test_tokens_that_are_the_same_come_back_the_same(head: str) -> None:
    """So hard an association is one thing to each, but for what float32 loses in distances times a thousand."""
    graph, fewer = dense(head), dense(head)
    sampled(graph, 5, sharpness=1000.0)
    assert apart(run(dense(head), repeated()), run(graph, repeated())) < 1e-3
    sampled(fewer, 4, sharpness=1000.0)
    assert apart(run(dense(head), repeated()), run(fewer, repeated())) > 0.01


def by_hand(x: Tensor, keep: int, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(association [N, K], super tokens [K, C], sizes [K]) of one sample behind a class token."""
    u = nn.functional.layer_norm(x, (WIDTH,))
    runs = neighbours(N, keep, 1)
    centroids = (runs / runs.sum(1, keepdim=True)) @ u
    belongs = torch.zeros(N, keep)
    belongs[0, 0] = 1
    for i in range(1, N):
        far = torch.stack([(scale * (u[i] - c).square()).sum() / (2 * WIDTH) for c in centroids[1:]])
        belongs[i, 1:] = torch.softmax(-far, 0)
    size = belongs.sum(0)
    return belongs, (belongs / size).T @ x, size


@pytest.mark.parametrize(("keep", "sharpness"), [(4, 32.0), (8, 4.0)])
def test_it_computes_what_loops_over_the_tokens_do(keep: int, sharpness: float) -> None:
    graph, inputs = dense(HEAD), samples(5, 9)
    (done,) = sampled(graph, keep, sharpness=sharpness)
    (name,) = marked(graph)
    scale = sharpness * (0.5 + torch.rand(1, 1, WIDTH, generator=torch.Generator().manual_seed(1)))
    write(graph, {name: scale})
    (size,) = {n.args[0] for n in graph.graph.nodes if operator_name(n) == "log"}
    residual, kept, sizes = values(graph, inputs, sites(graph)[0].residual, done.kept, size)
    wanted = [by_hand(x, keep, scale.flatten()) for x in residual]
    # float32 distances times the sharpness, through an exponential
    assert torch.allclose(kept, torch.stack([w[1] for w in wanted]), atol=1e-3)
    assert torch.allclose(sizes, torch.stack([w[2] for w in wanted]), atol=1e-3)
    untrained = [by_hand(x, keep, torch.full((WIDTH,), sharpness)) for x in residual]
    assert not torch.allclose(kept, torch.stack([w[1] for w in untrained]), atol=1e-3)


@pytest.mark.parametrize("sharpness", [1.0, 32.0, 1000.0])
def test_sizes_sum_to_all_tokens_over_two_cuts(sharpness: float) -> None:
    graph, inputs = dense(HEAD), samples(5, 9)
    done = sampled(graph, 9, 5, sharpness=sharpness)
    planes = [n.args[0] for n in graph.graph.nodes if operator_name(n) == "log"]
    residual, kept, *sizes = values(graph, inputs, sites(graph)[0].residual, done[0].kept, *planes)
    assert [s.shape[1] for s in sizes] == [9, 5]
    for size in sizes:
        assert torch.allclose(size.sum(1), torch.full((5,), float(N)), atol=1e-4)  # empty ones have 1e-6 each
        assert torch.equal(size[:, 0], torch.ones(5))
    assert float(((kept * sizes[0][:, :, None]).sum(1) / N - residual.mean(1)).abs().max()) < 1e-4
    assert is_close(kept[:, 0], residual[:, 0])


def test_untrained_it_beats_super_tokens_that_nothing_is_near_to() -> None:
    """With next to no sharpness every super token is the mean of all."""
    (before,), errors = run(dense(HEAD), planted()), []
    for sharpness in (32.0, 0.01):
        graph = dense(HEAD)
        sampled(graph, 7, sharpness=sharpness)
        errors.append(float((run(graph, planted())[0] - before).norm() / before.norm()))
    assert errors[0] < 0.7 * errors[1]


def test_both_forms_are_one_without_sort_gather_or_scatter() -> None:
    answers = []
    for form in FORMS:
        graph = dense(HEAD)
        sampled(graph, 9, 5, form=form)
        assert len(sites(graph)) == 3  # the association is no attention
        names = {operator_name(n) for n in graph.graph.nodes}
        assert not names & {"topk", "sort", "argsort", "argmax", "gather", "scatter", "index_select"}
        answers.append(run(graph, samples(5, 9))[0])
    assert torch.equal(*answers)
    assert apart((answers[0],), run(dense(HEAD), samples(5, 9))) > ROUNDING


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(CalibrationError, match="a sharpness above 0"):
        sampled(dense(HEAD), 5, sharpness=0)
    with pytest.raises(CalibrationError, match="a merged token has no place"):
        cut(graph_of("masked: bool row"), 4, method="super_tokens")
