"""Pictures across artifacts: drift beside size, speed and instructions, and how times are distributed at each place."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .. import charts, words
from ..measures import Latency
from ..pictures import layer_bars
from .schema import Entry, History, Place

_HEIGHT = 220  # pixels of a plot of points
_WIDTH = 320  # pixels of the narrowest plot: labels that do not collide there collide nowhere
_LEFT = 0.13  # share of a plot's width that the numbers of its upright axis take on a phone
_LEAST_DB = 6.0  # a plot spans at least so much: half a decibel is no difference
_NEAR = 7.0  # pixels between points that are drawn as one
_MOST_DB = 80.0  # more is as good as exact to the eye
_STRIP = 40  # pixels from one strip to the next
_OFFSETS = ((9, 4), (-9, 4), (0, -9), (0, 18), (9, -8), (-9, -8), (9, 17), (-9, 17))


@dataclass(frozen=True)
class Spot:
    """One artifact in a plot: `x` and its drift in dB, both as drawn; not `sure` where its time is unstable."""

    entry: Entry
    x: float
    db: float
    sure: bool = True


@dataclass(frozen=True)
class Timed:
    """One time at a place."""

    entry: Entry
    latency: Latency
    note: str


def by_size(entries: Sequence[Entry]) -> Markup:
    """Drift against the share of the float file's bytes."""
    spots = [Spot(e, e.bytes / e.float_bytes, db) for e in entries if (db := _db(e)) is not None]
    return _points(spots, "bytes, as a share of float's", smaller=True)


def by_speed(entries: Sequence[Entry], where: str) -> Markup:
    """Drift against the speed-up at one place; only what was timed there is drawn."""
    spots = []
    for entry in entries:
        timed = next((p.latency for p in entry.places if place_name(p) == where and _has_time(p)), None)
        db = _db(entry)
        if timed is not None and timed.speedup is not None and db is not None:
            spots.append(Spot(entry, timed.speedup, db, timed.stable))
    return _points(spots, "times as fast as float", smaller=False)


def by_instructions(entries: Sequence[Entry], where: str) -> Markup:
    """Drift against the share of float's instructions on one emulated board; only what was counted there is drawn."""
    spots = []
    for entry in entries:
        found = next((p.instructions for p in entry.places if p.instructions and p.instructions.where == where), None)
        db = _db(entry)
        if found is not None and found.float_all and db is not None:
            spots.append(Spot(entry, found.all / found.float_all, db))
    return _points(spots, "instructions, as a share of float's (no time)", smaller=True)


def timed_places(entries: Sequence[Entry]) -> list[str]:
    """Where something was timed, devices before hosts."""
    found = dict.fromkeys(place_name(p) for e in entries for p in e.places if _has_time(p))
    return sorted(found, key=lambda name: name.startswith(("host", "local")))


def counted_places(entries: Sequence[Entry]) -> list[str]:
    """Where instructions were counted beside the float twin's."""
    return list(
        dict.fromkeys(
            p.instructions.where for e in entries for p in e.places if p.instructions and p.instructions.float_all
        )
    )


def place_name(place: Place) -> str:
    """A place whose times compare with each other: an address, or the host with its processor."""
    return f"host: {place.machine}" if place.where == "host" else place.where


def strips(entries: Sequence[Entry], where: str) -> Markup:
    """Times at one place, fastest first: a pale band from the 1st to the 99th percentile, a full one from the 10th to
    the 90th, a line at the median; float below in grey. The axis is logarithmic."""
    rows = [
        Timed(entry, place.latency, _doubt(place.latency, place.outcome))
        for entry in entries
        for place in entry.places
        if place_name(place) == where and place.latency and _has_time(place)
    ]
    if not rows:
        return Markup()
    rows.sort(key=lambda row: row.latency.p50_ms)
    ends = [v for row in rows for v in (_low(row.latency), row.latency.p99_ms)]
    ends += [v for row in rows for v in (row.latency.float_p50_ms, row.latency.float_p99_ms) if v]
    x = charts.around(ends, "ms", log=True)
    height = _STRIP * len(rows)
    drawn = [_strip(row, index * _STRIP, x) for index, row in enumerate(rows)]
    spoken = ", ".join(f"{row.entry.name} {words.milliseconds(row.latency.p50_ms)}" for row in rows)
    return charts.plot(f"Times on {where}: {spoken}", height, x, None, drawn)


