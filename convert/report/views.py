"""Write a report and its views."""

from pathlib import Path

from .html import html
from .markdown import markdown
from .schema import Report
from .store import write_report, write_text


def write_views(report: Report, folder: Path) -> None:
    """Write report.json, report.html and report.md into `folder`; raises TightfitError when that is impossible."""
    write_report(report, folder / "report.json")
    write_text(html(report), folder / "report.html")
    write_text(markdown(report), folder / "report.md")
