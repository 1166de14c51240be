"""What is installed, what is missing, and the command that brings it; reads metadata, imports no library."""

import importlib.util
import platform
import re
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

PACKAGES = ("convert", "calibrate", "targets", "device_profiles")
DISTRIBUTION = "tightfit"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

SHIPPED = re.compile(rf"^({'|'.join(PACKAGES)})/[^,]*\.py,", re.MULTILINE)

Kind = Literal["core", "extra", "runtime", "tool"]
State = Literal["ok", "missing", "unsuitable"]
Version = tuple[int, ...]


class Finding(BaseModel):
    """One thing the tool needs or can use. `command` brings or repairs it; None where there is nothing to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Kind
    version: str | None
    state: State
    command: str | None = None
    note: str = ""


def diagnose() -> list[Finding]:
    """Everything worth knowing about this environment, what the core needs first."""
    return [
        _python(sys.version_info[:3]),
        _library("torch", "core", (2, 13), (2, 14), "torch.export's operators change between releases"),
        _library("numpy", "core", (1, 26), (2, 4), "numpy 2.4 breaks some Core ML conversions"),
        _library("onnx", "core", (1, 18)),
        _library("onnxscript", "core", (0, 5)),
        _library("onnxruntime", "runtime", (1, 20)),
        _library("litert-torch", "extra", (0, 10), (0, 11), "lowers to TFLite", extra="tflite"),
        _litert(),
        _library("coremltools", "extra", (9, 0), (10,), coreml_note(platform.system()), extra="coreml"),
        _browser(),
        *_own(),
    ]


def parsed(version: str) -> Version:
    """The release numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def fits(version: str, low: Version, high: Version | None) -> bool:
    """True when low <= version < high, by release numbers."""
    numbers = parsed(version)
    return numbers >= low and (high is None or numbers < high)


def coreml_note(system: str) -> str:
    """Who runs a Core ML artifact on this operating system."""
    if system == "Darwin":
        return "converts, and predicts with Core ML itself"
    return "converts; prediction only on macOS, elsewhere the reference executor checks the numbers"


def _python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if version >= (3, 11):
        return Finding(name="python", kind="core", version=text, state="ok")
    return Finding(name="python", kind="core", version=text, state="unsuitable", command="install Python 3.11 or newer")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _library(
    name: str, kind: Kind, low: Version, high: Version | None = None, note: str = "", *, extra: str = ""
) -> Finding:
    version = _installed(name)
    bounds = f">={'.'.join(map(str, low))}" + (f",<{'.'.join(map(str, high))}" if high else "")
    command = f'pip install "{DISTRIBUTION}[{extra}]"' if extra and version is None else f'pip install "{name}{bounds}"'
    state: State = "missing" if version is None else "ok" if fits(version, low, high) else "unsuitable"
    return Finding(
        name=name, kind=kind, version=version, state=state, command=None if state == "ok" else command, note=note
    )


def _litert() -> Finding:
    """ai-edge-litert, or tflite_runtime on a device where only that installs."""
    small = _installed("tflite-runtime")
    if _installed("ai-edge-litert") is None and small is not None:
        return Finding(name="tflite-runtime", kind="runtime", version=small, state="ok", note="runs TFLite")
    return _library("ai-edge-litert", "runtime", (2, 1), note="runs TFLite", extra="tflite")


def _browser() -> Finding:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    note = "optional: takes the pictures of reports"
    if path is None:
        command = "install Chromium with your system's package manager"
        return Finding(name="chromium", kind="tool", version=None, state="missing", command=command, note=note)
    return Finding(name="chromium", kind="tool", version=None, state="ok", note=f"{note}; {path}")


def _own() -> list[Finding]:
    """Are the packages that import here ours? Their names are common words that another distribution may ship too."""
    try:
        ours = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [_uninstalled(package) for package in PACKAGES]
    shippers = [(d.metadata["Name"], _shipped(d)) for d in metadata.distributions()]
    findings = []
    for package in PACKAGES:
        others = {name for name, shipped in shippers if package in shipped and name != DISTRIBUTION}
        home = Path(str(ours.locate_file(package))).resolve() if package in _shipped(ours) else None
        findings.append(judged(package, _folder(package), home, ours.version, others))
    return findings


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent.resolve() if spec is not None and spec.origin else None


def _uninstalled(package: str) -> Finding:
    folder = _folder(package)
    note = f"runs from {folder}, not installed: nothing to compare with"
    return Finding(name=package, kind="core", version=None, state="ok" if folder else "missing", note=note)


def judged(package: str, imported: Path | None, installed: Path | None, version: str, others: Iterable[str]) -> Finding:
    """The verdict on one of our packages: `imported` is what Python finds, `installed` what we installed (None where
    the installation is editable and says no folder), `others` the distributions that ship the same name."""
    repair = f"pip install --force-reinstall --no-deps {DISTRIBUTION}, in an environment of its own (pipx, uv tool)"
    culprits = ", ".join(sorted(others))
    note = ""
    if culprits:
        note = f"{culprits} ships a package '{package}' too and overwrites ours"
    elif imported is None:
        note = "not on Python's path"
    elif installed is not None and imported != installed:
        note = f"Python finds {imported} before ours in {installed}"
    state: State = "unsuitable" if note else "ok"
    return Finding(name=package, kind="core", version=version, state=state, command=repair if note else None, note=note)


def _shipped(distribution: metadata.Distribution) -> set[str]:
    """Which of our package names the distribution's list of files holds. Read as text: there are thousands of files."""
    return set(SHIPPED.findall(distribution.read_text("RECORD") or ""))