def front(spots: Sequence[Spot], smaller: bool) -> list[Spot]:
    """Those that no other beats in one without losing in the other; what fails or is unstable beats nobody."""
    sign = -1 if smaller else 1
    alive = [s for s in spots if s.entry.judgement != "fails" and s.sure]

    def beaten(spot: Spot) -> bool:
        return any(
            other.db >= spot.db and sign * other.x >= sign * spot.x and (other.db, other.x) != (spot.db, spot.x)
            for other in alive
        )

    return [spot for spot in alive if not beaten(spot)]


def _points(spots: Sequence[Spot], caption: str, *, smaller: bool) -> Markup:
    if not spots:
        return Markup('<p class="soft">Nothing to draw.</p>')
    best = {spot.entry.number for spot in front(spots, smaller)}
    across = charts.around([s.x for s in spots], least=0.1, left=_LEFT)
    up = charts.around([s.db for s in spots], "dB", least=_LEAST_DB)
    groups = _grouped(spots, across, up)
    marks = [
        charts.mark((group[0].x, group[0].db), _dot(group, best, offset), _HEIGHT, across, up)
        for group, offset in zip(groups, _placed(groups, across, up), strict=True)
    ]
    spoken = ", ".join(f"{s.entry.name} {s.x:.3g} at {s.db:.1f} dB" for s in spots)
    return charts.plot(f"Drift beside {caption}: {spoken}", _HEIGHT, across, up, marks, caption)


def _db(entry: Entry) -> float | None:
    drift = entry.places[0].drift
    return None if drift is None or drift.sqnr_db is None else min(drift.sqnr_db, _MOST_DB)


def _has_time(place: Place) -> bool:
    return place.latency is not None and place.outcome != "void"


def _grouped(spots: Sequence[Spot], x: charts.Axis, y: charts.Axis) -> list[list[Spot]]:
    """Spots that lie on each other, as the same file for two devices does, become one mark with both numbers."""
    groups: list[list[Spot]] = []
    for spot in spots:
        for group in groups:
            if _distance(_pixel(spot, x, y), _pixel(group[0], x, y)) < _NEAR:
                group.append(spot)
                break
        else:
            groups.append([spot])
    return groups


def _placed(groups: Sequence[list[Spot]], x: charts.Axis, y: charts.Axis) -> list[tuple[int, int]]:
    """Where the label of each group stands beside its mark: the first offset that is free of marks and labels."""
    taken = [_box(_pixel(group[0], x, y), (0, 4), 1) for group in groups]
    chosen = []
    for group in groups:
        pixel, long = _pixel(group[0], x, y), len(_numbers(group))
        boxes = [_box(pixel, offset, long) for offset in _OFFSETS]
        best = min(range(len(boxes)), key=lambda i: (_outside(boxes[i]), sum(_meet(boxes[i], t) for t in taken), i))
        taken.append(boxes[best])
        chosen.append(_OFFSETS[best])
    return chosen


Box = tuple[float, float, float, float]


def _box(pixel: tuple[float, float], offset: tuple[int, int], characters: int) -> Box:
    """Left, top, right, bottom of a text of 12 pixels' size."""
    wide = 7.5 * characters
    left = pixel[0] + offset[0] - (0 if offset[0] > 0 else wide if offset[0] < 0 else wide / 2)
    return left, pixel[1] + offset[1] - 11, left + wide, pixel[1] + offset[1] + 2


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _outside(box: Box) -> bool:
    return box[0] < 0 or box[2] > _WIDTH or box[1] < 0 or box[3] > _HEIGHT


