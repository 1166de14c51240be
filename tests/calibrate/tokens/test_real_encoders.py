"""Encoders as a library writes them, with tiny random weights: keeping all is exact, masks go with their tokens."""

from functools import cache
from typing import Any

import pytest
import torch
from small_graphs import capture
from token_models import Scored, by_channel, cut, in_order
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate.graph import clone, run
from calibrate.tokens.attention import sites
from calibrate.tokens.insert import Cut, reduce
from convert.normal_form import normalise

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
LENGTH = 12
# The tokens in another order: sums over them round differently; two layers of float32.
REORDERED = 2e-5


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


class TextLogits(Logits):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, attention_mask=mask).logits


def built(name: str, attention: str) -> nn.Module:
    hf: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {"attn_implementation": attention}
    image = {**SMALL, **options, "image_size": 16, "patch_size": 4}
    if name == "vit":
        return Logits(hf.ViTForImageClassification(hf.ViTConfig(**image)))
    if name == "deit":
        return Logits(hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**image)))
    if name == "bert":
        return TextLogits(hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **options, vocab_size=50)))
    text = {"n_layers": 2, "dim": 16, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}
    return TextLogits(hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**text, **options)))


def feeds(name: str, count: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    if name in ("vit", "deit"):
        return (torch.randn(count, 3, 16, 16, generator=generator),)
    ids = torch.randint(1, 50, (count, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH)[None] < LENGTH - 3 * torch.arange(count)[:, None] % LENGTH).long()
    return ids, mask


@cache
def captured(name: str, attention: str) -> GraphModule:
    return normalise(capture(built(name, attention), *feeds(name)))


CASES = [(n, a) for n in ("vit", "deit", "bert", "distilbert") for a in ("sdpa", "eager")]
PROTECTED = {"deit": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_keeping_all_tokens_of_a_library_model_is_bit_identical(name: str, attention: str) -> None:
    graph, inputs = clone(captured(name, attention)), feeds(name)
    before = run(graph, inputs)[0]
    tokens, protected = sites(graph)[0].tokens, PROTECTED.get(name, 1)
    for form in ("topk", "rank"):
        kept = clone(graph)
        reduce(kept, [Cut(0, tokens, Scored(in_order)), Cut(1, tokens, "even")], protected, form)
        assert torch.equal(run(kept, inputs)[0], before)
        fewer = clone(graph)
        cut(fewer, tokens - 4, method=Scored(by_channel), protected=protected, form=form)
        assert not torch.equal(run(fewer, inputs)[0], before)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_library_models_tokens_may_come_in_any_order(name: str, attention: str) -> None:
    graph, inputs = clone(captured(name, attention)), feeds(name)
    before = run(graph, inputs)[0]
    cut(graph, sites(graph)[0].tokens, method=Scored(by_channel), protected=PROTECTED.get(name, 1))
    assert float((run(graph, inputs)[0] - before).abs().max() / before.abs().max()) < REORDERED
