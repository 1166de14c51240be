"""What the folder of a conversion holds beside artifacts and report: manifests with hashes, and reference samples."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.samples import Batch
from convert.errors import TightfitError

MANIFEST_VERSION = 1
# What `check` re-runs: enough samples to see a fault, small enough to keep in a repository.
REFERENCE_SAMPLES = 64
REFERENCE_BYTES = 64 * 2**20


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of an artifact: {file relative to the artifact's parent: hex}, for a folder of every file in it."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {f.relative_to(path.parent).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write sorted, indented JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; TightfitError when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TightfitError(f"cannot read {path}: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TightfitError(f"{path} is damaged: {error}. Convert again.") from error
    if not isinstance(content, dict):
        raise TightfitError(f"{path} is damaged: it holds no JSON object. Convert again.")
    return content


@dataclass
class Reference:
    """Held-out inputs, the float model's outputs and each artifact's own outputs, for `check` to run again.

    Keys in the file: `input/<name>`, `float/<output>`, `artifact/<device>/<target>/<output>`, `labels`.
    """

    arrays: dict[str, list[np.ndarray]]

    @classmethod
    def empty(cls) -> "Reference":
        return cls({})

    def add(self, prefix: str, batch: Batch) -> None:
        for name, array in batch.items():
            self.arrays.setdefault(f"{prefix}/{name}", []).append(np.asarray(array))

    def get(self, prefix: str) -> Batch:
        """What was added under `prefix`, {name: [samples, ...]}."""
        own = {k: v for k, v in self.arrays.items() if k.startswith(f"{prefix}/")}
        return {k.removeprefix(f"{prefix}/"): np.concatenate(v) for k, v in own.items()}

    def write(self, path: Path) -> None:
        """Write a compressed .npz."""
        np.savez_compressed(path, **{k: np.concatenate(v) for k, v in sorted(self.arrays.items())})


def reference_count(sample_bytes: int, available: int, batch: int) -> int:
    """How many samples to keep: a multiple of the artifact's batch, at most REFERENCE_SAMPLES and REFERENCE_BYTES."""
    room = max(batch, REFERENCE_BYTES // max(sample_bytes, 1))
    count = min(available, REFERENCE_SAMPLES, room)
    return max(batch, count // batch * batch)
