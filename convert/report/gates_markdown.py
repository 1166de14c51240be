"""The verdicts of a check as a pull-request comment."""

from collections.abc import Iterable

from .comment import MOST_ROWS, fitting, plain, rest
from .schema import GateResult


def gates_markdown(gates: Iterable[GateResult], title: str = "tightfit check") -> str:
    """The verdicts of a check in Markdown: a verdict line, what failed first, then what passed."""
    rows = list(gates)
    failed = [row for row in rows if not row.passed]
    if not rows:
        headline = f"### ❌ {plain(title)}: no gate was checked"
    elif failed:
        headline = f"### ❌ {plain(title)}: {len(failed)} of {len(rows)} gates failed"
    else:
        headline = f"### ✅ {plain(title)}: all {len(rows)} gates passed"
    if not rows:
        return headline + "\n"
    ordered = failed + [row for row in rows if row.passed]
    table = ["", "| | Result | Gate | Limit | Value | Reason |", "|---|---|---|---:|---:|---|"]
    table += [_gate_row(row) for row in ordered[:MOST_ROWS]]
    return fitting([headline, *table, *rest(len(ordered))])


def _gate_row(row: GateResult) -> str:
    value = "–" if row.value is None else f"{row.value:.6g}"
    sign = "✅" if row.passed else "❌"
    cells = [sign, plain(row.subject), f"`{row.gate}`", f"{row.limit:.6g}", value, plain(row.reason) or "–"]
    return f"| {' | '.join(cells)} |"
