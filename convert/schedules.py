"""Which schedule of token cuts: for a share of tokens, for a limit on changed answers, for a budget of milliseconds.

With a share to keep it is the one, of those that `calibrate/tokens/schedule.py` proposes, whose outputs stay closest to
float on the judging samples. Under a limit the costs of `convert/staircase.py` decide which of them are looked at.
"""

from collections.abc import Callable

from calibrate.tokens.schedule import Schedule, candidates
from convert.errors import TightfitError
from convert.pruning import SHARES, Pruner, Scored

# Of the sets of blocks looked at for the first share, so many of the best are looked at for the next.
BEST = 6
# A cut more is taken for this much at least: choosing tokens costs operators of its own.
CUT_DB = 0.3

Cost = Callable[[Schedule], float]
Progress = Callable[[str, int, int | None], None]


def choose(pruner: Pruner, share: float, progress: Progress) -> tuple[Scored, list[Scored]]:
    """The schedule of a mean share whose outputs stay closest to float, few cuts preferred, and all looked at."""
    wanted = pruner.schedules(share)
    tried = []
    for count, schedule in enumerate(wanted):
        progress("token schedules", count, len(wanted))
        tried.append(pruner.score(schedule))
    return max(tried, key=lambda t: t.db - CUT_DB * len(t.schedule.cuts)), tried


def cheapest(pruner: Pruner, cost: Cost, most_drop: float, progress: Progress) -> tuple[Scored, list[Scored]]:
    """The cheapest schedule that changes at most `most_drop` percent of the answers, and all that were looked at.

    Shares of tokens are halved in on; behind the first, only the places that did best are looked at again.
    """
    tried: list[Scored] = []
    low, high = 0, len(SHARES)  # SHARES[:low] hold the limit, SHARES[high:] do not
    good: list[Scored] = []
    places: list[tuple[int, ...]] | None = None
    while low < high:
        middle = (low + high) // 2
        progress("fewest tokens", middle, len(SHARES))
        found = [pruner.score(s) for s in _at(pruner, SHARES[middle], places)]
        tried += found
        if places is None and found:
            places = [_places(t.schedule) for t in sorted(found, key=lambda t: -t.db)[:BEST]]
        fine = [t for t in found if t.drop <= most_drop]
        good += fine
        low, high = (middle + 1, high) if fine else (low, middle)
    if not good:
        raise TightfitError(
            f"no schedule of {pruner.name} that removes tokens changes at most {most_drop:g} % of the answers on the "
            f"{pruner.judge.samples} judging samples. Allow more with --max-drop, or leave the pruning out."
        )
    return min(good, key=lambda t: (cost(t.schedule), -t.db)), tried


def within(
    pruner: Pruner, cost: Cost, limit: float, most_drop: float | None, progress: Progress
) -> tuple[Scored, list[Scored]]:
    """The schedule of estimated cost at most `limit` whose outputs stay closest to float, and all looked at.

    Raises TightfitError where none costs so little, or where all of those change more answers than `most_drop`.
    """
    full = Schedule(pruner.blocks, pruner.tokens)
    if cost(full) <= limit:
        return pruner.score(full), []
    fitting: dict[tuple[int, ...], Schedule] = {}
    for share in SHARES:
        for schedule in _at(pruner, share, None):
            if cost(schedule) <= limit:
                fitting.setdefault(_places(schedule), schedule)
    if not fitting:
        costs = [cost(s) for share in SHARES for s in _at(pruner, share, None)]
        raise TightfitError(
            f"no schedule of {pruner.name} is estimated to take {limit:.3g} ms or less; the model as it is takes "
            f"{cost(full):.3g} ms, the fastest schedule {min(costs, default=cost(full)):.3g} ms. Give a larger "
            "--budget-ms, or add +int8-dynamic to the recipe."
        )
    tried = []
    for count, schedule in enumerate(fitting.values()):
        progress("token schedules", count, len(fitting))
        tried.append(pruner.score(schedule))
    fine = [t for t in tried if most_drop is None or t.drop <= most_drop]
    if not fine:
        least = min(t.drop for t in tried)
        raise TightfitError(
            f"within the budget of time {pruner.name} changes {least:.3g} % of the answers on the judging samples, "
            f"more than --max-drop {most_drop:g}. Give more of either."
        )
    return max(fine, key=lambda t: t.db), tried


def _at(pruner: Pruner, share: float, wanted: list[tuple[int, ...]] | None) -> list[Schedule]:
    found = candidates(pruner.blocks, pruner.tokens, share, pruner.protected, pruner.halves)
    return [s for s in found if wanted is None or _places(s) in wanted]


def _places(schedule: Schedule) -> tuple[int, ...]:
    return tuple(block for block, _ in schedule.cuts)
