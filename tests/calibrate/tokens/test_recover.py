"""Constants of token cuts that are trained: closer to the model with all tokens, or as they were."""

from collections.abc import Callable

import pytest
import torch
from encoders import WIDTH, tokens
from token_models import feeds, graph_of
from torch import Tensor
from torch.fx import GraphModule

from calibrate.errors import CalibrationError
from calibrate.graph import clone, constant, run
from calibrate.plan import Entry, Plan
from calibrate.steps import Context
from calibrate.tokens.insert import Cut, reduce
from calibrate.tokens.recover import Effort, recover
from calibrate.tokens.trained import marked, write

NAME = "encoder: fused, scale"
FEW = Effort(iterations=12, lr=0.1, samples=96)


def cut(method: str, keep: int = 4, form: str = "topk", **options: object) -> GraphModule:
    graph = graph_of(NAME)
    reduce(graph, [Cut(0, keep, method, options)], form=form)
    return graph


def context(seed: int = 0, count: int = 96, progress: Callable[..., None] = lambda *_: None) -> Context:
    def batches() -> list[list[Tensor]]:
        return [[b] for b in tokens(count, 1).split(16)]

    return Context(Plan(steps=()), batches, batches, progress, seed=seed)


def apart(graph: GraphModule, inputs: tuple[Tensor, ...]) -> float:
    """Divergence of the classes from those of the model with all tokens."""
    (wanted,), (got,) = run(graph_of(NAME), inputs), run(graph, inputs)
    return float(
        torch.nn.functional.kl_div(got.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
    )


# Where a cut to three of six tokens leaves much to be won back; an association this soft does too.
LEARNERS = [("pyra", {}, 0.3), ("super_tokens", {"sharpness": 2.0}, 0.05)]


@pytest.mark.parametrize(("method", "options", "rate"), LEARNERS)
def test_training_brings_the_model_closer_to_itself_on_samples_it_never_saw(
    method: str, options: dict, rate: float
) -> None:
    graph = cut(method, 3, **options)
    before = apart(graph, feeds(NAME, 64))
    effort = Effort(iterations=30, lr=rate, samples=96)
    constants, ledger = recover(graph, graph_of(NAME), context(), effort)
    assert apart(graph, feeds(NAME, 64)) == before  # the graph itself is left as it is
    write(graph, constants)
    assert apart(graph, feeds(NAME, 64)) < 0.9 * before
    (entry,) = ledger
    assert entry.step == "prune_tokens"
    assert entry.action.startswith("trained ")
    assert entry.reason.endswith("on 24 held-out samples after 30 steps")
    first, last = (float(entry.reason.split()[i]) for i in (1, 3))
    assert last < first


@pytest.mark.parametrize("rate", [1e4, float("inf")])
def test_a_training_that_does_harm_is_rolled_back(rate: float) -> None:
    graph = cut("pyra")
    constants, ledger = recover(graph, graph_of(NAME), context(), Effort(iterations=10, lr=rate, samples=96))
    assert constants == {}
    assert ledger[0].action == "left untrained"
    assert ledger[0].reason.startswith("rolled back: loss ")


def test_one_seed_gives_the_same_bytes_and_another_others() -> None:
    graph, reference = cut("pyra"), graph_of(NAME)
    quick = Effort(iterations=12, lr=0.03, samples=96)
    one, two, other = (recover(graph, reference, context(seed), quick)[0] for seed in (3, 3, 4))
    assert list(one) == list(two) == list(marked(graph))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_no_other_constant_is_touched_and_no_parameter_is_left_a_gradient() -> None:
    graph, reference = cut("pyra"), graph_of(NAME)
    kept = clone(graph)
    recover(graph, reference, context(), Effort(iterations=3, samples=96))
    for node, old in zip(graph.graph.nodes, kept.graph.nodes, strict=True):
        if node.op == "get_attr":
            assert torch.equal(constant(graph, node), constant(kept, old))
    assert all(p.grad is None for g in (graph, reference) for p in g.parameters())


def test_both_forms_know_the_constants_by_the_same_names_and_answer_alike() -> None:
    graph = cut("pyra")
    constants = {name: torch.ones_like(constant(graph, node)) for name, node in marked(graph).items()}
    other, untrained = cut("pyra", form="rank"), cut("pyra", form="rank")
    assert list(marked(other)) == list(constants)
    write(graph, constants)
    write(other, constants)
    assert torch.equal(run(graph, feeds(NAME))[0], run(other, feeds(NAME))[0])
    assert not torch.equal(run(other, feeds(NAME))[0], run(untrained, feeds(NAME))[0])


def test_the_time_limit_is_told_and_progress_too() -> None:
    heard: list[tuple[str, int, int]] = []
    effort = Effort(iterations=50, lr=0.01, samples=96, time_limit_s=0.0)
    _, ledger = recover(
        cut("pyra"), graph_of(NAME), context(progress=lambda what, done, of: heard.append((what, done, of))), effort
    )
    assert "stopped by time_limit_s after 1 of 50 steps: another run may differ" in ledger[0].reason
    assert heard == [("training of token cuts", 1, 50)]


def test_too_few_samples_and_nothing_to_train_are_told() -> None:
    constants, ledger = recover(cut("pyra"), graph_of(NAME), context(count=1), FEW)
    assert constants == {}
    assert ledger == [
        Entry(
            "prune_tokens",
            "model",
            "left untrained",
            "there are too few samples to hold some out to judge by: give at least two batches",
        )
    ]
    with pytest.raises(CalibrationError, match="has anything to train"):
        recover(cut("tome"), graph_of(NAME), context(), FEW)
    shapes = [tuple(node.meta["val"].shape) for node in marked(cut("pyra")).values()]
    assert shapes == [(WIDTH, 1), (1, 2)]
