"""Which schedule is taken: for a share, under a limit on changed answers, within a cost. No clock runs here."""

import math

import pytest
from token_setup import pruner

from calibrate.tokens.schedule import Schedule, candidates
from convert.errors import TightfitError
from convert.pruning import SHARES, Scored
from convert.schedules import CUT_DB, cheapest, choose, within


def quiet(what: str, done: int, total: int | None) -> None:
    """Nobody watches."""


def work(schedule: Schedule) -> float:
    """A cost that counts tokens."""
    return float(sum(schedule.entering) + 2 * sum(schedule.leaving))


WHOLE = work(Schedule(3, 17))


def test_for_a_share_the_schedule_closest_to_float_is_taken() -> None:
    found = pruner()
    scored, tried = choose(found, 0.6, quiet)
    assert {t.schedule for t in tried} == set(candidates(3, 17, 0.6, 1))
    assert len(tried) > 1
    assert all(scored.db - CUT_DB * len(scored.schedule.cuts) >= t.db - CUT_DB * len(t.schedule.cuts) for t in tried)


def test_a_cut_more_must_bring_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two schedules as good as each other the one with fewer cuts is taken, of two unlike ones the better."""
    found = pruner()
    few, many = Schedule(3, 17, ((0, 9),)), Schedule(3, 17, ((0, 12), (1, 7)))
    monkeypatch.setattr(found, "schedules", lambda share: [many, few])
    for more, wanted in ((0.0, few), (0.2, few), (1.0, many)):
        db = {few: 20.0, many: 20.0 + more}
        monkeypatch.setattr(found, "score", lambda s, db=db: Scored(s, db[s], 0.0))
        assert choose(found, 0.6, quiet)[0].schedule == wanted


@pytest.mark.parametrize("most", [30.0, 60.0])
def test_under_a_limit_the_cheapest_that_holds_it_is_taken(most: float) -> None:
    scored, tried = cheapest(pruner(), work, most, quiet)
    assert scored.drop <= most
    assert scored in tried
    assert all(work(scored.schedule) <= work(t.schedule) for t in tried if t.drop <= most)
    assert work(scored.schedule) < WHOLE


def test_a_limit_that_nothing_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pruner()
    monkeypatch.setattr(found, "score", lambda s: Scored(s, 1.0, 50.0))
    with pytest.raises(TightfitError, match=r"no schedule of evit .* at most 10 % .*--max-drop"):
        cheapest(found, work, 10.0, quiet)
    assert cheapest(found, work, 50.0, quiet)[0].drop == 50.0


def test_a_limit_is_found_without_looking_at_every_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where answers change as tokens go, halving in finds the least share, whichever it is."""
    found, shares, kept = pruner(), set[float](), []

    def score(s: Schedule) -> Scored:
        shares.add(s.share)
        return Scored(s, 40 * s.share, 100 * (1 - s.share))

    monkeypatch.setattr(found, "score", score)
    everything = {s.share for share in SHARES for s in candidates(3, 17, share, 1)}
    for limit in (10.0, 25.0, 45.0):
        shares.clear()
        scored, _ = cheapest(found, lambda s: s.share, limit, quiet)
        kept.append(scored.schedule.share)
        least = min(share for share in everything if 100 * (1 - share) <= limit)
        assert least <= kept[-1] < least + 0.05  # the step between the shares that are tried
        assert len(shares) < len(everything) / 2
    assert kept == sorted(set(kept), reverse=True)


def test_within_a_cost_the_schedule_closest_to_float_is_taken() -> None:
    scored, tried = within(pruner(), work, 0.6 * WHOLE, None, quiet)
    assert work(scored.schedule) <= 0.6 * WHOLE
    assert all(work(t.schedule) <= 0.6 * WHOLE for t in tried)
    assert scored.db == max(t.db for t in tried)
    # of each set of blocks the most tokens that fit
    places = [tuple(b for b, _ in t.schedule.cuts) for t in tried]
    assert len(set(places)) == len(places)


def test_a_cost_that_the_whole_model_has_removes_nothing() -> None:
    scored, tried = within(pruner(), work, WHOLE, None, quiet)
    assert (scored.schedule.cuts, scored.db, tried) == ((), math.inf, [])


def test_a_cost_that_none_has_is_refused() -> None:
    with pytest.raises(TightfitError, match=r"estimated to take 1 ms or less; the model .* Give a larger"):
        within(pruner(), work, 1.0, None, quiet)


def test_within_a_cost_a_limit_on_answers_holds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closest to float in dB may change more answers than another that holds the limit."""
    found, limit = pruner(), 0.6 * WHOLE
    closest, _ = within(found, work, limit, None, quiet)

    def score(s: Schedule) -> Scored:
        return Scored(s, *((30.0, 40.0) if s == closest.schedule else (20.0, 5.0 + s.share)))

    monkeypatch.setattr(found, "score", score)
    scored, _ = within(found, work, limit, 10.0, quiet)
    assert scored.schedule != closest.schedule
    assert scored.drop <= 10
    assert within(found, work, limit, 50.0, quiet)[0].schedule == closest.schedule
    with pytest.raises(TightfitError, match=r"changes 5\.\d+ % of the answers .* more than --max-drop 4"):
        within(found, work, limit, 4.0, quiet)
