"""Schedules of token cuts: what they keep, what they never go below, and where there is none."""

from itertools import pairwise

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from calibrate.tokens.schedule import PLACES, Schedule, candidates, geometric, places

BLOCKS = st.integers(1, 24)
SHARES = st.floats(0.1, 0.98)
PROTECTED = st.integers(0, 2)


def off(found: Schedule, share: float) -> float:
    """How far a schedule's share is from what was asked, in tokens of one block."""
    return abs(found.share - share) * found.tokens


@given(blocks=BLOCKS, tokens=st.integers(4, 400), share=SHARES, protected=PROTECTED, halves=st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_candidate_keeps_its_promises(
    blocks: int, tokens: int, share: float, protected: int, halves: bool
) -> None:
    found = candidates(blocks, tokens, share, protected, halves)
    assert len(set(found)) == len(found)
    for schedule in found:
        assert (schedule.blocks, schedule.tokens) == (blocks, tokens)
        # each cut is rounded to whole tokens, half a token at most, and counts in the blocks behind it
        assert off(schedule, share) <= max(1 / blocks, len(PLACES[2]) / 2) + 1e-9
        at = [block for block, _ in schedule.cuts]
        assert at == sorted(set(at))
        assert at[0] >= 0
        assert at[-1] < blocks
        counts = [tokens, *(keep for _, keep in schedule.cuts)]
        assert all(before > after for before, after in pairwise(counts)), "a cut removes something"
        assert counts[-1] > protected + 1  # the class token, and room for one token that chosen ones share with a rest
        if halves:
            for before, after in pairwise(counts):
                assert before - after <= (before - protected + 1) // 2  # what a bipartite merge can remove


@given(blocks=st.integers(4, 24), tokens=st.integers(60, 400), share=st.floats(0.75, 0.9))
@settings(max_examples=50, deadline=None)
def test_shares_of_many_tokens_are_reached_closely(blocks: int, tokens: int, share: float) -> None:
    assume(any(geometric(blocks, tokens, p, share, 1) for p in places(blocks)))
    for p in places(blocks):
        found = geometric(blocks, tokens, p, share, 1)
        assert found is None or abs(found.share - share) < 0.05


def test_cuts_keep_the_same_fraction_each() -> None:
    found = geometric(12, 197, (3, 6, 9), 0.7, 1)
    assert found is not None
    counts = [197, *(keep for _, keep in found.cuts)]
    fractions = [(after - 1) / (before - 1) for before, after in pairwise(counts)]
    assert max(fractions) - min(fractions) < 0.02  # whole tokens: of the last cut's hundred, one is a hundredth


def test_the_counts_of_blocks_follow_from_the_cuts() -> None:
    """Attention of the block with a cut still sees all that entered it; the MLP behind sees what stays."""
    schedule = Schedule(4, 10, ((1, 6), (3, 4)))
    assert schedule.leaving == (10, 6, 6, 4)
    assert schedule.entering == (10, 10, 6, 6)
    assert schedule.share == 26 / 40
    assert Schedule(4, 10).leaving == (10, 10, 10, 10)


def test_what_cannot_be_reached_has_no_schedule() -> None:
    assert geometric(12, 197, (6,), 0.3, 1) is None  # six blocks have all tokens already
    assert geometric(12, 197, (0,), 0.3, 1) is not None
    assert geometric(12, 197, (0,), 0.3, 1, halves=True) is None  # one merge leaves half
    assert geometric(12, 197, (0,), 0.6, 1, halves=True) is not None
    assert candidates(2, 4, 0.1, 1) == []  # nothing besides the class token would be left
    assert candidates(12, 197, 0.001, 1) == []


def test_a_share_of_nearly_all_tokens_is_no_schedule_that_removes_none() -> None:
    assert candidates(2, 6, 0.99, 1) == []
    for schedule in candidates(2, 6, 0.9, 1):
        assert schedule.leaving[-1] < 6


@given(blocks=BLOCKS)
def test_sets_of_blocks_are_distinct_and_lie_in_the_model(blocks: int) -> None:
    found = list(places(blocks))
    assert len(set(found)) == len(found)
    assert all(0 <= block < blocks for place in found for block in place)
    assert all(len(set(place)) == len(place) for place in found)


def test_deep_models_have_more_sets_of_blocks_than_shallow_ones() -> None:
    assert list(places(1)) == [(0,)]
    assert len(list(places(12))) == len(PLACES)
