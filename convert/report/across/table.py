"""The report across conversions as CSV: one row per artifact and place."""

import csv
import io
from typing import Any

from .schema import Across, Entry, Place

_LATENCY = (
    "runs", "p50_ms", "p90_ms", "p99_ms", "cv", "float_p50_ms", "float_p90_ms", "float_p99_ms", "speedup", "stable",
    "threads", "cpu", "governor", "load_ms", "first_ms",
)  # fmt: skip
_INSTRUCTIONS = ("all", "simd", "dot", "mla", "fmla", "load_store", "branch", "spread", "float_all")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would compute a text that begins so


def table(across: Across) -> str:
    """The CSV with a header; empty cells are what was not measured. Text that looks like a formula gets a quote."""
    rows = [_row(entry, place) for entry in across.entries for place in entry.places]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _row(entry: Entry, place: Place) -> dict[str, Any]:
    drift, timed, counted = place.drift, place.latency, place.instructions
    low, high = (timed.ratio_interval if timed else None) or (None, None)
    return {
        **{name: getattr(entry, name) for name in ("number", "folder", "model", "device", "target", "recipe")},
        "artifact": entry.artifact,
        "current": entry.current,
        "judgement": entry.judgement,
        "reasons": "; ".join(entry.reasons),
        **{name: getattr(entry, name) for name in ("bytes", "float_bytes", "accuracy", "float_accuracy", "fallbacks")},
        **{name: getattr(place, name) for name in ("where", "machine", "emulated", "outcome", "note", "executor")},
        "samples": place.samples,
        **{name: getattr(drift, name, None) for name in ("sqnr_db", "exact", "cosine", "max_abs", "top1_agreement")},
        "equal_to_host": place.equal_to_host,
        **{name: getattr(timed, name, None) for name in _LATENCY},
        "speedup_low": low,
        "speedup_high": high,
        **{f"instructions_{name}": getattr(counted, name, None) for name in _INSTRUCTIONS},
        **{f"estimate_{name}": getattr(entry.estimate, name, None) for name in ("low_ms", "mid_ms", "high_ms")},
        "energy_mj": place.energy_mj,
        "peak_rss_mib": place.peak_rss_mib,
    }


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
