"""TFLite: lowered by litert-torch, run by LiteRT with XNNPACK."""

import importlib.util
from pathlib import Path

from . import Job, Placement, Session

MISSING = "pip install 'tightfit[tflite]'"


class TFLite:
    """The target; see the module docstring."""

    suffix = ".tflite"
    quantizes_dynamically = True

    def missing(self) -> str | None:
        """The pip command that brings what is not installed, or None."""
        found = all(importlib.util.find_spec(m) for m in ("litert_torch", "ai_edge_litert", "flatbuffers"))
        return None if found else MISSING

    def lower(self, job: Job, path: Path) -> None:
        """Write `path`. Raises TargetError for what litert-torch cannot lower, MissingRuntime without it."""
        from ._tflite_lower import lower

        path.write_bytes(lower(job))

    def placement(self, path: Path, job: Job) -> Placement:
        """Read the file back: what each operator computes in, and the layers that came out float."""
        from ._tflite_placement import placement

        return placement(path, job)

    def open(self, path: Path, *, threads: int = 1) -> Session:
        """Load the file into LiteRT, or tflite-runtime where that is what there is."""
        from ._tflite_run import TFLiteSession

        return TFLiteSession(path, threads)


TARGET = TFLite()
