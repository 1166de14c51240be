"""Make the report across conversions, and write it as a folder that is whole or not there."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...budget import read_budget
from ...errors import TightfitError
from ...out_folder import written_whole
from ..store import write_text
from .choose import choices
from .entries import entries
from .gather import Given, gather
from .history import histories
from .page import page
from .schema import KIND, Across, Source
from .table import table

FILES = ("report.html", "report.csv", "report.json")


def across(folders: Sequence[Path], out: Path, budget: Path | None, *, force: bool, command: str) -> Across:
    """Read `folders`, compare, and write `out`: report.html, report.csv and report.json.

    Raises TightfitError for folders or a budget that cannot be read, and when `out` may not be written or replaced.
    """
    _refuse_foreign(out, force)
    made = compared(gather(folders), budget, command)
    with written_whole(out, force) as work:
        write_text(page(made), work / "report.html")
        write_text(table(made), work / "report.csv")
        write_text(json.dumps(made.model_dump(mode="json"), indent=2, allow_nan=False) + "\n", work / "report.json")
    return made


def compared(given: Sequence[Given], budget: Path | None, command: str) -> Across:
    """The reports side by side; raises TightfitError as `across` does."""
    sources = tuple(_source(one) for one in given)
    found = entries(given, read_budget(budget) if budget else None)
    return Across(
        command=command,
        budget=str(budget) if budget else None,
        warnings=tuple(_warnings(given)),
        sources=sources,
        entries=tuple(found),
        choices=tuple(choices(found)),
        histories=tuple(histories(found, sources)),
    )


def _source(one: Given) -> Source:
    report = one.report
    return Source(
        folder=one.folder,
        model=report.model.name,
        parameters=report.model.parameters,
        fingerprint=report.model.fingerprint,
        evaluation=report.evaluation.fingerprint,
        cpu=report.environment.cpu,
        command=report.command,
        warnings=report.warnings,
    )


def _warnings(given: Sequence[Given]) -> list[str]:
    """What makes numbers of different folders no comparison."""
    found = []
    for model in dict.fromkeys(one.report.model.name for one in given):
        reports = [one.report for one in given if one.report.model.name == model]
        if len({r.evaluation.fingerprint for r in reports}) > 1:
            found.append(f"{model}: the folders were judged on different evaluation samples; drift does not compare.")
        if len({r.model.fingerprint for r in reports}) > 1:
            found.append(f"{model}: the folders hold different weights or graphs of a model of this name.")
    hosts = Counter(one.report.environment.cpu for one in given)
    if len(hosts) > 1:
        found.append(f"converted on different hosts ({', '.join(hosts)}): times on the host do not compare.")
    for one in given:
        if one.report.calibration.synthetic:
            found.append(f"{one.folder}: calibrated on random numbers, which nobody measured.")
    return found


def _refuse_foreign(out: Path, force: bool) -> None:
    """Raise TightfitError unless `out`, where it is to be replaced, is a report of this kind and nothing besides.

    A conversion has a report.json, too: without this, --force would delete its artifacts.
    """
    if not force or not out.exists():
        return
    inside = {p.name for p in out.iterdir()} if out.is_dir() else {out.name}
    if inside and not (inside <= set(FILES) and is_across(out / "report.json")):
        raise TightfitError(
            f"{out} is not a report that `tightfit report` made, or holds more than that, so --force will not delete "
            "it. Choose another folder with -o."
        )


def is_across(path: Path) -> bool:
    """Whether a file is a report of this kind, of any version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND
