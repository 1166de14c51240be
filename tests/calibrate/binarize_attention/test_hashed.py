"""Linear attention on hash codes is what EcoFormer's equation says of those codes, and knows padding."""

import pytest
import torch
from attentions import MASKED, PLAIN, STEP, attentions, binarized, quantized, seen
from token_models import padding
from torch import Tensor

from calibrate import signs, steps
from calibrate.binarize_attention.hashed import _rotation
from calibrate.errors import CalibrationError
from calibrate.graph import clone


def by_pairs(query: Tensor, keys: Tensor, value: Tensor, counts: Tensor) -> Tensor:
    """The equation, pair by pair: similarity b + 1 + h k, over the keys that count [B, 1, 1, M]."""
    similarity = (query.shape[-1] + 1 + query @ keys) * counts
    assert bool((similarity >= counts).all())
    return (similarity / similarity.sum(-1, keepdim=True)) @ value


@pytest.mark.parametrize("name", [*PLAIN, *MASKED])
def test_the_output_is_what_the_equation_says(name: str) -> None:
    graph, setting = quantized(name, method="hashed", options={"bits": 4})
    (first, *rest), readers = attentions(graph), {}
    for attention in (first, *rest):
        readers[attention] = (next(iter(attention.output.users)), attention.value)
    steps.apply(STEP, graph, setting)
    places = signs.find(graph)
    assert len(places) == 2 * (1 + len(rest))
    counts = padding(16)[:, None, None, :] if "masked" in name else torch.ones(16, 1, 1, 6)
    for (reader, value), q, k in zip(readers.values(), places[::2], places[1::2], strict=True):
        h, c, v, output = seen(graph, name, q.choice, k.choice, value, reader.args[0])
        assert set(h.flatten().tolist()) == {-1, 1}
        torch.testing.assert_close(output, by_pairs(h, c, v, counts.float()), rtol=1e-4, atol=1e-5)


def test_the_scale_of_codes_is_held_when_the_model_is_trained() -> None:
    graph, setting, _ = binarized(PLAIN[0], "hashed")
    assert all(signs.HELD in p.quantize.meta for p in signs.find(clone(graph)))
    (entry,) = steps.apply("finetune", graph, setting)
    assert "trained" in entry.action
    assert [p.scale for p in signs.find(graph)] == [1.0] * 4


@pytest.mark.parametrize("how", ["parallel", "by hand"])
def test_a_bias_on_the_scores_has_no_such_form(how: str) -> None:
    graph, _, ledger = binarized(f"biased: {how}", "hashed")
    assert not signs.find(graph)
    assert {e.action for e in ledger} == {"left as it is"}
    assert all("a bias is added" in e.reason for e in ledger)


def test_no_bits_are_refused() -> None:
    for bits in (0, 1.5, True):
        graph, setting = quantized(PLAIN[0], method="hashed", options={"bits": bits})
        with pytest.raises(CalibrationError, match="one bit or more"):
            steps.apply(STEP, graph, setting)


def test_the_rotation_brings_rows_nearer_to_corners() -> None:
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = _rotation([rows], 3)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(6).double())
    assert torch.equal(turn, _rotation([rows], 3))
    start, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    assert (rows @ turn).abs().sum() > (rows @ start).abs().sum()
