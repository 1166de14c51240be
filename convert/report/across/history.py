"""The same model for the same device and target in several folders: what became of drift, size, time and cost."""

from collections import Counter
from collections.abc import Callable, Sequence

from ...baseline import EXACT_DB, Tolerances
from .. import run_words, words
from .schema import Entry, History, HistoryPoint, Place, Source

# A median that grew by less is what two timings of one file may differ by.
_TIME_TOLERANCE = 0.10


def histories(entries: Sequence[Entry], sources: Sequence[Source]) -> list[History]:
    """One history for every model, device and target that more than one of the `sources` has, oldest given first."""
    folders = [source.folder for source in sources]
    samples = {source.folder: source.evaluation for source in sources}
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: folders.index(entry.folder)):
        groups.setdefault((entry.model, entry.device, entry.target), []).append(entry)
    return [_history(*key, group, samples) for key, group in groups.items() if len(group) > 1]


def _history(model: str, device: str, target: str, group: list[Entry], samples: dict[str, str]) -> History:
    timed_at = _common(group, _timed)
    counted_at = _common(group, _counted)
    points = [_point(entry, timed_at, counted_at) for entry in group]
    return History(
        model=model,
        device=device,
        target=target,
        p50_where=timed_at,
        instructions_where=counted_at,
        points=tuple(points),
        worse=tuple(_worse(points[-2], points[-1], samples)),
    )


def _point(entry: Entry, timed_at: str | None, counted_at: str | None) -> HistoryPoint:
    drift = entry.places[0].drift
    timed = next((p.latency for p in entry.places if (t := _timed(p)) is not None and t == timed_at), None)
    counted = next((p.instructions for p in entry.places if (c := _counted(p)) is not None and c == counted_at), None)
    return HistoryPoint(
        entry=entry.number,
        folder=entry.folder,
        recipe=entry.recipe,
        sqnr_db=drift.sqnr_db if drift else None,
        bytes=entry.bytes,
        p50_ms=timed.p50_ms if timed else None,
        p50_stable=timed.stable if timed else None,
        instructions=counted.all if counted else None,
    )


def _timed(place: Place) -> str | None:
    """Where a time was taken; None where none counts. Hosts are told apart by processor, all by threads."""
    timed = place.latency
    if timed is None or place.emulated or place.outcome != "ran":
        return None
    where = f"host ({timed.cpu})" if place.where == "host" else place.where
    return where if timed.threads == 1 else f"{where}, {timed.threads} threads"


def _counted(place: Place) -> str | None:
    return None if place.instructions is None else place.instructions.where


def _common(group: list[Entry], where_of: Callable[[Place], str | None]) -> str | None:
    """The place that measured most of the group; of those, a device before the host."""
    seen = Counter(where for entry in group for place in entry.places if (where := where_of(place)) is not None)
    return max(seen, key=lambda where: (seen[where], not where.startswith(("host", "local"))), default=None)


def _worse(before: HistoryPoint, after: HistoryPoint, samples: dict[str, str]) -> list[str]:
    """What got worse by more than `check --baseline` tolerates; for stable times, which it leaves alone, by 10 %.

    Drift on other evaluation `samples` (fingerprints by folder) is no comparison.
    """
    allowed = Tolerances()
    found = []
    same = samples[before.folder] == samples[after.folder]
    if same and before.sqnr_db is not None and _fell(before.sqnr_db, after.sqnr_db, allowed.sqnr_db):
        now = "undefined" if after.sqnr_db is None else f"{after.sqnr_db:.1f} dB"
        found.append(f"drift: {before.sqnr_db:.1f} dB before, {now} now")
    if after.bytes > before.bytes * (1 + allowed.size):
        found.append(f"size: {words.size(before.bytes)} before, {words.size(after.bytes)} now")
    timed = before.p50_ms and after.p50_ms and before.p50_stable and after.p50_stable
    if timed and _grew(before.p50_ms, after.p50_ms, _TIME_TOLERANCE):
        now = words.milliseconds(after.p50_ms or 0.0)
        found.append(f"time: {words.milliseconds(before.p50_ms or 0.0)} before, {now} now")
    if _grew(before.instructions, after.instructions, allowed.instructions):
        now = run_words.count(after.instructions or 0)
        found.append(f"instructions: {run_words.count(before.instructions or 0)} before, {now} now")
    return found


def _fell(before: float, after: float | None, by: float) -> bool:
    """Whether an SQNR fell by more; what is above EXACT_DB is float rounding."""
    return after is None or min(before, EXACT_DB) - min(after, EXACT_DB) > by


def _grew(before: float | None, after: float | None, share: float) -> bool:
    return before is not None and after is not None and after > before * (1 + share)
