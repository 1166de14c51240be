"""Read and write report.json, whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import TightfitError
from .schema import SCHEMA_VERSION, Report


def write_text(text: str, path: Path) -> None:
    """Write `text` (UTF-8) beside `path` and rename: a reader sees the old file or the new one, never a part.

    Raises TightfitError when the folder cannot be written or the disk is full.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise TightfitError(
            f"cannot write {path}: {error.strerror or error}. Free some space or choose another folder."
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_report(report: Report, path: Path) -> None:
    """Write `report` as JSON to `path`; raises TightfitError when that is impossible."""
    write_text(json.dumps(report.model_dump(mode="json"), indent=2, allow_nan=False) + "\n", path)


def read_report(path: Path) -> Report:
    """The report in `path`; raises TightfitError when it is missing, of another kind or version, or malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TightfitError(f"cannot read the report {path}: {error.strerror or error}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise TightfitError(f"{path} is not a report: {error}. Run `tightfit convert` again to make one.") from error
    if isinstance(data, dict) and data.get("kind") == "across":
        raise TightfitError(
            f"{path} compares several conversions; `tightfit report` made it. Name the folders that `tightfit convert` "
            "wrote instead."
        )
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise TightfitError(
            f"{path} has schema_version {version!r}; this Tightfit reads {SCHEMA_VERSION}. "
            "Make the report again with this version, or read it with the version that wrote it."
        )
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise TightfitError(
            f"{path} is not a valid report: {where}: {first['msg']} ({error.error_count()} in all). "
            "Run `tightfit convert` again to make one."
        ) from error


def json_schema() -> dict[str, Any]:
    """The JSON Schema of report.json as it is written; docs/report.schema.json holds it."""
    return Report.model_json_schema(mode="serialization", by_alias=True)
