"""The emulator's plugin that counts instructions, compiled by this machine's compiler when a board is built."""

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "cost.c"
# Neither headers nor libraries of this machine: see the head of the source.
OPTIONS = ("-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-ffreestanding", "-nostdlib")


def compile_plugin(into: Path) -> str | None:
    """Compile the plugin to `into`; returns why it could not be, None where it was."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return "no C compiler (cc, gcc or clang) was found when the emulator was built"
    result = subprocess.run([compiler, *OPTIONS, str(SOURCE), "-o", str(into)], capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.strip().splitlines()
        return f"{compiler} could not compile the counting plugin: {said[-1] if said else result.returncode}"
    return None
