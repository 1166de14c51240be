"""PYRA: ToMe to the last bit until it is trained, then what the paper's equation says of every pair."""

import pytest
import torch
from encoders import TOKENS, WIDTH
from token_models import attention_of, feeds, graph_of, is_close, values
from torch import Tensor, nn

from calibrate.graph import run
from calibrate.tokens.insert import Cut, Done, reduce
from calibrate.tokens.selection import FORMS
from calibrate.tokens.trained import marked, write

NAME = "encoder: fused, scale"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [NAME, "encoder: by hand, post, pooled"])
def test_untrained_it_is_tome_bit_for_bit(name: str, form: str) -> None:
    answers = []
    for method in ("pyra", "tome"):
        graph = graph_of(name)
        reduce(graph, [Cut(0, 4, method), Cut(1, 3, method)], form=form)
        answers.append(run(graph, feeds(name))[0])
    assert torch.equal(*answers)
    trained = graph_of(name)
    reduce(trained, [Cut(0, 4, "pyra"), Cut(1, 3, "pyra")], form=form)
    write(trained, chosen(marked(trained)))
    assert not torch.equal(run(trained, feeds(name))[0], answers[0])


def chosen(names: object) -> dict[str, Tensor]:
    """Numbers for the two constants of each cut."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(node.meta["val"].shape, generator=generator) / (8 if name.endswith("_a") else 1)
        for name, node in names.items()
    }


def by_the_paper(key: Tensor, x: Tensor, gone: int, a: Tensor, b: Tensor) -> Tensor:
    """The tokens of one sample, behind a class token, pair by pair."""
    unit = nn.functional.normalize(key.mean(0), dim=-1)
    first, second = list(range(1, TOKENS, 2)), list(range(2, TOKENS, 2))
    best = sorted(((max((float(unit[i] @ unit[j]), j) for j in second), i) for i in first), reverse=True)
    into = {i: j for (_, j), i in best[:gone]}
    source, target = x[list(into)], x[list(into.values())]
    g = nn.functional.layer_norm(source + target, (WIDTH,))
    strength, direction = 2 * torch.sigmoid(g @ a), 2 * torch.sigmoid(g.T @ b.T) - 1
    changed = x.clone()
    changed[list(into)] = source + source * (strength @ direction.T)
    rows = [changed[[k, *(i for i, j in into.items() if j == k)]].mean(0) for k in range(TOKENS) if k not in into]
    return torch.stack(rows)


def trained(gone: int, traced: bool = False) -> tuple[Done, list[Tensor], list[Tensor]]:
    graph = graph_of(NAME)
    (done,) = reduce(graph, [Cut(0, TOKENS - gone, "pyra")], traced=traced)
    numbers = chosen(marked(graph))
    write(graph, numbers)
    nodes = [done.kept, done.origin] if done.origin is not None else [done.kept]
    return done, values(graph, feeds(NAME), *nodes), list(numbers.values())


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_trained_it_modulates_each_pair_as_the_paper_says(gone: int) -> None:
    _, key, residual = attention_of(NAME, feeds(NAME))
    _, (kept,), (a, b) = trained(gone)
    assert is_close(kept, torch.stack([by_the_paper(k, x, gone, a, b) for k, x in zip(key, residual, strict=True)]))
    zero = torch.zeros_like(b)
    assert not is_close(
        kept, torch.stack([by_the_paper(k, x, gone, a, zero) for k, x in zip(key, residual, strict=True)])
    )


def test_where_tokens_came_from_is_merged_and_never_modulated() -> None:
    _, (_, origin), _ = trained(3, traced=True)
    assert torch.allclose(origin.sum(2), torch.ones(5, 3))
    plain = graph_of(NAME)
    (done,) = reduce(plain, [Cut(0, TOKENS - 3, "tome")], traced=True)
    assert torch.equal(origin, values(plain, feeds(NAME), done.origin)[0])


def test_there_is_nothing_to_train_where_nothing_is_merged() -> None:
    graph = graph_of(NAME)
    reduce(graph, [Cut(0, TOKENS, "pyra")])
    assert marked(graph) == {}
