"""What one command was asked, and what its conversions share."""

from dataclasses import dataclass, field
from pathlib import Path

from calibrate.samples import CalibrationSet, InputSpec
from convert import output
from convert.capture import Captured
from convert.compress import Builder, Effort
from convert.gates import Budget
from convert.progress import Progress


@dataclass(frozen=True)
class Options:
    """Everything `tightfit convert` was asked; see its --help for the meaning."""

    model: str
    devices: tuple[str, ...]
    out: Path
    calibration: str | None = None
    evaluation: str | None = None
    labels: str | None = None
    targets: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()  # (device, target), instead of every device with every target
    recipe: str = "auto"
    weights: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    preprocessing: Path | None = None
    samples: int | None = None
    batch: int | None = None
    threads: int = 1
    seed: int = 0
    synthetic: bool = False
    python: Path | None = None
    search_path: Path | None = None  # where a module:function may be found besides PYTHONPATH
    force: bool = False
    name: str | None = None
    effort: Effort = "normal"
    budget_mib: float | None = None
    budget_ms: float | None = None
    budget: Budget = field(default_factory=Budget)
    command: str = "tightfit convert"


@dataclass(frozen=True)
class Samples:
    """Calibration and evaluation samples, disjoint, and where the latter come from."""

    calibration: CalibrationSet
    evaluation: CalibrationSet
    source: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What the conversions of one command share."""

    options: Options
    captured: Captured
    samples: Samples
    folder: Path
    twins: Path
    reference: output.Reference
    progress: Progress
    batch: int
    reference_samples: int
    builder: Builder
