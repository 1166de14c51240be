"""Judges of training: classes by divergence whatever their scores' size, other outputs by dB, worse is worse."""

import math

import pytest
import torch
from small_graphs import Made, capture
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate.graph import run
from calibrate.training_judge import DB, KL, Standing, standing
from calibrate.training_samples import Samples

ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
SAMPLES = Samples([[ROWS[:8]], [ROWS[8:16]], [ROWS[16:]]], 1, True)


def scores(scale: float = 1.0, shift: float = 0.0, noise: float = 0.0) -> GraphModule:
    """A classifier: logits times `scale` plus `shift`, its weight disturbed by `noise`."""
    torch.manual_seed(0)
    head = nn.Linear(6, 4)
    with torch.no_grad():
        head.weight += noise * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        head.weight *= scale
        head.bias.mul_(scale).add_(shift)
    return capture(nn.Sequential(head), ROWS)


def test_scores_moved_alike_change_no_answer_and_no_divergence() -> None:
    float_, moved, disturbed = scores(), scores(shift=3.0), scores(noise=0.3)
    found = standing(moved, float_, SAMPLES)
    assert found.unit == KL
    assert found.value == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1
    other = standing(disturbed, float_, SAMPLES)
    assert found.beats(other)
    assert not other.beats(found)
    assert not found.beats(found)


def test_the_divergence_is_that_of_the_held_out_samples_alone() -> None:
    float_, disturbed = scores(), scores(noise=0.5)
    wanted, got = (run(g, [ROWS[8:]])[0] for g in (float_, disturbed))
    apart = nn.functional.kl_div(got.log_softmax(1), wanted.softmax(1), reduction="batchmean")
    found = standing(disturbed, float_, SAMPLES)
    assert found.value == pytest.approx(float(apart), rel=1e-4)
    assert found.agreement == float((wanted.argmax(1) == got.argmax(1)).double().mean())


def feature(m: Made, x: Tensor) -> Tensor:
    return m.head(x).unflatten(1, (2, 2))


@pytest.mark.parametrize("several", [False, True])
def test_outputs_that_are_no_classes_are_judged_by_db(several: bool) -> None:
    def both(m: Made, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.head(x), feature(m, x)

    torch.manual_seed(0)
    head = nn.Linear(6, 4)
    float_ = capture(Made(both if several else feature, head=head), ROWS)
    found = standing(float_, float_, SAMPLES)
    assert (found.value, found.unit, found.agreement) == (math.inf, DB, None)


def test_what_is_not_finite_beats_nothing() -> None:
    broken = standing(scores(scale=math.nan), scores(), SAMPLES)
    assert broken.value == math.inf
    assert not broken.beats(standing(scores(noise=1.0), scores(), SAMPLES))
    assert not broken.beats(broken)


def test_the_ledger_gets_both_numbers_in_the_unit_judged_by() -> None:
    assert Standing(12.26, DB).since(Standing(9.04, DB)) == "9.0 -> 12.3 dB on held-out samples"
    told = Standing(0.0123, KL, 0.9).since(Standing(0.5, KL, 0.75))
    assert told == "0.5 -> 0.0123 KL divergence, the float model's class for 75.0% -> 90.0%, on held-out samples"
