"""Graph in, artifact out; artifact in, outputs out. One target per file, the file's name is its name."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from calibrate.samples import Batch, InputSpec
from device_profiles import TargetRules

from .errors import TargetError

if TYPE_CHECKING:
    import torch

FloatFormat = Literal["float32", "float16"]


@dataclass(frozen=True)
class Job:
    """What a target lowers.

    `graph` maps positional tensors (in the order of `inputs`) to a tuple of tensors (in the order of `outputs`);
    its vocabulary is ATen as `torch.export` gives it, plus what `calibrate/qdq.py` documents. `inputs` have static
    shapes, batch included. `compute` is the number format of everything that is not quantized.
    """

    name: str
    graph: "torch.fx.GraphModule"
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    rules: TargetRules
    compute: FloatFormat = "float32"


@dataclass(frozen=True)
class Fallback:
    """A node that will not run as wanted, and why: `node` is the layer's name, `reason` a sentence."""

    node: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """What the artifact, read back from disk, will compute in which format.

    `int8_ops` and `float_ops` count operators that compute (conv, linear, matmul, add, softmax, ...);
    `conversions` counts the steps between formats that remain at run time. `kinds` counts operators by
    "<format> <operator>". Data movement (reshape, transpose, slice) counts in neither.
    """

    int8_ops: int
    float_ops: int
    conversions: int
    fallbacks: tuple[Fallback, ...] = ()
    kinds: dict[str, int] = field(default_factory=dict)


class Session(Protocol):
    """An artifact, loaded and ready. `executor` names what runs it, with its version."""

    executor: str
    measures_latency: bool

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What `run` takes, in the artifact's order, batch included. Raises TargetError where a shape is open."""
        ...

    def run(self, inputs: Batch) -> Batch:
        """Run one batch of exactly the artifact's shape; outputs by name, dequantized to float where quantized."""
        ...

    def bind(self, inputs: Batch) -> Callable[[], object]:
        """Return a call that runs once on `inputs`, with copies and conversions of inputs done beforehand."""
        ...


class Target(Protocol):
    """How a graph becomes a file of one format, and how that file runs here."""

    suffix: str

    def missing(self) -> str | None:
        """The pip command that brings what is not installed, or None."""
        ...

    def lower(self, job: Job, path: Path) -> None:
        """Write `path` (a file, or a folder where the format is one). Same job, same bytes."""
        ...

    def placement(self, path: Path, job: Job) -> Placement:
        """Read the artifact back from disk: what runs how; every quantized layer that came out float is named."""
        ...

    def open(self, path: Path, *, threads: int = 1) -> Session:
        """Load the artifact from disk into the runtime there is on this machine."""
        ...


def names() -> list[str]:
    """The names of all targets; imports none of them."""
    return sorted(
        m.name
        for m in pkgutil.iter_modules(__path__)
        if not m.name.startswith("_") and m.name != "errors" and not m.ispkg
    )


def find(name: str) -> Target:
    """The target called `name`; imports that one file. Raises TargetError when there is none."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise TargetError(f"there is no target '{name}'. {hint}There are {', '.join(names())}.")
    target: Target = importlib.import_module(f"{__name__}.{name}").TARGET
    return target


def artifact_bytes(path: Path) -> int:
    """The size on disk of an artifact, file or folder, in bytes."""
    files: Sequence[Path] = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)
