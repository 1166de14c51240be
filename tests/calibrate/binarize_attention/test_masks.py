"""Padding has no influence, however the mask is written and however attention becomes bits."""

import pytest
import torch
from attentions import MASKED, binarized, quantized, samples
from torch import Tensor

from calibrate import binarize_attention as methods
from calibrate import steps
from calibrate.graph import run


def changed(batch: list[Tensor]) -> list[Tensor]:
    """The batch with other numbers where there is padding."""
    x, keep = batch
    return [torch.where(keep.unsqueeze(-1) > 0, x, x.flip(0) * 3 + 1), keep]


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("name", MASKED)
def test_masked_tokens_have_no_influence(name: str, method: str) -> None:
    graph, _, ledger = binarized(name, method)
    assert all("on bits" in e.action for e in ledger)
    (batch,) = samples(name, 16, seed=90)
    assert torch.equal(run(graph, batch)[0], run(graph, changed(batch))[0])
    shorter = [batch[0], batch[1] * (torch.arange(6) < 3)]
    assert not torch.equal(run(graph, batch)[0], run(graph, shorter)[0])  # the mask does matter


@pytest.mark.parametrize("method", methods.names())
def test_padding_is_not_what_bits_are_fitted_to(method: str) -> None:
    made = []
    for change in (lambda b: b, changed):
        graph, setting = quantized("masked: infinite", method=method)
        batches = [change(b) for b in setting.batches()]
        setting.batches = lambda batches=batches: iter(batches)
        steps.apply("binarize_attention", graph, setting)
        made.append(run(graph, samples("masked: infinite", 16, seed=90)[0])[0])
    assert torch.equal(made[0], made[1])
