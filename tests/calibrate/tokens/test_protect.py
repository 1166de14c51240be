"""How many tokens in front a model reads by their place, found in its graph."""

import pytest
import torch
from encoders import WIDTH, tokens
from token_models import IDS, KEEP, Layer, Text, captured, graph_of
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate.errors import CalibrationError
from calibrate.tokens.protect import ids, protected


class Read(nn.Module):
    """Two blocks on tokens [B, 6, 8], then a head that reads them as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.one, self.two, self.how = nn.Linear(8, WIDTH), Layer(), Layer(), how
        self.head, self.other = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.embed(x)))
        if self.how == "class token":
            return self.head(x[:, 0])
        if self.how == "distilled":
            return (self.head(x[:, 0]) + self.other(x[:, 1])) / 2
        if self.how == "mean":
            return self.head(x.mean(1))
        if self.how == "mean behind the class token":
            return self.head(x[:, 1:].mean(1))
        return self.head(x)


def read(how: str) -> GraphModule:
    return captured(Read(how), tokens())


@pytest.mark.parametrize(
    ("how", "count"), [("class token", 1), ("distilled", 2), ("mean", 0), ("mean behind the class token", 1)]
)
def test_tokens_that_are_read_by_place_are_counted(how: str, count: int) -> None:
    assert protected(read(how)) == count


@pytest.mark.parametrize(("name", "count"), [("encoder: fused, scale", 1), ("encoder: by hand, post, pooled", 0)])
def test_other_encoders_are_read_alike(name: str, count: int) -> None:
    assert protected(graph_of(name)) == count


class Pooled(Text):
    """Text whose head reads the mean: no token by its place."""

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        extra = (1.0 - keep[:, None, None, :].float()) * -10000.0
        return self.head(self.two(self.one(self.table(ids), extra), extra).mean(1))


def test_the_first_token_of_text_always_stays() -> None:
    graph = captured(Pooled(), IDS, KEEP)
    assert protected(graph) == 1
    assert [n.name for n in ids(graph)] == ["ids"]
    assert ids(read("mean")) == []


def test_a_model_that_needs_every_token_is_refused_unless_they_are_put_back() -> None:
    graph = read("every token")
    with pytest.raises(CalibrationError, match="cluster"):
        protected(graph)
    assert protected(graph, restored=True) == 2  # six tokens: two beside a square of four patches
    # what can be followed is counted, whatever the method does with its tokens
    assert protected(read("mean"), restored=True) == 0
