"""Numbers and verdicts in words, the same in every view."""

from .schema import Accuracy, Latency, Report, Result, Signal


def sqnr(signal: Signal) -> str:
    """An SQNR: "26.9 dB", "exact", or "undefined"."""
    if signal.exact:
        return "exact"
    return "undefined" if signal.sqnr_db is None else f"{signal.sqnr_db:.1f} dB"


def size(count: int) -> str:
    """Bytes in decimal units, three digits or so: "312 kB", "1.09 MB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{three_digits(value)} {unit}"


def memory(result: Result) -> str:
    """What the artifact keeps in memory, for a table's cell: ", RAM 1.2 MB"; nothing where it was not measured."""
    return "" if result.resident is None else f", RAM {size(result.resident.bytes)}"


def milliseconds(value: float) -> str:
    """A time with three digits: "0.642 ms"; microseconds under a hundredth of a millisecond."""
    return f"{three_digits(value * 1000)} µs" if value < 0.01 else f"{three_digits(value)} ms"


def percent(share: float) -> str:
    """A share [0, 1] with two digits after the point: "91.95 %"."""
    return f"{share * 100:.2f} %"


def points(accuracy: Accuracy) -> str:
    """The change of accuracy from float to artifact in percentage points, with its sign: "−0.15"."""
    change = (accuracy.artifact - accuracy.float_) * 100
    text = f"{abs(change):.2f}"
    return text if float(text) == 0 else f"{'−' if change < 0 else '+'}{text}"


def speed(latency: Latency | None) -> str:
    """The speed against float: "2.10x faster", "0.83x: slower", with "unstable" where it is; "not measured"."""
    if latency is None or latency.speedup is None:
        return "not measured"
    if latency.speedup < 1:
        text = f"{latency.speedup:.2f}x, slower"
    else:
        text = f"{latency.speedup:.2f}x as fast"
    return text if latency.stable else f"{text}, unstable"


def match(result: Result) -> str:
    """How the artifact's outputs relate to the simulation's."""
    if result.match.exact:
        return "bit-exact"
    return "within one step" if result.match.within_one_step else "differs"


def result_failed(result: Result) -> bool:
    """True when a gate failed, float is faster, or the artifact does not compute what its simulation does."""
    return any(not gate.passed for gate in result.gates) or not result.match.within_one_step or slower(result)


def slower(result: Result) -> bool:
    """True when an artifact that is to be smaller or faster than float was measured slower, in its own runtime.

    Times of a device, where there are any, count in place of those of this machine.
    """
    there = [run.latency for run in result.runs if run.latency is not None and run.on != "local"]
    if there:
        return any(latency.stable and latency.surely_slower for latency in there)
    latency = result.latency
    same = result.recipe.endswith("float32") and result.tokens is None  # as float: a time apart is noise
    if latency is None or not latency.stable or same or elsewhere(result):
        return False
    return latency.surely_slower


def elsewhere(result: Result) -> str:
    """Why a time on this machine says nothing of the artifact's runtime on the device; empty where it does."""
    if any("TensorRT" in name for name in result.placement.kinds):
        return "where ONNX Runtime ran it and not TensorRT: measure on the device"
    if "exact sums" in result.executor:
        return "where ONNX Runtime ran it with exact sums, not with its fast kernels: measure on the device"
    return ""


def verdict(report: Report) -> str:
    """One sentence for the whole report."""
    total = len(report.results)
    failed = [r for r in report.results if result_failed(r)]
    unjudged = sum(not r.gates for r in report.results)
    noun = "artifact" if total == 1 else "artifacts"
    if failed:
        why = ["slower than float" if slower(r) and all(g.passed for g in r.gates) else "" for r in failed]
        names = [f"{r.subject} ({w})" if w else r.subject for r, w in zip(failed, why, strict=True)]
        return f"{len(failed)} of {total} {noun} failed: {', '.join(names)}"
    if unjudged == total:
        return f"{total} {noun} made; no gate was set, so nothing was judged"
    if unjudged:
        return f"{total - unjudged} of {total} {noun} passed every gate; no gate was set for the rest"
    return f"{'The' if total == 1 else 'All'} {'' if total == 1 else f'{total} '}{noun} passed every gate"


def three_digits(value: float) -> str:
    """A number with three digits or so: "0.642", "12.3", "312"."""
    places = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{places}f}"
