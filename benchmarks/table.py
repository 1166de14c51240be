"""The rows of the comparison and how they are printed; every number is a measurement or a dash with its reason."""

import math
from dataclasses import dataclass

from convert.report.schema import Environment, Latency, Report, Stage

HEADER = (
    "model",
    "device",
    "format",
    "how",
    "SQNR dB",
    "top-1 % or cosine",
    "size KiB",
    "p50 ms",
    "speed-up (95 %)",
    "s",
    "peak MiB",
)
LEFT = 4  # so many columns hold words


@dataclass(frozen=True)
class Quality:
    """Top-1 of float and artifact as shares where there are labels, else the mean cosine of the outputs with float."""

    top1: tuple[float, float] | None
    cosine: float | None


@dataclass(frozen=True)
class Row:
    """One converted artifact. `seconds` and `peak_mib` are those of the process that converted it.

    `sqnr_db` is infinite where nothing differs from float, NaN where outputs are not finite. `no_latency` says why
    there is no latency. `failure` is what the converter said when it made no artifact; then nothing was measured.
    """

    model: str
    device: str
    format: str
    how: str
    sqnr_db: float | None = None
    quality: Quality | None = None
    float_bytes: int | None = None
    bytes: int | None = None
    latency: Latency | None = None
    no_latency: str | None = None
    seconds: float | None = None
    peak_mib: float | None = None
    failure: str | None = None


def row(model: str, report: Report) -> Row:
    """The row of a conversion for one device and one target."""
    (result,) = report.results
    stage = result.drift.artifact
    found = result.accuracy
    top1 = None if found is None else (found.float_, found.artifact)
    return Row(
        model=model,
        device=result.device,
        format=result.target,
        how=result.recipe.removeprefix("auto: "),
        sqnr_db=_ratio(stage),
        quality=Quality(top1, stage.cosine),
        float_bytes=result.float_bytes,
        bytes=result.bytes,
        latency=result.latency,
        no_latency=result.latency_note,
        seconds=report.convert_seconds,
        peak_mib=report.peak_rss_mib,
    )


def _ratio(stage: Stage) -> float:
    if stage.sqnr_db is not None:
        return stage.sqnr_db
    return math.inf if stage.exact else math.nan


def markdown(rows: list[Row], environment: Environment, date: str, settings: str, skipped: list[str]) -> str:
    """The whole results file."""
    notes: list[str] = []
    lines = [_line(HEADER), _line(["---"] * LEFT + ["---:"] * (len(HEADER) - LEFT))]
    lines += [_line(cells(r, notes)) for r in rows]
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    where = f"{date}, {environment.cpu}, {environment.os}, Python {environment.python}; {packages}."
    paragraphs = ["# Results of `compare.py`", f"{where} {settings}", "\n".join(lines)]
    remarks = [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    paragraphs += [*remarks, *skipped, "What the columns mean is in [README.md](README.md)."]
    return "\n\n".join(paragraphs) + "\n"


def cells(r: Row, notes: list[str]) -> list[str]:
    """The cells of a row; a reason for a dash goes to `notes` and leaves its number in the cell."""
    words = [r.model, r.device, r.format, r.how]
    if r.failure is not None:
        return [*words, f"failed {_note(r.failure, notes)}", *["-"] * (len(HEADER) - LEFT - 1)]
    return [
        *words,
        "exact" if r.sqnr_db == math.inf else "none" if math.isnan(r.sqnr_db) else f"{r.sqnr_db:.1f}",
        _quality(r.quality),
        f"{r.float_bytes / 1024:,.0f} → {r.bytes / 1024:,.0f}",
        *_latency(r, notes),
        f"{r.seconds:.0f}",
        f"{r.peak_mib:,.0f}",
    ]


def _quality(quality: Quality) -> str:
    if quality.top1 is not None:
        before, after = quality.top1
        return f"{100 * before:.2f} → {100 * after:.2f}"
    return "none" if quality.cosine is None or math.isnan(quality.cosine) else f"cosine {quality.cosine:.4f}"


def _latency(r: Row, notes: list[str]) -> tuple[str, str]:
    found = r.latency
    if found is None or found.speedup is None:
        reason = r.no_latency or "the float twin was not timed"
        return f"- {_note(reason, notes)}", "-"
    low, high = found.ratio_interval
    doubt = "" if found.stable else "~"
    times = f"{found.float_p50_ms:.2f} → {found.p50_ms:.2f}"
    return times, f"{doubt}{found.speedup:.2f} ({low:.2f} to {high:.2f})"


def _note(text: str, notes: list[str]) -> str:
    if text not in notes:
        notes.append(text)
    return f"[{notes.index(text) + 1}]"


def _line(values: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(values)} |"
