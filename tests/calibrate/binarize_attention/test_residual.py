"""Estimators of rank one beside the signs' scores: what they compute, and that they are the least-squares fit."""

import pytest
import torch
from attentions import MASKED, PLAIN, STEP, attentions, quantized, seen
from torch import Tensor

from calibrate import kept, signs, steps
from calibrate.attention_bits import Place, sign_scores
from calibrate.binarize_attention.residual import _lost, estimators
from calibrate.errors import CalibrationError
from calibrate.graph import constant


@pytest.mark.parametrize("name", [PLAIN[0], PLAIN[3], MASKED[2]])
def test_scores_are_signs_plus_the_products_of_the_estimators(name: str) -> None:
    graph, setting = quantized(name, method="residual")
    first = attentions(graph)[0]
    steps.apply(STEP, graph, setting)
    (total,) = first.scores.users
    one, both = total.args[1].args
    product, bias = one.args
    a, c, b = (constant(graph, n) for n in (product.args[1], bias, both.args[0]))
    q, k = signs.find(graph)[:2]
    scores, query, keys, made = seen(graph, name, first.scores, q.source, k.source, total)
    torch.testing.assert_close(made, scores + (query @ a + c) @ (b @ keys), rtol=1e-4, atol=1e-4)
    assert a.shape[-1] == 2
    assert len(kept.find(graph)) >= 2


def lost(rank: int) -> float:
    graph, setting = quantized(PLAIN[0])
    place = Place(graph, attentions(graph)[0], list(setting.batches()), setting.plan)
    samples = place.samples
    fitted = sign_scores(place, "channel")
    if rank == 0:
        return sum(float(_lost(s, fitted).square().sum()) for s in samples)
    a, c, b = (x.double() for x in estimators(samples, fitted, rank))
    return sum(float((_lost(s, fitted) - s.centred(made(s.query, s.keys, a, c, b))).square().sum()) for s in samples)


def made(query: Tensor, keys: Tensor, a: Tensor, c: Tensor, b: Tensor) -> Tensor:
    return (query.double() @ a + c) @ (keys.double() @ b).mT


def test_more_products_leave_less() -> None:
    errors = [lost(rank) for rank in (0, 1, 2, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[0]


def test_a_rank_that_is_none_is_refused() -> None:
    for rank in (0, 9, 1.5, True):
        graph, setting = quantized(PLAIN[0], method="residual", options={"rank": rank})
        with pytest.raises(CalibrationError, match="from 1 to a head's 8 channels"):
            steps.apply(STEP, graph, setting)
