"""What the host asks for: the file job.json, read and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .problems import FAILED, Problem

VERSION = 1


@dataclass(frozen=True)
class Timing:
    """How to time. `affinity` "big" binds to the fastest cores where that can be; `sustained_seconds` is for heat."""

    min_runs: int
    min_seconds: float
    warmup_seconds: float
    sustained_seconds: float
    affinity: str | None


@dataclass(frozen=True)
class Artifact:
    """One file to be run, under the name that its results bear.

    `data`: files of constants beside it, {name here: name that the file refers to}. `config` and `disabled` are session
    config entries and optimizers that are switched off, for ONNX Runtime; for compiled C, `config` describes it.
    """

    name: str
    file: str
    data: dict[str, str]
    config: dict[str, str]
    disabled: list[str]


@dataclass(frozen=True)
class Job:
    """The artifacts, the file with their inputs [n, ...], and what to measure. `identity` is handed back."""

    identity: str
    artifacts: list[Artifact]
    inputs: str
    batch: int
    threads: int
    count: int
    timing: Timing | None


def read(path: Path) -> Job:
    """The job of a file. Raises Problem for a file that is none, or of another version."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["version"] != VERSION:
            raise Problem(FAILED, f"the agent understands jobs of version {VERSION}, not {fields['version']}.")
        timing = fields["timing"]
        return Job(
            identity=str(fields["identity"]),
            artifacts=[_artifact(entry) for entry in fields["artifacts"]],
            inputs=str(fields["inputs"]),
            batch=int(fields["batch"]),
            threads=int(fields["threads"]),
            count=int(fields["count"]),
            timing=None if timing is None else Timing(**timing),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(FAILED, f"{path.name} is no job for the agent: {error!r}") from error


def _artifact(entry: dict[str, Any]) -> Artifact:
    return Artifact(
        name=str(entry["name"]),
        file=str(entry["file"]),
        data=dict(entry.get("data", {})),
        config=dict(entry.get("config", {})),
        disabled=list(entry.get("disabled", [])),
    )
