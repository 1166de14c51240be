"""The report as a pull-request comment: a verdict, one table, what failed, what to know."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from . import words
from .schema import GateResult, Report, Result

COMMENT_LIMIT = 65_536  # characters GitHub accepts in one comment
MOST_ROWS = 40
_LONGEST_TEXT = 300
_T = TypeVar("_T")  # type parameters in brackets need Python 3.12
_ESCAPED = re.compile(r"([\\`*_\[\]|~#])")


def markdown(report: Report) -> str:
    """The report in GitHub's Markdown, always under COMMENT_LIMIT characters; report.json has what is cut."""
    failed = [gate for r in report.results for gate in r.gates if not gate.passed]
    bad = any(words.result_failed(r) for r in report.results)
    judged = any(r.gates for r in report.results)
    sign = "❌" if bad else "✅" if judged else "➖"
    parts = [f"### {sign} {_text(report.model.name)}: {_text(words.verdict(report))}", ""]
    parts += _results(report.results)
    parts += _section("Failed gates", failed, _failure)
    parts += _section("Warnings", report.warnings, _text)
    parts += ["", f"{report.convert_seconds:.0f} s, {report.peak_rss_mib:.0f} MiB, {_text(report.environment.cpu)}"]
    return _fitting(parts)


def gates_markdown(gates: Iterable[GateResult], title: str = "tightfit check") -> str:
    """The verdicts of a check in Markdown: a verdict line, what failed first, then what passed."""
    rows = list(gates)
    failed = [row for row in rows if not row.passed]
    if not rows:
        headline = f"### ❌ {_text(title)}: no gate was checked"
    elif failed:
        headline = f"### ❌ {_text(title)}: {len(failed)} of {len(rows)} gates failed"
    else:
        headline = f"### ✅ {_text(title)}: all {len(rows)} gates passed"
    if not rows:
        return headline + "\n"
    ordered = failed + [row for row in rows if row.passed]
    table = ["", "| | Result | Gate | Limit | Value | Reason |", "|---|---|---|---:|---:|---|"]
    table += [_gate_row(row) for row in ordered[:MOST_ROWS]]
    return _fitting([headline, *table, *_rest(len(ordered))])


def _results(results: Sequence[Result]) -> list[str]:
    head = [
        "| | Device | Target | Recipe | Drift | Accuracy | Size | Speed | int8 / float / fallbacks | Simulation |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    # Failures first: where the table is cut, they are what is left.
    ordered = sorted(results, key=lambda r: not words.result_failed(r))
    return head + [_result_row(r) for r in ordered[:MOST_ROWS]] + _rest(len(ordered))


def _result_row(r: Result) -> str:
    sign = "❌" if words.result_failed(r) else "✅" if r.gates else "➖"
    accuracy = "–"
    if r.accuracy is not None:
        accuracy = f"{words.percent(r.accuracy.artifact)} ({words.points(r.accuracy)})"
    facts = r.placement
    cells = [
        sign,
        _text(r.device),
        _text(r.target),
        _text(r.recipe),
        words.sqnr(r.drift.artifact),
        accuracy,
        f"{words.size(r.bytes)} ({r.bytes / r.float_bytes:.2f})",
        words.speed(r.latency),
        f"{facts.int8_ops} / {facts.float_ops} / {len(facts.fallbacks)}",
        words.match(r),
    ]
    return f"| {' | '.join(cells)} |"


def _failure(gate: GateResult) -> str:
    return f"{_text(gate.subject)} `{gate.gate}`: {_text(gate.reason)}"


def _gate_row(row: GateResult) -> str:
    value = "–" if row.value is None else f"{row.value:.6g}"
    sign = "✅" if row.passed else "❌"
    cells = [sign, _text(row.subject), f"`{row.gate}`", f"{row.limit:.6g}", value, _text(row.reason) or "–"]
    return f"| {' | '.join(cells)} |"


def _section(title: str, items: Sequence[_T], line: Callable[[_T], str]) -> list[str]:
    if not items:
        return []
    return ["", f"**{title}**", "", *(f"- {line(item)}" for item in items[:MOST_ROWS]), *_rest(len(items))]


def _rest(count: int) -> list[str]:
    return [f"\n…and {count - MOST_ROWS} more: see report.json"] if count > MOST_ROWS else []


def _fitting(lines: list[str]) -> str:
    """The lines, as many as fit, and a word about those that do not."""
    note = "\n…the rest did not fit: see report.json\n"
    text = "\n".join(lines) + "\n"
    if len(text) < COMMENT_LIMIT:
        return text
    kept, length = [], len(note)
    for line in lines:
        length += len(line) + 1
        if length >= COMMENT_LIMIT:
            break
        kept.append(line)
    return "\n".join(kept) + note


def _text(text: str) -> str:
    """Foreign text as plain text: one line, no markup, no mention of anybody, not endless."""
    line = " ".join(text.split())
    if len(line) > _LONGEST_TEXT:
        line = line[: _LONGEST_TEXT - 1] + "…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")
    return _ESCAPED.sub(r"\\\1", line)
