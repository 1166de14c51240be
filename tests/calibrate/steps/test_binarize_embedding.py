"""The step that makes an embedding ±1 codes: what it writes into the graph, what it says, and whom it refuses."""

from dataclasses import replace

import pytest
import torch
from small_graphs import Made, capture, context
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.errors import CalibrationError
from calibrate.graph import run
from calibrate.plan import Plan

NAME = "binarize_embedding"
X = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))


def made(graph: GraphModule, x: Tensor = X, **wish: object) -> list:
    plan = replace(Plan(steps=(NAME,)), parameters={NAME: wish})
    return steps.apply(NAME, graph, context(plan, [x[:50]], [x[50:]]))


def encoder() -> GraphModule:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 12)), X[:4])


@pytest.mark.parametrize(("wish", "width"), [({}, 16), ({"bits": 8}, 8), ({"bits": 24}, 24), ({"planes": 2}, 32)])
def test_the_output_becomes_codes_of_whole_bytes(wish: dict[str, int], width: int) -> None:
    graph = encoder()
    (entry,) = made(graph, **wish)
    codes = run(graph, [X])[0]
    assert codes.dtype == torch.float32
    assert codes.shape == (80, width)
    assert (codes.abs() == 1).all()
    assert 0.2 < codes[:, : min(8, width)].add(1).mean() / 2 < 0.8  # centred: neither sign has all
    assert entry.action == f"12 numbers become {width} bits" + (" in 2 planes" if "planes" in wish else "")
    assert "of 16 samples that the fit did not see among 80; fitted on 64" in entry.reason
    assert 0.3 < float(entry.reason.split()[1]) <= 1


def test_the_same_samples_and_seed_give_the_same_graph() -> None:
    first, second = encoder(), encoder()
    made(first)
    made(second)
    assert torch.equal(first.binary_embedding_rotation, second.binary_embedding_rotation)


def test_an_embedding_of_zero_behind_the_rotation_is_plus_one() -> None:
    graph = encoder()
    made(graph)
    graph.binary_embedding_rotation.zero_()
    graph.binary_embedding_centre.copy_(torch.tensor([0.0, -0.0]).repeat(8))
    assert (run(graph, [X])[0] == 1).all()


def test_the_other_outputs_stay_and_the_one_named_changes() -> None:
    def both(self: Made, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)

    torch.manual_seed(0)
    graph = capture(Made(both, first=nn.Linear(6, 8), second=nn.Linear(6, 8)), X[:4])
    with pytest.raises(CalibrationError, match=r"2 outputs that could be the embedding.*output = 0 under"):
        made(graph)
    before = run(graph, [X])
    made(graph, output=1)
    after = run(graph, [X])
    assert torch.equal(before[0], after[0])
    assert (after[1].abs() == 1).all()


def test_a_model_without_an_embedding_is_refused_with_what_it_has() -> None:
    graph = capture(nn.Conv1d(2, 3, 1), torch.zeros(4, 2, 5))
    with pytest.raises(CalibrationError, match=r"needs an embedding.*0: \['batch', 3, 5\].*Pool over tokens"):
        made(graph)


@pytest.mark.parametrize("output", [5, -2, "embedding", True])
def test_an_output_that_is_not_there_is_refused(output: object) -> None:
    with pytest.raises(CalibrationError, match="the outputs are 0:"):
        made(encoder(), output=output)


def test_too_few_samples_are_refused_with_how_many_it_takes() -> None:
    plan = Plan(steps=(NAME,))
    with pytest.raises(CalibrationError, match=r"20 samples are too few\. Give 32"):
        steps.apply(NAME, encoder(), context(plan, [X[:20]]))
