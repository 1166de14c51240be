"""Places of padding are known by the mask beside the ids, and no layer is fitted to them."""

import torch
from small_graphs import capture
from torch import Tensor, nn

from calibrate.layer_problem import problem
from calibrate.lockstep import Visit, walk
from calibrate.padding import ids, visible
from calibrate.plan import Plan
from calibrate.steps import Context, apply
from convert.normal_form import normalise


class Reader(nn.Module):
    """Ids and segments [B, 6], a mask [B, 6] -> a mean over the words [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.kinds = nn.Embedding(20, 64), nn.Embedding(2, 64)
        self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, tokens: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(self.table(tokens) + self.kinds(segments))
        seen = mask.unsqueeze(-1).float()
        return self.head((y * seen).sum(1) / seen.sum(1))


def feeds(count: int = 8) -> list[Tensor]:
    tokens = torch.randint(1, 20, (count, 6), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(6)[None] < 6 - torch.arange(count)[:, None] % 4).long()
    return [tokens * mask, torch.zeros_like(tokens), mask]


def test_the_mask_is_the_input_of_ones_and_zeros_that_no_table_looks_up() -> None:
    graph, inputs = normalise(capture(Reader().eval(), *feeds())), feeds()
    assert len(ids(graph)) == 2
    seen = visible(graph, inputs)
    assert seen is not None
    assert torch.equal(seen, inputs[2].bool())
    assert visible(graph, [*inputs[:2], inputs[2] * 3]) is None  # no mask: not ones and zeros
    assert visible(graph, [*inputs[:2], inputs[2] * 0]) is None  # nobody would see anything


def test_layers_are_fitted_to_words_and_not_to_padding() -> None:
    graph, inputs = normalise(capture(Reader().eval(), *feeds())), feeds()
    plan = Plan(steps=("quantize_weights",))
    context = Context(plan, lambda: iter([inputs]), lambda: iter([inputs]))
    apply("quantize_weights", graph, context)
    assert context.float_graph is not None
    reference = context.float_graph
    rows: list[int] = []

    def visit(found: Visit) -> None:
        rows.append(problem(graph, reference, found, 0).x.shape[1])

    walk(reference, graph, [inputs], visit)
    assert rows == [int(inputs[2].sum()), len(inputs[2])]  # words; behind the mean one row per sample
