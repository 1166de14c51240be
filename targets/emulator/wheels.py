"""The board's Python packages: wheels of its own architecture, fetched by this machine's pip as the user set it up."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from targets.errors import MissingRuntime, TargetError


def install(
    wanted: Sequence[str], into: Path, machine: str, python: str, platforms: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Unpack pinned wheels for a `machine` ("aarch64") and a `python` ("3.11") into a folder; nothing of them is run.

    Returns name -> version and SHA-256. Raises MissingRuntime without pip, TargetError where pip fails, and
    OSError where it does because the disk is full.
    """
    if importlib.util.find_spec("pip") is None:
        raise MissingRuntime(
            f"Building a board needs pip, and {sys.executable} has none: run `{sys.executable} -m ensurepip`, "
            "or with uv `uv pip install pip`."
        )
    into.parent.mkdir(parents=True, exist_ok=True)
    report = into.parent / f"{into.name}.report.json"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--target", str(into), "--report", str(report)]
    command += ["--no-compile", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python]
    for platform in platforms:
        command += ["--platform", f"{platform}_{machine}"]
    result = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        if os.strerror(errno.ENOSPC) in result.stderr:
            raise OSError(errno.ENOSPC, lines[-1])
        errors = [line for line in lines if line.startswith("ERROR: ") and "Exception:" not in line]
        raise TargetError(
            f"pip cannot fetch the board's packages ({', '.join(wanted)}): {' '.join(errors[-2:] or lines[-1:])} "
            "Look at the network, and at pip's own settings (`pip config list`)."
        )
    found = json.loads(report.read_text("utf-8"))["install"]
    report.unlink()
    return {entry["metadata"]["name"]: _record(entry) for entry in found}


def _record(entry: dict) -> dict[str, str]:
    hashes = entry["download_info"].get("archive_info", {}).get("hashes", {})
    return {"version": entry["metadata"]["version"], "sha256": hashes.get("sha256", "unknown")}