def _pixel(spot: Spot, x: charts.Axis, y: charts.Axis) -> tuple[float, float]:
    return _WIDTH * x.at(spot.x), _HEIGHT * (1 - y.at(spot.db))


def _distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]))


def _numbers(group: Sequence[Spot]) -> str:
    return ", ".join(f"{spot.entry.number}{'' if spot.sure else '~'}" for spot in group)


def _dot(group: Sequence[Spot], best: set[int], offset: tuple[int, int]) -> Markup:
    if any(spot.entry.number in best for spot in group):
        kind = "good"
    else:
        kind = "bad" if all(spot.entry.judgement == "fails" for spot in group) else "float"
    anchor = "start" if offset[0] > 0 else "end" if offset[0] < 0 else "middle"
    title = Markup("<title>{}</title>").format("; ".join(f"{s.entry.name}, {s.entry.recipe}" for s in group))
    return Markup(
        '<g>{}<circle class="{}" r="5"/><text class="spot" x="{}" y="{}" text-anchor="{}">{}</text></g>'
    ).format(title, kind, *offset, anchor, _numbers(group))


def _doubt(timed: Latency, outcome: str) -> str:
    return "throttled" if outcome == "throttled" else "" if timed.stable else "unstable"


def _low(timed: Latency) -> float:
    return timed.quantiles_ms[1] if len(timed.quantiles_ms) > 1 else timed.p50_ms


def _strip(row: Timed, y: int, x: charts.Axis) -> Markup:
    timed, top = row.latency, y + charts.TOP
    note = Markup('<tspan class="note" dx="8">{}</tspan>').format(row.note) if row.note else Markup()
    parts = [
        Markup('<text class="label" x="0" y="{}">{}{}</text>').format(top + 12, row.entry.name, note),
        Markup('<text class="value" x="100%" y="{}" text-anchor="end">{}</text>').format(
            top + 12, words.milliseconds(timed.p50_ms)
        ),
        *_bands(timed.quantiles_ms, (timed.p50_ms, timed.p90_ms, timed.p99_ms), "good", top + 18, 10, x),
    ]
    if timed.float_p50_ms and timed.float_p90_ms and timed.float_p99_ms:
        three = (timed.float_p50_ms, timed.float_p90_ms, timed.float_p99_ms)
        parts += _bands(timed.float_quantiles_ms, three, "float", top + 30, 5, x)
    return Markup().join(parts)


def _bands(
    quantiles: tuple[float, ...], three: tuple[float, float, float], kind: str, y: int, high: int, x: charts.Axis
) -> list[Markup]:
    """From the 1st percentile where percentiles are kept, else from the median, to the 99th."""
    p50, p90, p99 = three
    low, tenth = (quantiles[1], quantiles[10]) if len(quantiles) == 101 else (p50, p50)
    rect = Markup('<rect class="{}" x="{:.2f}%" y="{}" width="{:.2f}%" height="{}" fill-opacity="{}"/>')
    middle = Markup('<line class="whisker" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1}" y2="{2}"/>')
    bands = [
        rect.format(kind, 100 * x.at(a), y, max(100 * (x.at(b) - x.at(a)), 0.3), high, opacity)
        for a, b, opacity in ((low, p99, 0.4), (tenth, p90, 1))
    ]
    return [*bands, middle.format(100 * x.at(p50), y - 2, y + high + 2)]


def layers(entry: Entry) -> Markup:
    """The worst layers of one artifact."""
    return layer_bars(entry.worst_layers)


def spark(history: History, field: str) -> Markup:
    """A small curve of one metric of a history; nothing where fewer than two are known."""
    return charts.sparkline([getattr(point, field) for point in history.points])
