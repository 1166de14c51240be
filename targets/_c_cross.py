"""A folder of C sources compiled here for another processor, as a shared library that the agent there loads."""

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from ._c_session import build, compiler, compiler_version, read_manifest
from .errors import MissingRuntime, TargetError

# The kernel's name of an architecture -> Debian's package of a compiler for it.
PACKAGES = {"aarch64": "gcc-aarch64-linux-gnu", "riscv64": "gcc-riscv64-linux-gnu", "x86_64": "gcc-x86-64-linux-gnu"}


@dataclass(frozen=True)
class Processor:
    """What to compile for: the kernel's name of the architecture ("aarch64"), and QEMU's of the core ("cortex-a72")."""

    architecture: str
    core: str

    @property
    def flags(self) -> tuple[str, ...]:
        """What tells gcc of the core: its dot product and vectors, if it has them."""
        if self.architecture == "aarch64":
            return (f"-mcpu={self.core}",)
        if self.architecture == "x86_64":
            return (f"-march={self.core.partition('-')[0].lower()}",)
        return ()


def cross_compiler(processor: Processor) -> str:
    """The compiler here for a processor. Raises MissingRuntime where there is none, with the package that has it."""
    if processor.architecture == platform.machine():
        return compiler()
    name = f"{processor.architecture}-linux-gnu-gcc"
    found = shutil.which(name)
    if found is None:
        package = PACKAGES.get(processor.architecture)
        how = f"Install it (Debian: apt-get install {package})." if package else "Put one of this name on the PATH."
        raise MissingRuntime(
            f"C sources are compiled on this machine before they go to a board, and there is no {name} here. {how}"
        )
    return found


def library(path: Path, output: Path, processor: Processor) -> str:
    """Compile the artifact `path` for a processor to the library `output`; returns compiler, version and flags.

    Raises MissingRuntime without a compiler for it, TargetError where `path` is no artifact or does not compile.
    """
    if not path.is_dir():
        raise TargetError(f"there is no folder {path}. Convert the model again.")
    read_manifest(path)
    command = cross_compiler(processor)
    build(path, output, *processor.flags, command=command)
    return " ".join((compiler_version(command), *processor.flags))
