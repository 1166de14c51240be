"""What a run on a device showed, in words: the same in the page, in Markdown, and across reports."""

from dataclasses import dataclass

from . import words
from .measures import Latency, Stage
from .runs import BoardState, DeviceRun, HostAgreement, Instructions
from .schema import Result

# Fewer samples, or other kernels, move drift by less than this; a device that loses more computes something else.
_FAR_DB = 3.0
_ROUNDING_DB = 120.0  # above, drift is float rounding
# Longer than this a sentence is no cell of a table: failures have a paragraph elsewhere.
_SHORT = 60
_CLASSES = {
    "simd": "vector and floating-point",
    "dot": "dot products of 8-bit numbers",
    "mla": "multiply-accumulate, integer",
    "fmla": "multiply-accumulate, float",
    "load_store": "loads and stores",
    "branch": "branches",
}


@dataclass(frozen=True)
class BoardRow:
    """The board at one moment, as cells; an en dash where it did not say."""

    moment: str
    clock: str
    temperature: str
    governor: str
    power: str
    throttled: str


def agreement(host: HostAgreement) -> str:
    """How the outputs there relate to those of the same file here."""
    if host.exact:
        return "the same bits"
    largest = "not finite" if host.max_abs is None else f"{host.max_abs:.3g}"
    return f"{words.percent(host.share_equal)} equal, largest difference {largest}"


def far(there: Stage | None, artifact: Stage | None) -> str:
    """How far drift there is below the artifact's on the host, in words; empty where it is not, by _FAR_DB or more."""
    if there is None or artifact is None or artifact.sqnr_db is None:
        return ""
    if there.sqnr_db is None:
        return f"undefined there: {there.undefined}"
    if there.exact or artifact.sqnr_db - there.sqnr_db < _FAR_DB or there.sqnr_db > _ROUNDING_DB:
        return ""
    return f"{words.sqnr(there)} there, {words.sqnr(artifact)} on the host that converted"


def count(value: int) -> str:
    """A number of instructions with three digits: "12.3 million"."""
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= unit * 0.9995:
            return f"{words.three_digits(value / unit)} {name}"
    return str(value)


def against_float(found: Instructions) -> str:
    """The ratio to the float twin's instructions; empty where that was not counted."""
    return "" if found.float_all is None else f"{found.all / found.float_all:.2f} of float's"


def classes(found: Instructions) -> list[tuple[str, str, int, float]]:
    """The classes that were told apart: (field, words, count, share of all). Classes overlap."""
    named = ((name, text, getattr(found, name)) for name, text in _CLASSES.items())
    return [(name, text, value, value / found.all) for name, text, value in named if value is not None]


def outcome(run: DeviceRun) -> str:
    """One word or two for a run: "failed", "void", "throttled", or "ran"."""
    if run.failure is not None:
        return "failed"
    if run.void:
        return "void"
    return "throttled" if throttled(run) else "ran"


def throttled(run: DeviceRun) -> str:
    """What the board said slowed it down at any moment; empty when nothing did."""
    return "; ".join(dict.fromkeys(state.throttled for state in run.board if state.throttled))


def time_cell(run: DeviceRun) -> str:
    """The median there, or shortly why there is none."""
    if run.latency is not None:
        return words.milliseconds(run.latency.p50_ms)
    if run.void:
        return "void"
    if run.emulated:
        return "emulated: no time"
    note = run.latency_note or ""
    return note if len(note) <= _SHORT else "not timed"


def loading(latency: Latency) -> str:
    """Load and first call, which no percentile contains; empty where they were not taken."""
    parts = []
    if latency.load_ms is not None:
        parts.append(f"loading the file took {words.milliseconds(latency.load_ms)}")
    if latency.first_ms is not None:
        parts.append(f"the first call {words.milliseconds(latency.first_ms)}")
    return ", ".join(parts)


def heat(run: DeviceRun) -> str:
    """What a sustained run did to the median, in a sentence; empty without one."""
    if len(run.sustained) < 2:
        return ""
    first, last = run.sustained[0], run.sustained[-1]
    change = last.p50_ms / first.p50_ms - 1
    text = (
        f"After {last.minute:.0f} minutes the median is {words.milliseconds(last.p50_ms)}, "
        f"{abs(change):.0%} {'slower' if change > 0 else 'faster'} than in the first stretch"
    )
    warm = [p.temperature_c for p in run.sustained if p.temperature_c is not None]
    return f"{text}; {max(warm):.0f} °C at most." if warm else f"{text}."


def board(run: DeviceRun) -> list[BoardRow]:
    """Before, during and after: states of one moment are one row, with the range of what they said."""
    moments = dict.fromkeys(state.moment for state in run.board)
    return [_row(moment, [s for s in run.board if s.moment == moment]) for moment in moments]


def _row(moment: str, states: list[BoardState]) -> BoardRow:
    return BoardRow(
        moment=moment,
        clock=_range([s.clock_mhz for s in states], "MHz"),
        temperature=_range([s.temperature_c for s in states], "°C"),
        governor=", ".join(dict.fromkeys(s.governor for s in states if s.governor)) or "–",
        power=_range([s.power_w for s in states], "W"),
        throttled="; ".join(dict.fromkeys(s.throttled for s in states if s.throttled)),
    )


def _range(values: list[float | None], unit: str) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    low, high = f"{min(known):.4g}", f"{max(known):.4g}"
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def estimated(result: Result) -> str:
    """What one call should take on the device, as an estimate with its interval; "" where there is none."""
    found = result.estimate
    if found is None:
        return ""
    threads = "" if found.threads is None else f", {found.threads} thread{'s' * (found.threads > 1)}"
    low, middle, high = (words.milliseconds(value) for value in (found.low_ms, found.mid_ms, found.high_ms))
    beside = "" if found.float_mid_ms is None else f"; float {words.milliseconds(found.float_mid_ms)}"
    return f"estimate for {result.device}, not measured: {middle} ({low} to {high}{threads}{beside})"
