"""The best artifact of a model for a device.

Those that meet their gates come first; where no gate was set for any, all that do not fail. Among them counts the best
evidence there is: time on the device, else instructions on an emulated one, else bytes. What was not measured at the
place that decides cannot be called best. Equal ones are told apart by bytes. Times on the host that converted decide
nothing: another processor orders artifacts in another way.
"""

from collections.abc import Callable, Sequence

from .. import run_words, words
from .schema import Choice, Entry, Place

Cost = Callable[[Place], float | None]


def choices(entries: Sequence[Entry]) -> list[Choice]:
    """The best of the current `entries`, for each model and device in order of appearance."""
    current = [entry for entry in entries if entry.current]
    pairs = dict.fromkeys((entry.model, entry.device) for entry in current)
    return [_choice(*pair, [e for e in current if (e.model, e.device) == pair]) for pair in pairs]


def time_there(place: Place) -> float | None:
    """The median of a time that counts: on a device, stable, neither void nor throttled; else None."""
    timed = place.latency
    if place.here or place.emulated or place.outcome != "ran" or timed is None:
        return None
    return timed.p50_ms if timed.stable else None


def _counted(place: Place) -> float | None:
    return float(place.instructions.all) if place.instructions else None


def _choice(model: str, device: str, entries: list[Entry]) -> Choice:
    good = [e for e in entries if e.judgement == "meets"]
    candidates = good or [e for e in entries if e.judgement == "unjudged"]
    if not candidates:
        return Choice(model=model, device=device, entry=None, rule="every artifact fails")
    best, rule = _best(device, candidates)
    rule = rule if good else f"{rule}; no gate was set, so none was met"
    return Choice(model=model, device=device, entry=best.number, rule=rule)


def _best(device: str, candidates: list[Entry]) -> tuple[Entry, str]:
    if len(candidates) == 1:
        meets = candidates[0].judgement == "meets"
        return candidates[0], "the only one that meets its gates" if meets else "the only one that does not fail"
    own = f"emulated:{device}"
    for cost, first, say in ((time_there, "", _time_rule), (_counted, own, _count_rule)):
        where, costs = _ranked(candidates, cost, first)
        if costs:
            best, least = costs[0]
            rule = say(least, costs[1][1] if len(costs) > 1 else None, where)
            missing = [e.name for e in candidates if e.number not in {c.number for c, _ in costs}]
            return best, f"{rule}; not measured there: {', '.join(missing)}" if missing else rule
    ordered = sorted(candidates, key=lambda e: (e.bytes, e.number))
    rule = f"fewest bytes: {words.size(ordered[0].bytes)}, next {words.size(ordered[1].bytes)}"
    return ordered[0], f"{rule}; none was timed on a device, nor its instructions counted"


def _ranked(candidates: list[Entry], cost: Cost, first: str) -> tuple[str, list[tuple[Entry, float]]]:
    """The place that measured most candidates (`first` wins a tie), and the candidates measured there, best first."""
    found: dict[str, list[tuple[Entry, float]]] = {}
    for entry in candidates:
        for place in entry.places:
            value = cost(place)
            if value is not None:
                where = place.instructions.where if cost is _counted and place.instructions else place.where
                found.setdefault(where, []).append((entry, value))
    if not found:
        return "", []
    where = max(found, key=lambda name: (len(found[name]), name == first))
    return where, sorted(found[where], key=lambda pair: (pair[1], pair[0].bytes, pair[0].number))


def _time_rule(least: float, following: float | None, where: str) -> str:
    beside = "" if following is None else f", next {words.milliseconds(following)}"
    return f"fastest on {where}: {words.milliseconds(least)}{beside}"


def _count_rule(least: float, following: float | None, where: str) -> str:
    beside = "" if following is None else f", next {run_words.count(int(following))}"
    return f"fewest instructions on {where}: {run_words.count(int(least))}{beside} (a cost, not a time)"
