"""What ends the agent's work: an error of a kind that the host can tell apart."""

from __future__ import annotations

import sys

MISSING_RUNTIME, REFUSED, FAILED = "missing_runtime", "refused", "failed"


class Problem(Exception):
    """`kind` is one of the three above; `text` is for the user: what failed, the cause, and the next step."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind, self.text = kind, text


def first_line(error: BaseException) -> str:
    """What an error says, on one line of bearable length."""
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else type(error).__name__


def missing(name: str, package: str, error: ImportError) -> Problem:
    """The problem of a runtime that cannot be imported, and how to bring it."""
    why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load: {error};"
    command = f"{sys.executable or 'python3'} -m pip install {package}"
    return Problem(
        MISSING_RUNTIME,
        f"{name} {why} for Python {sys.version.split()[0]} there ({sys.executable or 'python3'}). "
        f"Install it on the device: {command}",
    )
