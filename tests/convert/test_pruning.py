"""Pruning a captured model: what a schedule does to answers, what is written down, and the id that ends sentences."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from token_setup import Sentences, pruner, sentences, text, vit

from calibrate.graph import run
from calibrate.tokens.schedule import Schedule
from convert.compress import Judge, tensors
from convert.errors import TightfitError
from convert.pruning import Pruner, separator
from convert.recipes import Tokens

CUT = Schedule(3, 17, ((0, 12), (1, 8)))
WHOLE = Schedule(3, 17)


def test_a_pruner_knows_the_models_blocks_and_tokens() -> None:
    found = pruner()
    assert (found.blocks, found.tokens, found.protected) == (3, 17, 1)
    assert not found.halves
    assert pruner("tome").halves


def test_a_score_is_the_models_own_distance_from_float() -> None:
    """Computed a second time from the outputs: the worse of both ratios in dB, and the share of other answers."""
    found, (model, _) = pruner(), vit()
    scored = found.score(CUT)
    inputs = found.judge.inputs
    before = torch.cat([run(model.graph, t)[0] for t in inputs]).double()
    after = torch.cat([run(found.graph(CUT), t)[0] for t in inputs]).double()
    error, power = (after - before).square().sum(1), before.square().sum(1)
    whole = 10 * math.log10(float(power.sum() / error.sum()))
    each = -10 * math.log10(float((error / power).mean()))
    assert scored.db == pytest.approx(min(whole, each), abs=1e-6)  # float64 sums in another order
    assert scored.drop == pytest.approx(100 * float((before.argmax(1) != after.argmax(1)).float().mean()))
    assert scored.db < 60
    assert found.score(CUT) is scored  # each schedule is looked at once


def test_no_cut_changes_nothing() -> None:
    scored = pruner().score(WHOLE)
    assert scored.db == math.inf
    assert scored.drop == 0


def test_answers_that_are_no_numbers_count_as_changed() -> None:
    found = pruner()
    broken = [tuple(torch.full_like(t, math.nan) for t in outputs) for outputs in found.judge.expected]
    assert found._changed(broken) == 100
    assert found._changed(found.judge.expected) == 0


def test_what_comes_out_has_its_cuts_in_the_ledger_and_what_was_left_out() -> None:
    found = pruner()
    best, other = found.score(CUT), found.score(Schedule(3, 17, ((0, 9),)))
    made = found.pruned(best, "rank", "because", [best, other])
    assert made.schedule == CUT
    assert (made.form, made.how) == ("rank", "because")
    assert [(e.layer, e.action) for e in made.ledger[:2]] == [
        (made.layers[0], "17 → 12 tokens by evit"),
        (made.layers[1], "12 → 8 tokens by evit"),
    ]
    assert "block 2 of 3" in made.ledger[1].reason
    (left,) = made.ledger[2:]
    assert left.action == "left out: 9 behind block 1"
    assert left.reason == f"{other.db:.1f} dB, not {best.db:.1f}"
    # the captured model itself is as it was
    assert made.captured.graph is not found.captured.graph
    assert found.captured.graph is vit()[0].graph
    assert not torch.equal(*(run(g, found.judge.inputs[0])[0] for g in (made.captured.graph, vit()[0].graph)))


def test_both_forms_give_the_same_tokens() -> None:
    """The same bits; but the fused token is a sum, of what is dropped or of all with zeros: float rounding apart."""
    for fuse in (False, True):
        one, other = (pruner(fuse=fuse).graph(CUT, form) for form in ("topk", "rank"))
        answers = [run(g, pruner().judge.inputs[0])[0] for g in (one, other)]
        torch.testing.assert_close(*answers, rtol=0, atol=1e-5 * fuse)


def test_a_share_that_leaves_too_few_or_removes_none_is_refused_with_one_that_works() -> None:
    with pytest.raises(
        TightfitError, match=r"leaves no token besides the 1 .* the least that works here is about 0\.\d"
    ):
        pruner().schedules(0.02)
    with pytest.raises(TightfitError, match=r"removes none: the most that removes any is about 0\.95"):
        pruner().schedules(0.999)
    assert pruner().schedules(0.6)


def test_options_of_a_recipe_reach_the_method() -> None:
    model, data = vit()
    plain = Pruner(model, Judge(model, data), Tokens("evit", options={"fuse": False}), data)
    assert plain.score(CUT).db != pruner().score(CUT).db


# --- the token that ends a sentence


def test_the_id_that_ends_every_sentence_is_found() -> None:
    assert separator(text(), sentences(9)) == 9
    assert separator(text(), sentences(12)) == 12


def test_sentences_that_end_otherwise_have_none() -> None:
    mixed = sentences(9)
    mixed.ids[2, mixed.mask[2].sum() - 1] = 11
    assert separator(text(), mixed) is None


def test_padding_that_no_mask_hides_is_no_separator() -> None:
    data = sentences(9, hidden=False)
    shorter = data.select(np.arange(2, 6))  # all with two zeros at their ends, or more
    assert separator(text(), shorter) is None
    assert separator(text(), replace(shorter, mask=(shorter.ids != 0).astype(np.int64))) == 9


def test_samples_of_padding_alone_and_images_have_none() -> None:
    data = sentences(9)
    assert separator(text(), Sentences(data.ids, np.zeros_like(data.mask))) is None
    assert separator(*vit()) is None


def test_a_separator_is_told_to_the_method_and_to_the_reader() -> None:
    model, data = text(), sentences(9)
    found = Pruner(model, Judge(model, data), Tokens("importance"), data)
    assert found.options == {"separator": 9}
    assert [e.action for e in found.notes] == ["the token 9 always stays"]
    told = Pruner(model, Judge(model, data), Tokens("importance", options={"separator": 4}), data)
    assert (told.options, told.notes) == ({"separator": 4}, [])
    other = Pruner(model, Judge(model, data), Tokens("even"), data)
    assert other.options == {}
    # it stays: three tokens are [CLS], the separator, and one more
    graph = found.graph(Schedule(2, 8, ((0, 3),)), traced=True)
    batch = next(data.batches(6))
    kept = run(graph, tensors(batch, model.inputs))[1].argmax(-1)
    ids = torch.from_numpy(data.ids)
    assert (ids.gather(1, kept) == 9).any(1).all()
