"""The pictures of the HTML report: inline SVG that follows the page's width and its light or dark colours.

Widths are percentages and text has a fixed size, so that a picture is as readable on a phone as on a desk. All
text is escaped here.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from . import run_words, words
from .measures import Latency, Stage
from .schema import Drift, LayerDrift, Result, Signal

_ROW = 40  # pixels from one bar to the next
_TOP, _BAR = 20, 10  # offset and height of the bar inside its row
_LONGEST = 40  # characters of a label
_MOST_LAYERS = 10
_DB_LEAST, _DB_MOST = 40.0, 80.0  # the dB axis ends between these; more is as good as exact to the eye


@dataclass(frozen=True)
class Bar:
    """One row: a bar of `share` percent. `marks` are further SVG of the row, at x in percent, drawn at y = 0.

    `note` is a warning beside the label, `remark` says something there in plain grey.
    """

    label: str
    value: str
    share: float
    kind: str = "good"
    note: str = ""
    marks: list[Markup] = field(default_factory=list)
    remark: str = ""


def waterfall(drift: Drift) -> Markup:
    """SQNR after every stage, one bar each; the pale part of a bar is what this stage lost.

    What devices computed follows the artifact's bar, each beside the artifact and not beside the device before it.
    """
    most = _axis([s.sqnr_db for s in drift.stages])
    jump = drift.first_jump.stage if drift.first_jump else None
    bars, before = [], 100.0
    for stage in drift.stages:
        share = _share(stage, most)
        if stage.on is not None:
            kind = "bad" if run_words.far(stage, drift.artifact) else "device"
            bars.append(_device_bar(stage, share, _share(drift.artifact, most), kind))
            continue
        lost = [] if share >= before else [_rect(share, before - share, "lost")]
        is_jump = stage.stage == jump
        note = "first jump" if is_jump else ""
        bars.append(Bar(stage.stage, words.sqnr(stage), share, "bad" if is_jump else "good", note, lost))
        before = share
    return picture(bars, f"Signal to noise after each stage: {_spoken(bars)}", most)


def _device_bar(stage: Stage, share: float, artifact: float, kind: str) -> Bar:
    lost = [_rect(share, artifact - share, "lost")] if share < artifact else []
    note = f"{stage.samples} samples" if stage.samples is not None else ""
    return Bar(stage.stage, words.sqnr(stage), share, kind, marks=lost, remark=note)


def by_drift(drift: Drift) -> list[LayerDrift]:
    """The layers, worst first."""
    return sorted(drift.layers, key=lambda layer: (layer.exact, _or_worst(layer), layer.layer))


def worst_layers(drift: Drift) -> Markup:
    """The layers with the lowest SQNR, worst first."""
    return layer_bars(by_drift(drift)[:_MOST_LAYERS], drift.first_jump.worst_layers if drift.first_jump else ())


def layer_bars(layers: Sequence[LayerDrift], named: Container[str] = ()) -> Markup:
    """One bar per layer, in the order given; red where the layer is `named`."""
    most = _axis([layer.sqnr_db for layer in layers])
    bars = [Bar(x.layer, words.sqnr(x), _share(x, most), "bad" if x.layer in named else "good") for x in layers]
    return picture(bars, f"Signal to noise of the worst layers: {_spoken(bars)}", most)


def latency(timed: Latency, recipe: str) -> Markup:
    """Median time of artifact and float twin; the line reaches p99, with ticks at p90 and p99."""
    rows = [(recipe, timed.p50_ms, timed.p90_ms, timed.p99_ms)]
    if timed.float_p50_ms and timed.float_p90_ms and timed.float_p99_ms:
        rows.append(("float", timed.float_p50_ms, timed.float_p90_ms, timed.float_p99_ms))
    longest = max(row[3] for row in rows)
    bars = []
    for index, (label, p50, p90, p99) in enumerate(rows):
        slower = index == 0 and timed.speedup is not None and timed.speedup < 1
        kind = "float" if index else "bad" if slower else "good"
        whisker = _whisker(*(97 * value / longest for value in (p50, p90, p99)))
        note = "" if timed.stable else "unstable"
        bars.append(Bar(label, words.milliseconds(p50), 97 * p50 / longest, kind, note, [whisker]))
    return picture(bars, f"Median time of one call: {_spoken(bars)}")


def sizes(result: Result) -> Markup:
    """Bytes on disk of the artifact and of its float twin."""
    most = max(result.bytes, result.float_bytes)
    kind = "good" if result.bytes <= result.float_bytes else "bad"
    bars = [
        Bar(result.recipe, words.size(result.bytes), 100 * result.bytes / most, kind),
        Bar("float", words.size(result.float_bytes), 100 * result.float_bytes / most, "float"),
    ]
    return picture(bars, f"Size on disk: {_spoken(bars)}")


def placement(result: Result) -> Markup:
    """One bar split into int8 and float operators."""
    facts = result.placement
    total = facts.int8_ops + facts.float_ops
    if total == 0:
        return Markup()
    share = 100 * facts.int8_ops / total
    rest = [_rect(share, 100 - share, "float")] if facts.float_ops else []
    narrow = f"{facts.int8_ops} in {facts.narrow}"
    bar = Bar(narrow, f"{facts.float_ops} in float", share, "good", "", rest)
    return picture([bar], f"Operators: {narrow}, {facts.float_ops} in float")


def picture(bars: list[Bar], title: str, decibels: float | None = None) -> Markup:
    """The bars below each other, described by `title`; over a grid that ends at so many decibels, where given."""
    rows = Markup().join(_row(index * _ROW, bar) for index, bar in enumerate(bars))
    height = len(bars) * _ROW
    grid = Markup()
    if decibels is not None:
        grid = _grid(decibels, height)
        height += 16
    return Markup('<svg class="picture" role="img" aria-label="{}" width="100%" height="{}">{}{}</svg>').format(
        title, height, grid, rows
    )


def _row(y: int, bar: Bar) -> Markup:
    label = Markup("<title>{}</title>{}").format(bar.label, _shortened(bar.label))
    note = Markup('<tspan class="note" dx="8">{}</tspan>').format(bar.note) if bar.note else Markup()
    if bar.remark:
        note += Markup('<tspan class="tick" dx="8">{}</tspan>').format(bar.remark)
    text = Markup('<text class="label" x="0" y="13">{}{}</text>').format(label, note)
    value = Markup('<text class="value" x="100%" y="13" text-anchor="end">{}</text>').format(bar.value)
    track = Markup('<rect class="track" x="0" y="{}" width="100%" height="{}" rx="2"/>').format(_TOP, _BAR)
    marks = Markup().join(bar.marks)
    parts = text + value + track + _rect(0, bar.share, bar.kind) + marks
    return Markup('<svg x="0" y="{}" width="100%" height="{}">{}</svg>').format(y, _ROW, parts)


def _rect(start: float, width: float, kind: str) -> Markup:
    """A part of a bar, from `start` percent, `width` percent wide."""
    return Markup('<rect class="{}" x="{:.2f}%" y="{}" width="{:.2f}%" height="{}" rx="2"/>').format(
        kind, start, _TOP, max(width, 0.0), _BAR
    )


def _whisker(p50: float, p90: float, p99: float) -> Markup:
    middle = _TOP + _BAR / 2
    line = Markup('<line class="whisker" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}"/>')
    ticks = [line.format(x, x, _TOP - 1, _TOP + _BAR + 1) for x in (p90, p99)]
    return Markup().join([line.format(p50, p99, middle, middle), *ticks])


def _grid(decibels: float, height: int) -> Markup:
    """Lines every 20 dB, with their numbers below."""
    parts = []
    for tick in range(0, int(decibels), 20):
        x = f"{100 * tick / decibels:.2f}%"
        line = Markup('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x, _TOP - 2, height)
        anchor = "middle" if tick else "start"
        label = f"{tick} dB" if tick == 0 else str(tick)
        text = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')
        parts += [line, text.format(x, height + 11, anchor, label)]
    return Markup().join(parts)


def _axis(values: list[float | None]) -> float:
    """Where the dB axis ends."""
    finite = [v for v in values if v is not None]
    return min(max([_DB_LEAST, *(v * 1.05 for v in finite)]), _DB_MOST)


def _share(signal: Signal, most: float) -> float:
    """The length of a bar in percent: exact fills it, undefined and negative leave it empty."""
    if signal.exact:
        return 100.0
    return 0.0 if signal.sqnr_db is None else min(max(100 * signal.sqnr_db / most, 0.0), 100.0)


def _or_worst(signal: Signal) -> float:
    return float("-inf") if signal.sqnr_db is None else signal.sqnr_db


def _shortened(label: str) -> Markup:
    """The label with its middle left out where it is too long for a narrow page."""
    if len(label) <= _LONGEST:
        return escape(label)
    half = _LONGEST // 2
    return escape(f"{label[: half - 1]}…{label[-half:]}")


def _spoken(bars: list[Bar]) -> str:
    return ", ".join(f"{bar.label} {bar.value}" for bar in bars)
