"""Attention of signs and of bits of probabilities is what the equation of BiViT says, on every way to write it."""

from dataclasses import replace

import pytest
import torch
from attentions import MASKED, PLAIN, STEP, attentions, binarized, quantized, samples, seen
from small_graphs import ISLANDS
from torch import Tensor

from calibrate import kept, qdq, signs, steps
from calibrate.attention_bits import values
from calibrate.graph import constant, run

METHOD = "softmax_aware"


def signed(x: Tensor, threshold: Tensor, scale: float) -> Tensor:
    return torch.where(x >= threshold, scale, -scale)


@pytest.mark.parametrize("name", [*PLAIN, *MASKED])
def test_the_output_is_what_the_equation_says(name: str) -> None:
    graph, setting = quantized(name, method=METHOD)
    found = attentions(graph)
    ledger = steps.apply(STEP, graph, setting)
    places, bits = signs.find(graph), kept.find(graph)
    assert len(ledger) == len(found) == len(bits) == len(places) // 2 >= 2
    for index, (attention, bit) in enumerate(zip(found, bits, strict=True)):
        q, k = places[2 * index : 2 * index + 2]
        query, keys, scores, value = seen(graph, name, q.source, k.source, attention.scores, attention.value)
        made, probabilities, output = seen(graph, name, bit.choice, attention.softmax, attention.output)
        wanted = signed(query, constant(graph, q.threshold), q.scale)
        wanted = wanted @ signed(keys, constant(graph, k.threshold), k.scale)
        torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-6)
        least = constant(graph, bit.share) * probabilities.amax(-1, keepdim=True)
        torch.testing.assert_close(made, torch.where(probabilities >= least, bit.scale, 0.0), rtol=0, atol=0)
        torch.testing.assert_close(output, made @ value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_codes_are_zero_and_one_beside_minus_one_and_one(kind: str) -> None:
    plan = replace(ISLANDS, activation=kind)
    graph, _, _ = binarized(PLAIN[0], METHOD, plan, signed_values=True)
    for bit in kept.find(graph):
        (codes,) = seen(graph, PLAIN[0], bit.quantize)
        assert str(codes.dtype) == f"torch.{kind}"
        assert set(codes.flatten().tolist()) == {0, 1}
    assert len(signs.find(graph)) == 3 * len(kept.find(graph))
    for place in signs.find(graph):
        (codes,) = seen(graph, PLAIN[0], place.quantize)
        zero = place.quantize.args[2]
        assert set(codes.flatten().tolist()) == {zero - 1, zero + 1}


def test_a_share_of_ones_choice_is_kept_and_a_fitted_one_is_no_worse() -> None:
    lost = {}
    for share in (0.25, 0.9, "fitted"):
        graph, _, ledger = binarized(PLAIN[0], METHOD, share=share)
        told = [float(constant(graph, b.share)) for b in kept.find(graph)]
        assert share == "fitted" or told == [pytest.approx(share)] * 2
        lost[share] = float(ledger[0].reason.partition("%")[0])
    assert lost["fitted"] <= min(lost[0.25], lost[0.9])


def test_signs_of_values_give_the_mean_back() -> None:
    """What the bits of the first attention leave out on average comes back behind the product."""
    graph, setting = quantized(PLAIN[0], method=METHOD, options={"signed_values": True})
    batches, (first, *_) = list(setting.batches()), attentions(graph)
    before = torch.cat([row[0] for row in values(graph, batches, [first.output])])
    steps.apply(STEP, graph, setting)
    (added,) = first.output.users
    after = torch.cat([row[0] for row in values(graph, batches, [added])])
    bare = torch.cat([row[0] for row in values(graph, batches, [first.output])])
    torch.testing.assert_close(after.mean((0, 2)), before.mean((0, 2)), rtol=0, atol=1e-5)
    assert (bare.mean((0, 2)) - before.mean((0, 2))).abs().max() > 0.01


@pytest.mark.parametrize("name", PLAIN)
def test_codes_between_scores_and_softmax_go(name: str) -> None:
    more = frozenset({"matmul"})
    plan = replace(
        ISLANDS, quantize_inputs=ISLANDS.quantize_inputs | more, quantize_outputs=ISLANDS.quantize_outputs | more
    )
    graph, setting = quantized(name, plan, method=METHOD)
    found = attentions(graph)
    ledger = steps.apply(STEP, graph, setting)
    assert len(kept.find(graph)) == len(found) == len(ledger)
    for attention in found:
        assert all(u.target is not qdq.QUANTIZE for u in attention.scores.users)
    assert torch.isfinite(run(graph, samples(name, 16, seed=91)[0])[0]).all()
