"""Pictures of a run on a device: how times are distributed, what heat does to them, how many instructions there are."""

from markupsafe import Markup

from . import charts, pictures, run_words, words
from .measures import Latency
from .runs import DeviceRun, Instructions

_HEIGHT = 130  # pixels of one plot
# The slowest calls are far out: the axis ends a little behind the 99th percentile, or where the medians would be lost
# in a corner; the text names the slowest.
_BEYOND_P99 = 1.15
_BEYOND_P50 = 3.0


def distribution(timed: Latency, recipe: str) -> Markup:
    """The share of calls that were over by then, of artifact and float twin; nothing where no percentiles are kept."""
    if len(timed.quantiles_ms) < 2:
        return Markup()
    curves = [("good", recipe, timed.quantiles_ms)]
    if len(timed.float_quantiles_ms) > 1:
        curves.append(("float", "float", timed.float_quantiles_ms))
    slow = max(_percentile(values, 99) for _, _, values in curves)
    usual = max(_percentile(values, 50) for _, _, values in curves)
    x = charts.Axis(0.0, min(_BEYOND_P99 * slow, _BEYOND_P50 * usual), "ms")
    y = charts.Axis(0.0, 100.0, "% of calls")
    drawn = [
        charts.curve(_until(_steps(values), x.high), kind, _HEIGHT, x, y)
        for kind, _, values in reversed(curves)  # the artifact on top
    ]
    spoken = "; ".join(
        f"{name}: half of the calls within {words.milliseconds(_percentile(v, 50))}" for _, name, v in curves
    )
    legend = [(kind, f"{name}, slowest {words.milliseconds(values[-1])}") for kind, name, values in curves]
    return charts.plot(f"Distribution of times. {spoken}", _HEIGHT, x, y, drawn) + charts.key(legend)


def sustained(run: DeviceRun) -> Markup:
    """Median and temperature over the minutes of a sustained run, one plot each; nothing without one."""
    if len(run.sustained) < 2:
        return Markup()
    minutes = charts.Axis(0.0, max(p.minute for p in run.sustained), "min")
    times = [(p.minute, p.p50_ms) for p in run.sustained]
    warm = [(p.minute, p.temperature_c) for p in run.sustained if p.temperature_c is not None]
    parts = [_over_time("Median time of one call", times, "ms", "good", minutes, zero=True)]
    if len(warm) > 1:
        parts.append(_over_time("Temperature", warm, "°C", "bad", minutes, zero=False))
    return Markup().join(parts)


def instructions(found: Instructions, recipe: str) -> Markup:
    """Instructions of one inference, of artifact and float twin."""
    rows = [(recipe, found.all, "good")]
    if found.float_all is not None:
        kind = "good" if found.all <= found.float_all else "bad"
        rows = [(recipe, found.all, kind), ("float", found.float_all, "float")]
    most = max(value for _, value, _ in rows)
    bars = [pictures.Bar(name, run_words.count(value), 100 * value / most, kind) for name, value, kind in rows]
    return pictures.picture(bars, "Instructions of one inference")


def _over_time(
    title: str, points: list[tuple[float, float]], unit: str, kind: str, minutes: charts.Axis, zero: bool
) -> Markup:
    y = charts.around([value for _, value in points], unit, zero=zero)
    spoken = f"{title}: from {points[0][1]:.3g} to {points[-1][1]:.3g} {unit}"
    drawn = charts.curve(points, kind, _HEIGHT, minutes, y)
    return Markup('<p class="hint">{}</p>').format(title) + charts.plot(spoken, _HEIGHT, minutes, y, [drawn])


def _steps(values: tuple[float, ...]) -> list[tuple[float, float]]:
    """Percentiles as points (ms, percent of the calls)."""
    return [(value, 100 * i / (len(values) - 1)) for i, value in enumerate(values)]


def _until(points: list[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """The points up to `end` on the axis across, and the one at `end` itself."""
    inside = [point for point in points if point[0] <= end]
    outside = points[len(inside) :]
    if not outside:
        return [*inside, (end, points[-1][1])]
    (x0, y0), (x1, y1) = (inside[-1] if inside else (0.0, 0.0)), outside[0]
    return [*inside, (end, y0 + (y1 - y0) * (end - x0) / (x1 - x0))]


def _percentile(values: tuple[float, ...], percent: int) -> float:
    return values[round(percent / 100 * (len(values) - 1))]
