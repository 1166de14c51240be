"""Read the folders of several conversions, or say which of them cannot be read and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import TightfitError
from ..schema import Report
from ..store import read_report

_REPORT = "report.json"


@dataclass(frozen=True)
class Given:
    """A folder as the user named it, and the report in it."""

    folder: str
    report: Report


def gather(folders: Sequence[Path]) -> list[Given]:
    """The reports of `folders`, in this order.

    Raises TightfitError for a folder that is missing, was given twice, or holds no report of a conversion that this
    version reads.
    """
    if not folders:
        raise TightfitError("name at least one folder that `tightfit convert` wrote.")
    seen: dict[Path, Path] = {}
    for folder in folders:
        same = seen.get(folder.resolve())
        seen[folder.resolve()] = folder
        if same is not None:
            names = f"{folder} is given twice" if same == folder else f"{same} and {folder} are the same folder"
            raise TightfitError(f"{names}; leave one out.")
    return [Given(str(folder), _report(folder)) for folder in folders]


def _report(folder: Path) -> Report:
    if folder.is_file():
        raise TightfitError(f"{folder} is a file. Name the folder that it is in: {folder.parent}.")
    if not folder.is_dir():
        raise TightfitError(f"there is no folder {folder}. `tightfit convert ... -o {folder}` makes one.")
    if not (folder / _REPORT).is_file():
        inner = sorted(str(p.parent) for p in folder.glob(f"*/{_REPORT}"))
        hint = f"It holds several results; name them: {' '.join(inner)}." if inner else "Name the folder given to -o."
        raise TightfitError(f"{folder} was not made by `tightfit convert`: it has no {_REPORT}. {hint}")
    return read_report(folder / _REPORT)
