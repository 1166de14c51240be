"""What this machine is: names and versions that can change a number."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from .report.schema import Environment

PACKAGES = (
    "tightfit",
    "torch",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "litert-torch",
    "ai-edge-litert",
    "tflite-runtime",
    "coremltools",
)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name; on an Arm board the board's, else the bare architecture."""
    fields = _cpuinfo(cpuinfo)
    for key in ("model name", "Model", "Hardware"):
        if fields.get(key):
            return f"{fields[key]} ({platform.machine()})"
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if answer:
            return f"{answer} ({platform.machine()})"
    return platform.processor() or platform.machine()


def governor(path: Path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) -> str | None:
    """The frequency governor of the first core, or None where the system does not say."""
    try:
        return path.read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def versions() -> dict[str, str]:
    """The version of each of PACKAGES that is installed; reads metadata, imports nothing."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def system() -> str:
    """Operating system, release and architecture."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def environment() -> Environment:
    """All of this, as the report has it."""
    return Environment(python=platform.python_version(), packages=versions(), os=system(), cpu=cpu_name())


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first value of every field of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return fields
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields
