"""The report as one self-contained HTML page: no network, no script, light and dark, printable."""

from pathlib import Path
from typing import Any

from . import pictures, run_pictures, run_words, token_pictures, words
from .schema import Report, Result

_FOLDER = Path(__file__).parent
MOST_LEDGER_ROWS = 400


def html(report: Report) -> str:
    """The page as text. Everything that came from a user is escaped by the template."""
    return page(
        "report.html.j2",
        report=report,
        token_pictures=token_pictures,
        anchors={r.subject: f"result-{i}" for i, r in enumerate(report.results, 1)},
        by_reason=by_reason,
        most_ledger_rows=MOST_LEDGER_ROWS,
        failed=any(words.result_failed(r) for r in report.results),
    )


def page(template: str, **values: Any) -> str:
    """A template of this folder with `values`, and with the words and pictures that every page uses; all is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = {"words": words, "pictures": pictures, "run_words": run_words, "run_pictures": run_pictures}
    return environment.get_template(template).render(**shared, **values)


def by_reason(result: Result) -> dict[str, list[str]]:
    """The nodes of a result's fallbacks, grouped by reason, the most frequent reason first."""
    groups: dict[str, list[str]] = {}
    for fallback in result.placement.fallbacks:
        groups.setdefault(fallback.reason, []).append(fallback.node)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))
